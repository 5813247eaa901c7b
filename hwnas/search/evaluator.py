"""Evaluates architectures by the super-net: the quality of the extracted network with
recalibrated BN on held-out images.

The quality is accuracy, AP, or 1 / (1 + loss), as ``search.quality`` sets it; see
``hwnas.tasks``.
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
from hwnas.core.size import Size
from hwnas.data.images import Batch, Images, evaluation_batches, load_images
from hwnas.nn.bn import recalibrate
from hwnas.nn.network import Network
from hwnas.nn.shared import GatedNetworks, resized
from hwnas.runs import JsonLines
from hwnas.task import task_of

EVALUATIONS = "evaluations.jsonl"
"""The file of a finder's evaluations, from which an interrupted finder resumes."""

_OLD_EVALUATIONS = "judged.jsonl"
"""Its previous name, which is still read for one release."""

KEPT_BYTES = 2**28
"""Most bytes of held-out images that the final ranking keeps in memory, instead of
reading them again for every network. The number is our choice: 2,000 images of 224 px
take 1.2 GB, 20,000 images of 32 px a fifth of that.
"""


class SupernetEvaluator:
    """Evaluates architectures with the current weights of a super-net.

    Results are cached until ``forget`` is called. After ``keep``, they are also written
    to a file, so that an interrupted finder resumes.
    """

    def __init__(self, supernet: GatedNetworks, experiment: Experiment) -> None:
        self.supernet = supernet
        self.config = experiment.search
        self.workers = experiment.data.workers
        self.train = load_images(experiment.data, "train")
        self.held_out = load_images(experiment.data, "held_out")
        self.quality = task_of(experiment).quality(experiment, supernet.space)
        self._known: dict[str, float] = {}
        self._file: JsonLines | None = None
        self._recalibration: list[Batch] = []
        self._evaluation: list[Batch] = []
        self._all: list[Batch] = []

    def network(self, picks: Picks) -> Network:
        """The network of ``picks`` with the super-net's weights. BN statistics are
        recalibrated; without recalibration images, they are the tracked ones.
        """
        network = self.supernet.extract(picks)
        network.to(memory_format=torch.channels_last)
        batches = self.recalibration()
        if batches:
            device = next(network.parameters()).device
            size = network.arch.size
            recalibrate(network, (to_network_input(x_NCHW, device, size) for x_NCHW, _ in batches))
        return network

    def recalibration(self) -> list[Batch]:
        """The ``search.recalibration_images`` training images that BN is recalibrated
        on, at the data's resolution.
        """
        if self.config.recalibration_images and not self._recalibration:
            count = min(self.config.recalibration_images, len(self.train))
            size = self.config.batch_size
            # Drop a last batch of one image: BN on a 1 x 1 map needs two.
            if count > 1 and count % size == 1:
                count -= 1
            self._recalibration = list(self._batches(self.train, size, count))
        return self._recalibration

    def evaluate(self, picks: Picks) -> float:
        """Quality in 0..1 on ``search.evaluation_images`` held-out images.

        Results are cached by the architecture's blocks, because picks that differ only
        in left-out slots are the same architecture.
        """
        identity = self.supernet.space.decode(picks).identity
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        if name not in self._known:
            network = self.network(picks)
            limit = self.config.evaluation_images
            quality = self.quality.of_network(network, self.held_out, self.evaluation(), limit)
            self._known[name] = quality
            if self._file is not None:
                with self._file.appending() as append:
                    append({"blocks": name, "quality": quality})
        return self._known[name]

    def evaluation(self) -> list[Batch]:
        """The ``search.evaluation_images`` held-out images that a finder evaluates on, at
        the data's resolution.
        """
        if not self._evaluation:
            limit = self.config.evaluation_images
            batches = self._batches(self.held_out, 4 * self.config.batch_size, limit)
            self._evaluation = list(batches)
        return self._evaluation

    def on_all_images(self, network: Network) -> float:
        """Quality in 0..1 on all held-out images."""
        return self.quality.of_network(network, self.held_out, self.all_held_out(), None)

    def all_held_out(self) -> Iterable[Batch]:
        """All held-out images at the data's resolution. They are read once if they fit
        into ``KEPT_BYTES``, else every time.
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
        """Load the evaluations in the file ``path``, and append new ones to it. Call it
        once the weights are final.
        """
        old_path = path.with_name(_OLD_EVALUATIONS)
        if old_path.exists() and not path.exists():
            old_path.rename(path)
        self._file = JsonLines(path)
        self._known = {}
        for row in self._file.read(numbers=("quality",)):
            if isinstance(row.get("blocks"), str):
                self._known[row["blocks"]] = row["quality"]

    def forget(self) -> None:
        """Drop cached evaluations, because the weights have changed."""
        self._known.clear()

    def _batches(self, images: Images, size: int, limit: int | None) -> Iterator[Batch]:
        return evaluation_batches(images, size, limit=limit, workers=self.workers)


def to_network_input(x_NCHW: Tensor, device: torch.device, size: Size) -> Tensor:
    """Images on ``device``, in the networks' memory layout, at that size."""
    return resized(x_NCHW.to(device, memory_format=torch.channels_last), size)
