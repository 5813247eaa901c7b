"""What networks are trained for: a ``Task``, found by its name as a plug-in.

A task defines the loss, the metric that measures how good a network is, what the
outputs of its exported files mean, how closely they have to match PyTorch's, and the
words in which all this is reported. Stages call the task and do not depend on which one
it is. A task of your own is one class and one entry point; it is then searched,
trained, exported, validated and reported like the built-in ones::

    [project.entry-points."hwnas.task"]
    mine = "my_package.task:Mine"

``hwnas.testing.TaskConformance`` tests what must hold.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from hwnas.config import Experiment
from hwnas.config.tasks import TASKS
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.detector import PostProcessing
from hwnas.core.search_space import SearchSpace
from hwnas.old_names import accept_old_names

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

    from hwnas.data.images import Batch, Images
    from hwnas.engine import Criterion
    from hwnas.nn.network import Network

OLD_NAMES = {
    "said": "describe_result",
    "said_of_file": "describe_file_result",
    "said_on_the_way": "describe_progress",
    "kept": "load_answers",
}
"""Renamed methods of ``Task``, old name -> new name."""


def __getattr__(name: str) -> Any:
    if name == "Quality":
        warnings.warn(
            "hwnas.task.Quality is now SearchQuality; the old name works until the next release.",
            FutureWarning,
            stacklevel=2,
        )
        return SearchQuality
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Parity(BaseModel):
    """How closely a file's outputs match PyTorch's on real test images; ``Task.parity``
    defines what is compared.

    ``relative_error`` is the largest difference, relative to the range of the outputs;
    ``agreement`` is the fraction of images with the same answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    relative_error: float
    agreement: float


class Output(BaseModel):
    """One output of an exported file, for batch size 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    meaning: str


Metrics = dict[str, float | None]
"""Numbers in 0..1 by name; None if the images do not define one."""


@dataclass(frozen=True)
class EvaluationResult:
    """How good a network is on some test images.

    ``metrics`` begin with the task's own metric. ``per_class`` holds that metric by
    class name, for tasks that report it per class. ``answers`` are the network's
    answers, for tasks that show them.
    """

    metrics: Metrics
    per_class: Metrics = field(default_factory=dict)
    answers: Any = None


@dataclass(frozen=True)
class EvaluationSettings:
    """How many images a network is evaluated on (None: all), and how they are loaded."""

    batch_size: int
    limit: int | None = None
    workers: int = 0


class SearchQuality(ABC):
    """What a search maximises. ``metric`` names what ``of_network`` returns; see
    ``hwnas.core.metric``.

    ``of_cross_entropy`` is true if the training loss is a cross-entropy of labels. A
    strategy that sums several losses then knows their scale, and a teacher's
    probabilities can replace the labels.
    """

    metric: str
    of_cross_entropy: ClassVar[bool] = False

    @abstractmethod
    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """The loss to minimise; a new module on every call."""

    @abstractmethod
    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """The quality in 0..1 of a network's outputs, given the targets of one batch."""

    @abstractmethod
    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """The training loss of the best constant answer, which does not look at the
        image; None if there is no simple formula.
        """

    @abstractmethod
    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """What ``of_network`` returns for a network that ignores the image, on images
        with these labels; None if unknown.
        """

    @abstractmethod
    def of_network(
        self, network: Network, images: Images, batches: Iterable[Batch], limit: int | None
    ) -> float:
        """The quality in 0..1 of a network on ``batches``, the evaluation batches of
        ``limit`` of the ``images`` (None: all).
        """


class Answers(ABC):
    """The answers of PyTorch or of a file for test images, in ``evaluation_order``."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images answered."""

    @abstractmethod
    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """Metrics of the answers for ``limit`` of the ``images`` (None: all), by name,
        the task's own metric first.
        """

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All answers as arrays for a bundle; ``Task.load_answers`` reads them
        back.
        """


class FileAnswers(Answers):
    """A file's answers, gathered while it runs."""

    @abstractmethod
    def add(self, outputs: np.ndarray) -> None:
        """Add the file's outputs for the next images: [N, values of all outputs]."""

    def timings_ms(self) -> dict[str, float]:
        """The time spent outside the file to get an answer, by field names of
        ``Verdict``.
        """
        return {}


@dataclass(frozen=True)
class Words:
    """The words in which a task's results are reported.

    ``network`` is what a network is called and ``metric`` what the task's metric is
    called. ``answer`` is what a file and PyTorch should agree on ("same top-1"), and
    ``parity`` what ``Task.parity`` compares. ``metric_note`` explains the metrics.
    """

    network: str
    metric: str
    answer: str
    parity: str
    metric_note: str


