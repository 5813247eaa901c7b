"""Search: strategies (one file per method), finders, the super-net's evaluator, and the
stage that runs them.
"""

from hwnas.core.search_space import SearchSpace
from hwnas.errors import SpaceError
from hwnas.registry import Registry

STRATEGIES = Registry(
    "strategy",
    {
        "tunas": "hwnas.search.tunas:TuNAS",
        "proxylessnas": "hwnas.search.proxylessnas:ProxylessNAS",
        "fbnet": "hwnas.search.fbnet:FBNet",
        "darts": "hwnas.search.darts:DARTS",
        "pdarts": "hwnas.search.pdarts:PDARTS",
        "spos": "hwnas.search.spos:SPOS",
        "fairnas": "hwnas.search.fairnas:FairNAS",
        "progressive_shrinking": "hwnas.search.progressive_shrinking:ProgressiveShrinking",
        "random": "hwnas.search.random:RandomSearch",
        "random_standalone": "hwnas.search.random:RandomStandalone",
    },
)

FINDERS = Registry(
    "finder",
    {
        "evolution": "hwnas.search.evolution:Evolution",
        "nsga2": "hwnas.search.nsga2:NSGA2",
        "random": "hwnas.search.random:RandomFinder",
    },
)

SHRINK_METRICS = Registry(
    "metric",
    {
        "angle": "hwnas.search.shrinking:Angle",
        "accuracy": "hwnas.search.shrinking:Accuracy",
        "magnitude": "hwnas.search.shrinking:Magnitude",
        "random": "hwnas.search.shrinking:Random",
    },
)
"""Metrics by which spaces are shrunk; see ``hwnas.search.shrinking.ShrinkMetric``."""


def check_space(strategy: str, space: SearchSpace) -> None:
    """Raise SpaceError if ``space`` is one of cells and the strategy cannot search it."""
    # Costs do not add up in other spaces without chains, which have a message of their own.
    has_cells = space.ADDITIVE and not space.CHAIN
    if has_cells and not STRATEGIES.get(strategy).supports_cells:
        names = sorted(name for name in STRATEGIES if STRATEGIES.get(name).supports_cells)
        raise SpaceError(
            f"strategy {strategy!r} is for chains of blocks, and {space.name} is a space of cells:"
            f" choose one of {', '.join(names)}."
        )
