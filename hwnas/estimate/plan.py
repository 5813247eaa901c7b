"""All stages of an experiment, timed one after another within a minute or so; nothing
is written but into a temporary folder.

What cannot be timed (images that are not there, a device out of reach) is said to be
unknown, and why; the rest is timed all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.engine import flush_denormals
from hwnas.errors import HwnasError
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Estimate, Stopwatch, total
from hwnas.stages import Stage, imported, stage_class

SECONDS = 24.0
"""What timing may take, about: a step that has begun is never cut off."""


class Estimates:
    """The stages' estimates, by name, in order. ``current`` are the stages that are up
    to date; ``table`` and ``arch`` what they left.

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
        self.watch = Stopwatch(SECONDS)
        flush_denormals()
        found = {name: Estimate(current=True) for name in current}
        timed = [stage_class(name) for name in needed if name not in found]
        # what takes longest first: the others may find no time left
        timed.sort(key=lambda stage: not stage.trains)
        with TemporaryDirectory(prefix="hwnas-plan-") as work:
            self.context = Context(experiment, space, Path(work), self.watch, table, arch)
            for stage in timed:
                if stage.estimate is not None:
                    found[stage.name] = _unless_refused(stage, self.context)
        self.stages = {name: found[name] for name in needed if name in found}

    @property
    def summary(self) -> str:
        """All stages together, and how that is known."""
        return (
            f"{total(self.stages.values())}; from timing a few steps for {self.watch.used:.0f} s on"
            " this computer, as busy as it is now"
        )


def _unless_refused(stage: type[Stage], context: Context) -> Estimate:
    assert stage.estimate is not None
    try:
        estimate: Estimate = imported(stage.estimate)(context)
    except HwnasError as error:
        return Estimate(unknown=str(error).rstrip("."))
    return estimate
