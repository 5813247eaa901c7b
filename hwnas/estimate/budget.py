"""The budget of a search that may have no latency table yet, with a formula in its
place.
"""

from __future__ import annotations

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Picks
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import Entry, LatencyTable, TableHeader
from hwnas.devices.simulated import simulated_ms
from hwnas.errors import HwnasError
from hwnas.search import settings
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext


def stand_in(space: SearchSpace) -> LatencyTable:
    """A latency table by a formula, for a space that has not been profiled yet. It only
    decides which architectures are drawn for an estimate.
    """
    unknown = dict.fromkeys(("cpu", "machine", "runtime_version", "governor", "date"), "unknown")
    header = TableHeader(
        device="formula",
        runtime="litert",
        dtype="fp32",
        threads=1,
        cores="unknown",
        layout="NHWC",
        batch=1,
        space=space.name,
        **unknown,
    )
    return LatencyTable(
        header=header, entries={op.key: Entry(ms=simulated_ms(op)) for op in space.ops}
    )


def search_context(
    experiment: Experiment, space: SearchSpace, table: LatencyTable | None
) -> tuple[Experiment, SearchContext]:
    """The experiment and the context of its search, with checked settings.

    A latency budget without a table uses ``stand_in``. The formula's milliseconds have
    nothing to do with the device's, so the returned experiment then has a relative
    target and no limits.
    """
    if table is None and experiment.search.by_table:
        target_range = experiment.search.target_range
        if target_range is None:
            target_range = 0.5
        relative = {
            "target_ms": None,
            "budget": None,
            "target_range": target_range,
            "limits": (),
            "allow_uncalibrated": True,
        }
        search = experiment.search.model_copy(update=relative)
        experiment = experiment.model_copy(update={"search": search})
    return experiment, settings.search_context(experiment, space, table or stand_in(space))


def sampled(experiment: Experiment, space: SearchSpace, table: LatencyTable | None) -> Picks:
    """An architecture within the budget, like one that the search may find. Raises
    HwnasError if there is none.
    """
    _, search = search_context(experiment, space, table)
    architectures = sample_feasible(search, 1, np.random.default_rng(experiment.seed))
    if not architectures:
        raise HwnasError("no architecture within the budget was found")
    return architectures[0]
