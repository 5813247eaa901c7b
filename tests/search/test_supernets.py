"""The super-net that a strategy trains: the space decides its class, and the method how
it shares weights.
"""

from __future__ import annotations

from typing import Any

import pytest

from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import darts, nasbench201
from hwnas.nn.cells import CellSupernet, GrowingSupernet
from hwnas.nn.independent import IndependentNetworks
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.settings import search_strategy
from hwnas.search.skips import published_skip_limit
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
def test_the_space_decides_the_class_of_the_super_net_and_the_method_its_sharing(
    name: str, space: SearchSpace, kind: type, settings: dict[str, Any], shared: tuple[str, str]
) -> None:
    config = experiment(name, supernet=settings)
    supernet = supernet_of(config, space, search_strategy(config.search))
    assert type(supernet) is kind and supernet.shares
    assert (supernet.config.sharing, supernet.config.kernels) == shared


@pytest.mark.slow
def test_cells_grow_and_blocks_do_not() -> None:
    config = experiment("pdarts", strategy={"name": "pdarts", "cells": [1, 1, 2]})
    strategy = search_strategy(config.search)
    assert (strategy.growth(CELLS), strategy.growth(elastic_digits_space())) == ((1, 1, 2), ())
    assert len(supernet_of(config, CELLS, strategy).proxies) == 3
    assert len(supernet_of(config, elastic_digits_space(), strategy).proxies) == 1


def test_standalone_networks_share_nothing() -> None:
    config, space = experiment("random_standalone"), elastic_digits_space()
    strategy = search_strategy(config.search)
    strategy.standalone = [{choice.key: choice.options[0] for choice in space.choices}]
    networks = supernet_of(config, space, strategy)
    assert (
        isinstance(networks, IndependentNetworks)
        and not networks.shares
        and len(networks.networks) == 1
    )


def test_the_usual_number_of_skips() -> None:
    """Two in a normal cell, as published; among blocks, a quarter of the slots that
    offer one, rounded up.
    """
    offering = sum("skip" in choice.options for choice in elastic_digits_space().choices)
    assert (published_skip_limit(CELLS), published_skip_limit(elastic_digits_space())) == (
        2,
        -(-offering // 4),
    )
