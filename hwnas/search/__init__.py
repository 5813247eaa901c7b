"""Search: strategies (one file per method), finders, the super-net's evaluator, and the stage that runs them."""

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
"""By what a space is shrunk: ``hwnas.search.shrinking.Metric``."""
