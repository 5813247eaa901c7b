"""What the stages' estimates are made from, and what they share: one sample of the
device, one count of the test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data import data_folder
from hwnas.data.images import load_images
from hwnas.estimate.budget import sampled
from hwnas.estimate.parts import Stopwatch
from hwnas.estimate.sample import Sample, sample


@dataclass
class Context:
    """An experiment, what its run folder has of it, and the time that is left.

    ``work`` is a temporary folder. ``table`` and ``known`` are the latency table and
    the architecture of earlier stages.
    """

    experiment: Experiment
    space: SearchSpace
    work: Path
    watch: Stopwatch
    table: LatencyTable | None = None
    known: Architecture | None = None

    def folder(self, name: str) -> Path:
        """A new folder to work in."""
        folder = self.work / name
        folder.mkdir()
        return folder

    def check_data(self) -> None:
        """Raise DataError where the images are not there, before anything is built for them."""
        if self.experiment.data.path is not None:
            data_folder(self.experiment.data)

    @cached_property
    def arch(self) -> Architecture:
        """What is trained: the one that is named or was found, else one that the search
        might find.
        """
        return self.known or self.space.decode(
            sampled(self.experiment, self.space, self.table), "sample"
        )

    @cached_property
    def sample(self) -> Sample:
        """A few models on the device. Raises DeviceError where it cannot be reached."""
        alone = self.arch if self.experiment.train.arch is not None else None
        return sample(self.experiment, self.space, alone, self.folder("sample"), self.watch)

    @cached_property
    def test_images(self) -> int:
        """How many there are. An estimate that has loaded them sets it."""
        return len(load_images(self.experiment.data, "test"))
