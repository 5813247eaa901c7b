"""The networks that a strategy trains: of the kind that the space is, sharing weights
as the method does.
"""

from __future__ import annotations

from typing import Any

import pytest

from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import darts, nasbench201
from hwnas.nn.cells import CellSupernet, GrowingSupernet
from hwnas.nn.independent import IndependentNetworks
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.skips import usual_skips
from hwnas.search.stage import search_strategy
from hwnas.search.supernets import supernet_of
from tests.search.staging import elastic_digits_space, experiment

CELLS = darts(channels=4, layers=5, resolution=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "space", "kind", "settings", "shared"),
    [
        ("spos", elastic_digits_space(), MacroSupernet, {}, ("separate", "own")),
        (
            "progressive_shrinking",
            elastic_digits_space(),
            MacroSupernet,
            {},
            ("collapsed", "ofa_transform"),
        ),
        (
            "progressive_shrinking",
            elastic_digits_space(),
            MacroSupernet,
            {"kernels": "ofa"},
            ("collapsed", "ofa"),
        ),
        ("pdarts", elastic_digits_space(), MacroSupernet, {}, ("separate", "own")),
        ("darts", CELLS, CellSupernet, {}, ("auto", "auto")),
        ("darts", CELLS, CellSupernet, {"sharing": "separate"}, ("separate", "auto")),
        ("pdarts", CELLS, GrowingSupernet, {}, ("auto", "auto")),
        ("spos", nasbench201(width=0.25, resolution=8), CellSupernet, {}, ("auto", "auto")),
    ],
)
def test_a_super_net_is_of_the_spaces_kind_and_shares_as_the_method_does(
    name: str, space: SearchSpace, kind: type, settings: dict[str, Any], shared: tuple[str, str]
) -> None:
    config = experiment(name, supernet=settings)
    found = supernet_of(config, space, search_strategy(config.search))
    assert type(found) is kind and found.shares
    assert (found.config.sharing, found.config.kernels) == shared


@pytest.mark.slow
def test_cells_grow_and_blocks_do_not() -> None:
    config = experiment("pdarts", strategy={"name": "pdarts", "cells": [1, 1, 2]})
    strategy = search_strategy(config.search)
    assert (strategy.growth(CELLS), strategy.growth(elastic_digits_space())) == ((1, 1, 2), ())
    assert len(supernet_of(config, CELLS, strategy).proxies) == 3
    assert len(supernet_of(config, elastic_digits_space(), strategy).proxies) == 1


def test_networks_of_their_own_are_a_portfolio() -> None:
    config, space = experiment("random_standalone"), elastic_digits_space()
    strategy = search_strategy(config.search)
    strategy.alone = [{choice.key: choice.options[0] for choice in space.choices}]
    found = supernet_of(config, space, strategy)
    assert isinstance(found, IndependentNetworks) and not found.shares and len(found.networks) == 1


def test_how_many_skips_are_usual() -> None:
    """Two of a normal cell as published; of blocks a quarter, rounded up, of the slots
    that offer one.
    """
    offering = sum("skip" in choice.options for choice in elastic_digits_space().choices)
    assert (usual_skips(CELLS), usual_skips(elastic_digits_space())) == (2, -(-offering // 4))
