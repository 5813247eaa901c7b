"""The budget of a search that may have no table yet: prices by a formula stand in for it."""

from __future__ import annotations

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Picks
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import Entry, LatencyTable, TableHeader
from hwnas.devices.simulated import simulated_ms
from hwnas.errors import HwnasError
from hwnas.search import stage
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext


def stand_in(space: SearchSpace) -> LatencyTable:
    """Prices by a formula for a space that has not been profiled yet: only which
    architectures are drawn depends on them.
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
    """A checked budget by the table, or by a stand-in, whose milliseconds no target and
    no limit is about; what is counted needs none.
    """
    if table is None and experiment.search.by_table:
        target = (
            experiment.search.target_range if experiment.search.target_range is not None else 0.5
        )
        loose = {
            "target_ms": None,
            "budget": None,
            "target_range": target,
            "limits": (),
            "allow_uncalibrated": True,
        }
        experiment = experiment.model_copy(
            update={"search": experiment.search.model_copy(update=loose)}
        )
    return experiment, stage.search_context(experiment, space, table or stand_in(space))


def sampled(experiment: Experiment, space: SearchSpace, table: LatencyTable | None) -> Picks:
    """An architecture within the budget, as the search may find one. Raises HwnasError
    where there is none.
    """
    _, search = search_context(experiment, space, table)
    found = sample_feasible(search, 1, np.random.default_rng(experiment.seed))
    if not found:
        raise HwnasError("no architecture within the budget was found")
    return found[0]
