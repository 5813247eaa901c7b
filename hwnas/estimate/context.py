"""The input of the stages' estimates, and what they share: a sample of the device's
speed, and the number of test images.
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
    """An experiment, the results of its earlier stages, and the remaining time.

    ``work`` is a temporary folder. ``table`` and ``known`` are the latency table and
    the architecture that earlier stages have written, if any.
    """

    experiment: Experiment
    space: SearchSpace
    work: Path
    watch: Stopwatch
    table: LatencyTable | None = None
    known: Architecture | None = None

    def folder(self, name: str) -> Path:
        """A new subfolder of ``work``."""
        folder = self.work / name
        folder.mkdir()
        return folder

    def check_data(self) -> None:
        """Raise DataError if the images are missing, before anything is
        built for them.
        """
        if self.experiment.data.path is not None:
            data_folder(self.experiment.data)

    @cached_property
    def arch(self) -> Architecture:
        """The architecture to train: the named or the found one, else one that the
        search may find.
        """
        if self.known is not None:
            return self.known
        picks = sampled(self.experiment, self.space, self.table)
        return self.space.decode(picks, "sample")

    @cached_property
    def sample(self) -> Sample:
        """Times of a few models on the device. Raises DeviceError if it cannot be
        reached.
        """
        arch = self.arch if self.experiment.train.arch is not None else None
        return sample(self.experiment, self.space, arch, self.folder("sample"), self.watch)

    @cached_property
    def test_images(self) -> int:
        """The number of test images. An estimate that has loaded them sets it."""
        return len(load_images(self.experiment.data, "test"))
