"""States of strategies in a checkpoint: one that lacks a part, or holds something else in
its place, is refused when it is loaded, not steps later.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.fbnet import FBNet, FBNetConfig
from hwnas.search.pdarts import PDARTS, PDARTSConfig
from hwnas.search.proxylessnas import ProxylessNAS, ProxylessNASConfig
from hwnas.search.spos import SPOS, SPOSConfig
from hwnas.search.strategy import Strategy
from hwnas.search.tunas import TuNAS, TuNASConfig
from hwnas.state_check import part_problem
from hwnas.testing import Problem, prepared, searched

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "tunas": lambda: TuNAS(TuNASConfig()),
    "darts": lambda: DARTS(DARTSConfig()),
    "pdarts": lambda: PDARTS(PDARTSConfig()),
    "fbnet": lambda: FBNet(FBNetConfig()),
    "proxylessnas": lambda: ProxylessNAS(ProxylessNASConfig(gradient="reinforce")),
    "spos": lambda: SPOS(SPOSConfig(sampling="fair")),
}

STEPS = 4

pytestmark = pytest.mark.slow

problem = functools.cache(lambda: Problem(0))
"""One problem for all, as creating it takes longer than a search."""


def places(state: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in dictionaries. What an optimiser keeps is torch's."""
    if isinstance(state, dict) and "param_groups" not in state:
        for key, value in state.items():
            yield (*path, key)
            yield from places(value, *path, key)


def accepted(name: str, state: dict[str, Any]) -> bool:
    """Whether a new strategy takes a state, as the engine would ask it to."""
    strategy: Strategy = STRATEGIES[name]()
    prepared(strategy, problem().context(STEPS), 1)
    if part_problem("strategy", strategy.state_dict(), {"strategy": state}) is not None:
        return False
    try:
        strategy.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_state_with_a_missing_or_another_part_is_refused(name: str) -> None:
    strategy: Strategy = STRATEGIES[name]()
    context = problem().context(STEPS)
    prepared(strategy, context, 1)
    searched(strategy, context, 1, 0, STEPS)
    good = copy.deepcopy(strategy.state_dict())
    assert accepted(name, copy.deepcopy(good))
    count = 0
    for path in places(good):
        for replacement in (..., "x", torch.zeros(7, dtype=torch.int8)):
            state = copy.deepcopy(good)
            inner = state
            for key in path[:-1]:
                inner = inner[key]
            if replacement is ...:
                del inner[path[-1]]
            elif isinstance(inner[path[-1]], Tensor) or replacement == "x":
                inner[path[-1]] = replacement
            else:
                continue
            assert not accepted(name, state), (path, replacement)
            count += 1
    assert count >= 6
