"""Keys of choices and the addresses that they stand for."""

from __future__ import annotations

import pytest

from hwnas.core.cell_families import darts, nasbench201
from hwnas.core.choice import Address
from hwnas.core.nasbench101 import NASBench101Space
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import load_space
from hwnas.errors import SpaceError


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("s2.b1", Address("block", "s2", slot=1)),
        ("s10.b12", Address("block", "s10", slot=12)),
        ("s2.width", Address("width", "s2")),
        ("s2.depth", Address("depth", "s2")),
        ("resolution", Address("resolution")),
        ("normal.e1-3", Address("edge", "normal", source=1, node=3)),
        ("normal.n3.inputs", Address("inputs", "normal", node=3)),
        ("v3", Address("vertex", node=3)),
        ("e0-6", Address("link", source=0, node=6)),
    ],
)
def test_a_key_is_an_address(key: str, address: Address) -> None:
    assert Address.parse(key) == address and address.key == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "s2",
        "s2.b",
        "s2.b01",
        "s2.b1 ",
        "s2xb1",
        "normal.n3",
        "c.e1-",
        "c.e٣-1",  # a digit, but not an ASCII one
        "s2.widths",
        "a b.width",
    ],
)
def test_invalid_keys_are_refused(key: str) -> None:
    with pytest.raises(SpaceError, match="is not the key of a choice"):
        Address.parse(key)


@pytest.mark.parametrize(
    "space",
    [
        load_space("mobile32"),
        load_space("ofa_mobilenet_v3"),
        nasbench201(),
        darts(),
        NASBench101Space(name="nasbench101", resolution=32, classes=10),
    ],
    ids=lambda space: space.name,
)
def test_every_choice_has_an_address(space: SearchSpace) -> None:
    for choice in space.choices:
        assert choice.address.key == choice.key
        if choice.kind in ("width", "depth", "resolution"):
            assert choice.address.kind == choice.kind