class Task(ABC):
    """What networks are trained for.

        network_kind     the ``Architecture.task`` of its networks
        metric           the metric that ranks networks
        numbers          all its metrics, in reading order, ``metric`` first
        tiles            the metrics at the top of a report
        words            the words in which results are reported
        tables           tables of the configuration that its networks depend on
        files            files that training writes next to the weights
        curve            names in the rows of ``validation.jsonl`` -> metrics
        curve_images     images per point of that curve, at most
        curve_cost       cost of evaluating one image, in training images
        reference        the name of PyTorch's outputs in a bundle's ``parity.npz``
        decodes          whether files go beyond the network, to answers from its outputs
        studied          whether the studies of super-nets know its networks' true quality

    ``post_processing`` holds the settings by which detections are selected.
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

    def __init_subclass__(cls, **arguments: Any) -> None:
        # before ABCMeta looks for missing methods, so the old names count as implemented
        super().__init_subclass__(**arguments)
        accept_old_names(cls, OLD_NAMES)

    def __init__(self, post_processing: PostProcessing | None = None) -> None:
        self.post_processing = post_processing or PostProcessing()

    # Training

    @abstractmethod
    def space(self, space: SearchSpace, experiment: Experiment) -> SearchSpace:
        """The space of the task's networks, built from the blocks of a space. Raises
        ConfigError or SpaceError if it cannot be built.
        """

    @abstractmethod
    def architecture(self, arch: Architecture, experiment: Experiment) -> Architecture:
        """The task's network, built from an architecture's blocks. Raises ConfigError
        or SpaceError if it cannot be built.
        """

    @abstractmethod
    def criterion(self, arch: Architecture, label_smoothing: float = 0.0) -> Criterion:
        """The loss of the final training."""

    @abstractmethod
    def quality(self, experiment: Experiment, space: SearchSpace) -> SearchQuality:
        """What a search maximises."""

    # Evaluation

    @abstractmethod
    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """Evaluate a network on the device that holds its weights. It is already in
        eval mode.
        """

    @abstractmethod
    def guess(self, images: Images) -> float | None:
        """The metric of the best answer that does not look at the image; None if
        unknown.
        """

    @abstractmethod
    def caution(self, metrics: Metrics, images: int, guess: float | None) -> Caution | None:
        """A warning if a network is no better than a guess on that many test images."""

    @abstractmethod
    def describe_result(self, metrics: Metrics, images: int) -> str:
        """One phrase that reports how good a trained network is on ``images`` test
        images.
        """

    @abstractmethod
    def describe_file_result(self, value: float, images: int) -> str:
        """The same for an exported file, as what it does: "finds ..." """

    @abstractmethod
    def describe_progress(self, value: float) -> str:
        """How good a network is during training, to be followed by "N test images"."""

    def record(
        self, folder: Path, network: Network, images: Images, evaluated: EvaluationResult
    ) -> None:
        """Write the ``files`` of a training run. By default there are none."""
        del folder, network, images, evaluated

    # Exported files

    def check_images(self, images: Images, name: str, arch: Architecture) -> None:
        """Raise ConfigError if the data set ``name`` lacks what the task's evaluation
        needs.
        """
        del images, name, arch

    def reference_images(self, network: Network) -> int | None:
        """The largest number of images for which a bundle keeps PyTorch's outputs;
        None: no limit.
        """
        del network
        return None

    @abstractmethod
    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """PyTorch's outputs for channels-last float32 images, computed on the CPU in
        float32: what the plain float file should output.
        """

    @abstractmethod
    def outputs(self, graph: str, arch: Architecture, output: str) -> tuple[Output, ...]:
        """The outputs of a file whose graph ends as ``graph`` says. ``output`` is
        ``"logits"``, or ``"probabilities"`` after a softmax.
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
        """An empty collection for the answers of a file with this ``graph``.
        ``app_score`` is a second score threshold, at which post-processing is timed as
        well.
        """

    @abstractmethod
    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's answers for all images, computed on the CPU in float32."""

    @abstractmethod
    def load_answers(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """PyTorch's answers, read back from a bundle's arrays."""

    def min_score(self) -> float | None:
        """The lowest score at which an answer counts; None if answers have no
        threshold.
        """
        return None


def task_of(experiment: Experiment) -> Task:
    """The task of an experiment, with the experiment's settings."""
    return task_named(experiment.task, experiment.detector.post_processing)


def evaluate(
    task: Task, network: Network, images: Images, settings: EvaluationSettings
) -> EvaluationResult:
    """``task.evaluate`` in eval mode. The mode is set here so that no test image can
    change batch statistics, even if a task forgets to.
    """
    network.eval()
    return task.evaluate(network, images, settings)


def task_named(name: str, post_processing: PostProcessing | None = None) -> Task:
    """The task of that name. Raises ConfigError if it is unknown."""
    task_class: type[Task] = TASKS.get(name)
    return task_class(post_processing)
