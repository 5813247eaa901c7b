"""How good an architecture is by the super-net: the quality of its extracted,
BN-recalibrated network on held-out images.

``quality`` says what that is: accuracy or AP, or 1 / (1 + loss); see ``hwnas.tasks``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.arch import Picks
from hwnas.data.images import Batch, Images, evaluation_batches, load_images
from hwnas.nn.bn import recalibrate
from hwnas.nn.network import Network
from hwnas.nn.shared import GatedNetworks, resized
from hwnas.runs import JsonLines
from hwnas.task import task_of

EVALUATIONS = "evaluations.jsonl"
"""Evaluations that a finder has asked for, so that a stopped one resumes."""

_OLD_EVALUATIONS = "judged.jsonl"
"""Its name before; read for one release."""

KEPT_BYTES = 2**28
"""Held-out images that are kept in memory between the networks of the last ranking, at
most, instead of being read for each anew (ours): 2,000 images of 224 px are 1.2 GB,
20,000 of 32 px a fifth of that.
"""


class SupernetEvaluator:
    """Evaluates architectures, each one once until ``forget`` is called: what it says
    holds for the weights of the moment.

    Once ``keep`` has named a file, evaluations are also kept there, so that a finder
    that is stopped resumes.
    """

    def __init__(self, supernet: GatedNetworks, experiment: Experiment) -> None:
        self.supernet, self.config, self.workers = (
            supernet,
            experiment.search,
            experiment.data.workers,
        )
        self.train, self.held_out = (
            load_images(experiment.data, "train"),
            load_images(experiment.data, "held_out"),
        )
        self.quality = task_of(experiment).quality(experiment, supernet.space)
        self._known: dict[str, float] = {}
        self._file: JsonLines | None = None
        self._recalibration: list[Batch] = []
        self._evaluation: list[Batch] = []
        self._all: list[Batch] = []

    def network(self, picks: Picks) -> Network:
        """The network of ``picks`` with the super-net's weights and re-estimated BN
        statistics (or tracked ones, where none are).
        """
        network = self.supernet.extract(picks)
        network.to(memory_format=torch.channels_last)
        batches = self.recalibration()
        if batches:
            device, size = next(network.parameters()).device, network.arch.resolution
            recalibrate(network, (placed(x_NCHW, device, size) for x_NCHW, _ in batches))
        return network

    def recalibration(self) -> list[Batch]:
        """The ``search.recalibration_images`` training images that BN statistics are
        of, at the data's resolution.
        """
        if self.config.recalibration_images and not self._recalibration:
            count, size = (
                min(self.config.recalibration_images, len(self.train)),
                self.config.batch_size,
            )
            count -= count > 1 and count % size == 1  # BN needs two images where the map is 1 x 1
            self._recalibration = list(self._batches(self.train, size, count))
        return self._recalibration

    def evaluate(self, picks: Picks) -> float:
        """Quality in 0..1 on ``search.evaluation_images`` held-out images. Left-out
        slots make no difference, so blocks are remembered.
        """
        name = hashlib.sha256(self.supernet.space.decode(picks).identity.encode()).hexdigest()[:32]
        if name not in self._known:
            network, limit = self.network(picks), self.config.evaluation_images
            self._known[name] = self.quality.of_network(
                network, self.held_out, self.evaluation(), limit
            )
            if self._file is not None:
                with self._file.appending() as append:
                    append({"blocks": name, "quality": self._known[name]})
        return self._known[name]

    def evaluation(self) -> list[Batch]:
        """The ``search.evaluation_images`` held-out images that a finder evaluates on, at
        the data's resolution.
        """
        self._evaluation = self._evaluation or list(
            self._batches(self.held_out, 4 * self.config.batch_size, self.config.evaluation_images)
        )
        return self._evaluation

    def on_all_images(self, network: Network) -> float:
        """Quality in 0..1 on all held-out images."""
        return self.quality.of_network(network, self.held_out, self.all_held_out(), None)

    def all_held_out(self) -> Iterable[Batch]:
        """All held-out images at the data's resolution: read once where they fit into
        ``KEPT_BYTES``, else each time.
        """
        batches = self._batches(self.held_out, 4 * self.config.batch_size, None)
        if self._all:
            return self._all
        first = next(batches)
        if first[0][0].nbytes * len(self.held_out) > KEPT_BYTES:
            return chain([first], batches)
        self._all = [first, *batches]
        return self._all

    def keep(self, path: Path) -> None:
        """The weights are final: take over the evaluations in a file, and add further ones to it."""
        old_path = path.with_name(_OLD_EVALUATIONS)
        if old_path.exists() and not path.exists():
            old_path.rename(path)
        self._file = JsonLines(path)
        self._known = {
            row["blocks"]: row["quality"] for row in self._file.read() if "quality" in row
        }

    def forget(self) -> None:
        """The weights have changed."""
        self._known.clear()

    def _batches(self, images: Images, size: int, limit: int | None) -> Iterator[Batch]:
        return evaluation_batches(images, size, limit=limit, workers=self.workers)


def placed(x_NCHW: Tensor, device: torch.device, size: int) -> Tensor:
    """Images where a network of ``size`` pixels wants them, and how."""
    return resized(x_NCHW.to(device, memory_format=torch.channels_last), size)
