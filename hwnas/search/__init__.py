"""Search: strategies (one file per method), the super-net's evaluator, and the stage that runs them."""

from hwnas.registry import Registry

STRATEGIES = Registry(
    "strategy",
    {
        "tunas": "hwnas.search.tunas:TuNAS",
        "random": "hwnas.search.random:RandomSearch",
    },
)
