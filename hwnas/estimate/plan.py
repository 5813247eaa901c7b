"""All stages of an experiment, timed one after another within a minute or so; nothing is written but into a temporary folder.

What cannot be timed (images that are not there, a device out of reach) is said to be unknown, and why; the rest is timed all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data import data_folder
from hwnas.data.images import load_images
from hwnas.engine import flush_denormals
from hwnas.errors import HwnasError
from hwnas.estimate import exporting, measuring, searching, training
from hwnas.estimate.parts import Estimate, Stopwatch, total

SECONDS = 24.0
"""What timing may take, about: a step that has begun is never cut off."""


class Estimates:
    """The stages' estimates, by name, in order. ``current`` are the stages that are up to date; ``table`` and ``arch`` what they left.

    Example:
        >>> print(Estimates(experiment, space, ("search", "train")).text())      # doctest: +SKIP
    """

    def __init__(
        self,
        experiment: Experiment,
        space: SearchSpace,
        needed: Sequence[str],
        *,
        current: Sequence[str] = (),
        table: LatencyTable | None = None,
        arch: Architecture | None = None,
    ) -> None:
        self.experiment, self.space, self.table = experiment, space, table
        self.watch = Stopwatch(SECONDS)
        self.stages: dict[str, Estimate] = {}
        self._arch = arch
        self._sampled: measuring.Sample | None = None
        self._tested: int | None = None
        flush_denormals()
        timed: dict[str, Callable[[Path], Estimate]] = {  # what takes longest first: the others may find no time left
            "search": self._search,
            "train": self._train,
            "profile": self._profile,
            "validate": self._validate,
            "export": self._export,
        }
        found = {name: Estimate(current=True) for name in current}
        with TemporaryDirectory(prefix="hwnas-plan-") as work:
            for name, estimate in timed.items():
                if name in needed and name not in found:
                    folder = Path(work) / name
                    folder.mkdir()
                    found[name] = _unless_refused(estimate, folder)
        self.stages = {name: found[name] for name in needed if name in found}

    @property
    def summary(self) -> str:
        """All stages together, and how that is known."""
        return f"{total(self.stages.values())}; from timing a few steps for {self.watch.used:.0f} s on this computer, as busy as it is now"

    def _search(self, folder: Path) -> Estimate:
        _check_data(self.experiment)
        return searching.of_search(self.experiment, self.space, self.table, folder, self.watch)

    def _train(self, folder: Path) -> Estimate:
        _check_data(self.experiment)
        found = training.of_training(self.experiment, self.arch, folder, self.watch)
        self._tested = round(next(part.count for part in found.parts if part.name == training.TESTING))
        return found

    def _profile(self, folder: Path) -> Estimate:
        return measuring.of_profile(self.experiment, self.space, self._sample(folder))

    def _validate(self, folder: Path) -> Estimate:
        _check_data(self.experiment)
        return measuring.of_validation(self.experiment, self.arch, self._test_images, self._sample(folder))

    def _export(self, folder: Path) -> Estimate:
        del folder
        return exporting.of_export(self.experiment, self.arch, self.watch)

    @property
    def _test_images(self) -> int:
        """How many there are: as the training's estimate found, else counted."""
        if self._tested is None:
            self._tested = len(load_images(self.experiment.data, "test"))
        return self._tested

    def _sample(self, folder: Path) -> measuring.Sample:
        """One for all stages that measure."""
        if self._sampled is None:
            alone = self.arch if self.experiment.train.arch is not None else None
            self._sampled = measuring.sample(self.experiment, self.space, alone, folder, self.watch)
        return self._sampled

    @property
    def arch(self) -> Architecture:
        """What is trained: the one that is named or was found, else one that the search might find."""
        if self._arch is None:
            self._arch = self.space.decode(searching.sampled(self.experiment, self.space, self.table), "sample")
        return self._arch


def _unless_refused(estimate: Callable[[Path], Estimate], folder: Path) -> Estimate:
    try:
        return estimate(folder)
    except HwnasError as error:
        return Estimate(unknown=str(error).rstrip("."))


def _check_data(experiment: Experiment) -> None:
    """Raise DataError where the images are not there, before anything is built for them."""
    if experiment.data.path is not None:
        data_folder(experiment.data)
