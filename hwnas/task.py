"""What networks are trained for: a ``Task``, found by its name as a plug-in.

A task says what is minimised, how good a network is and what that is called, what its
exported files put out, how near they have to come to PyTorch, and the words for all
this. Stages ask it, and do not ask which one it is. A task of your own is one class and
one entry point; it is then searched, trained, exported, validated and reported like the
built-in ones::

    [project.entry-points."hwnas.task"]
    mine = "my_package.task:Mine"

``hwnas.testing.TaskConformance`` says what must hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hwnas.config import Experiment
from hwnas.config.tasks import TASKS
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.detector import PostProcessing
from hwnas.core.search_space import SearchSpace
from hwnas.data.images import Batch, Images
from hwnas.engine import Criterion
from hwnas.nn.network import Network


class Parity(BaseModel):
    """A file's outputs against PyTorch's on real test images: ``Task.parity`` says what
    is compared.

    ``relative_error`` is the largest difference, relative to what outputs can be;
    ``agreement`` the part of images with the same answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    relative_error: float
    agreement: float


class Output(BaseModel):
    """One output of a file, of batch 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    meaning: str


Metrics = dict[str, float | None]
"""Numbers by name, each in 0..1; none where there is nothing to judge by."""


@dataclass(frozen=True)
class Evaluated:
    """How good a network is on some test images.

    ``metrics`` begin with the task's own; ``per_class`` has that one by the class's
    name, where the task tells classes apart; ``answers`` are the network's, where the
    task shows them.
    """

    metrics: Metrics
    per_class: Metrics = field(default_factory=dict)
    answers: Any = None


@dataclass(frozen=True)
class Evaluation:
    """On how many images a network is evaluated (None: all), and how they are read."""

    batch_size: int
    limit: int | None = None
    workers: int = 0


class Quality(ABC):
    """What a search calls good. ``metric`` names what ``of_network`` gives; see
    ``hwnas.core.metric``.

    ``of_cross_entropy``: the training loss is a cross-entropy of labels, so that a
    strategy knows how many of them it adds up, and a teacher's probabilities can take
    the labels' place.
    """

    metric: str
    of_cross_entropy: ClassVar[bool] = False

    @abstractmethod
    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """What is minimised; a new module each time."""

    @abstractmethod
    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """The quality in 0..1 of a network's outputs on the targets of one batch."""

    @abstractmethod
    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """The training loss of the best answer that does not look at the image; None
        where that is no simple number.
        """

    @abstractmethod
    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """What ``of_network`` gives for a network that does not look at the image, on
        images of these labels; None: not known.
        """

    @abstractmethod
    def of_network(
        self, network: Network, images: Images, batches: Iterable[Batch], limit: int | None
    ) -> float:
        """The quality in 0..1 of a network on the evaluation ``batches`` of ``limit``
        of the ``images`` (None: all).
        """


class Answers(ABC):
    """What PyTorch, or a file, answers for test images, one after another in
    ``evaluation_order``.
    """

    @abstractmethod
    def __len__(self) -> int:
        """For how many images."""

    @abstractmethod
    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """How good the answers for ``limit`` of the ``images`` (None: all) are, by
        name, the task's own metric first.
        """

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as a bundle keeps it; ``Task.kept`` reads it."""


class FileAnswers(Answers):
    """A file's answers, which are gathered as it runs."""

    @abstractmethod
    def add(self, outputs: np.ndarray) -> None:
        """The outputs of the file for the next images: [N, numbers of all outputs]."""

    def timings_ms(self) -> dict[str, float]:
        """What answering took beside running the file, by names of a verdict's fields."""
        return {}


@dataclass(frozen=True)
class Words:
    """How people speak of a task's results.

    ``network`` is what a network is called, ``metric`` the task's metric, ``answer``
    what a file and PyTorch have in common ("same top-1"), ``parity`` what
    ``Task.parity`` compares; ``metric_note`` explains the metrics.
    """

    network: str
    metric: str
    answer: str
    parity: str
    metric_note: str


