"""Estimates of all stages of an experiment, timed one after another within about a
minute. Only a temporary folder is written to.

A stage that cannot be timed (missing images, an unreachable device) is reported as
unknown, with the reason; the others are still timed.
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
from hwnas.estimate.parts import Stopwatch, TimeEstimate, total
from hwnas.stages import Stage, imported, stage_class

SECONDS = 24.0
"""About how long timing may take; a step that has begun is never interrupted."""


class Estimates:
    """The estimates of the stages ``needed``, by name, in that order.

    ``current`` are the stages that are up to date, ``table`` and ``arch`` the latency
    table and the architecture that they have written.

    Example:
        >>> stages = ("search", "train")
        >>> print(Estimates(experiment, space, stages).summary)  # doctest: +SKIP
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
        estimates = {name: TimeEstimate(current=True) for name in current}
        timed = [stage_class(name) for name in needed if name not in estimates]
        # The stages that train take longest. They come first, as time may run out.
        timed.sort(key=lambda stage: not stage.trains)
        with TemporaryDirectory(prefix="hwnas-plan-") as work:
            self.context = Context(experiment, space, Path(work), self.watch, table, arch)
            for stage in timed:
                if stage.estimate is not None:
                    estimates[stage.name] = _estimate(stage, self.context)
        self.stages = {name: estimates[name] for name in needed if name in estimates}

    @property
    def summary(self) -> str:
        """All stages together, and what the estimate is based on."""
        return (
            f"{total(self.stages.values())}; from timing a few steps for {self.watch.used:.0f} s on"
            " this computer, as busy as it is now"
        )


def _estimate(stage: type[Stage], context: Context) -> TimeEstimate:
    """The stage's estimate; unknown, with the reason, if the stage could not run."""
    assert stage.estimate is not None
    try:
        estimate: TimeEstimate = imported(stage.estimate)(context)
    except HwnasError as error:
        return TimeEstimate(unknown=str(error).rstrip("."))
    return estimate