class Task(ABC):
    """What networks are trained for.

    network_kind     the ``Architecture.task`` of its networks
    metric           what they are judged by
    numbers          all its metrics, in the order in which people read them, its own first
    tiles            those that a report begins with
    words            how people speak of it
    tables           tables of the configuration that its networks depend on
    files            what a training writes beside its weights
    curve            names in the rows of ``validation.jsonl`` -> metrics
    curve_images     images of a point of that curve, at most
    curve_cost       what evaluating one costs, in images that are trained on
    reference        the name of PyTorch's outputs in a bundle's ``parity.npz``
    decodes          whether files compute more than the network: answers from its outputs
    studied          whether studies of super-nets know what its networks are worth

    ``post_processing`` is what detections are chosen by.
    """

    name: ClassVar[str]
    network_kind: ClassVar[str]
    metric: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]]
    tiles: ClassVar[tuple[str, ...]]
    words: ClassVar[Words]
    tables: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    curve: ClassVar[Mapping[str, str]]
    curve_images: ClassVar[int] = 2_000
    curve_cost: ClassVar[float]
    reference: ClassVar[str]
    decodes: ClassVar[bool] = False
    studied: ClassVar[bool] = False

    def __init__(self, post_processing: PostProcessing | None = None) -> None:
        self.post_processing = post_processing or PostProcessing()

    # What is trained

    @abstractmethod
    def space(self, space: SearchSpace, experiment: Experiment) -> SearchSpace:
        """The space of the task's networks on a space's blocks. Raises ConfigError or
        SpaceError where there is none.
        """

    @abstractmethod
    def architecture(self, arch: Architecture, experiment: Experiment) -> Architecture:
        """The task's network on an architecture's blocks. Raises ConfigError or
        SpaceError where there is none.
        """

    @abstractmethod
    def criterion(self, arch: Architecture, label_smoothing: float = 0.0) -> Criterion:
        """What the final training minimises."""

    @abstractmethod
    def quality(self, experiment: Experiment, space: SearchSpace) -> Quality:
        """What a search calls good."""

    # How good it is

    @abstractmethod
    def evaluate(self, network: Network, images: Images, how: Evaluation) -> Evaluated:
        """How good a network is, where its weights are. It is in eval mode already."""

    @abstractmethod
    def guess(self, images: Images) -> float | None:
        """What the metric is of the best answer that does not look at the image; None
        where that is not known.
        """

    @abstractmethod
    def caution(self, metrics: Metrics, images: int, guess: float | None) -> Caution | None:
        """Said where a network is no better than a guess on so many test images."""

    @abstractmethod
    def said(self, metrics: Metrics, images: int) -> str:
        """How good a trained network is on so many test images, in words."""

    @abstractmethod
    def said_of_file(self, value: float, images: int) -> str:
        """The same of an exported file, as what it does: "finds ..." """

    @abstractmethod
    def said_on_the_way(self, value: float) -> str:
        """How good a network is while it trains, before "N test images"."""

    def record(self, folder: Path, network: Network, images: Images, evaluated: Evaluated) -> None:
        """Write the ``files`` of a training: none."""
        del folder, network, images, evaluated

    # Its files

    def check_images(self, images: Images, name: str, arch: Architecture) -> None:
        """Raise ConfigError where the data set of that name has not what a network of
        the task is judged by.
        """
        del images, name, arch

    def reference_images(self, network: Network) -> int | None:
        """For how many images a bundle keeps PyTorch's outputs at most."""
        del network
        return None

    @abstractmethod
    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """What PyTorch puts out for channels-last float32 images, on the CPU in
        float32, as the plain float file does.
        """

    @abstractmethod
    def outputs(self, graph: str, arch: Architecture, output: str) -> tuple[Output, ...]:
        """What comes out of a file with this in its graph. ``output`` is ``"logits"``,
        or ``"probabilities"`` behind a softmax.
        """

    @abstractmethod
    def parity(
        self, graph: str, outputs: np.ndarray, reference: np.ndarray, arch: Architecture
    ) -> Parity:
        """Compare a file's outputs [N, ...] with PyTorch's."""

    @abstractmethod
    def answers(
        self, graph: str, arch: Architecture, app_score: float | None = None
    ) -> FileAnswers:
        """None yet, of a file with this in its graph. ``app_score`` is a second
        threshold, at which answering is timed, too.
        """

    @abstractmethod
    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's for all images, on the CPU in float32."""

    @abstractmethod
    def kept(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """PyTorch's as a bundle keeps them."""

    def min_score(self) -> float | None:
        """The score from which an answer counts; None where answers have no threshold."""
        return None


def task_of(experiment: Experiment) -> Task:
    """The task of an experiment, with its settings."""
    return task_named(experiment.task, experiment.detector.post_processing)


def evaluate(task: Task, network: Network, images: Images, how: Evaluation) -> Evaluated:
    """``task.evaluate`` in eval mode, so that no test image changes a network's
    statistics, whatever a task leaves out.
    """
    network.eval()
    return task.evaluate(network, images, how)


def task_named(name: str, post_processing: PostProcessing | None = None) -> Task:
    """The task of a name. Raises ConfigError where there is none."""
    made: type[Task] = TASKS.get(name)
    return made(post_processing)
