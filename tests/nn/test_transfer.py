"""The super-net of a shrunk space starts with the weights of the original: every
network that is left is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hwnas.config import SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.proposal import one_hot
from tests.nn.nets import (
    batch,
    depths_space,
    groups_space,
    kernels_space,
    random_picks,
    supernet_of,
    widths_space,
)
from tests.search.staging import elastic_digits_space

SHRUNK: dict[str, tuple[MacroSpace, dict[str, list[Any]]]] = {
    "kernels": (kernels_space(), {"s1.b0": ["ir_k3_e3_se0.25", "ir_k5_e3_se0.25"], "s1.b1": ["ir_k3_e3_se0.25", "skip"]}),
    "widths": (
        widths_space(),
        {"s1.b0": ["ds_k3_se0.25", "ds_k5"], "s2.b0": ["ir_k3_e3", "ir_k5_e3"], "s2.b1": ["skip"], "s4.b0": ["cn_k3"]},
    ),
    "groups": (groups_space(), {"s1.b0": ["ir_k3_e1_g2", "skip"], "s2.b1": ["ir_k5_e3", "ir_k3_e1"]}),
    "depths": (depths_space(), {"s1.b2": ["ir_k3_e6", "skip"], "s1.depth": [1, 2], "s2.depth": [1]}),
    "tiny": (elastic_digits_space(), {"s1.b1": ["skip", "ir_k5_e3"], "s1.b2": ["ir_k3_e3", "ir_k5_e3"]}),
}  # fmt: skip


def pairs(space: MacroSpace, left: MacroSpace) -> Iterator[tuple[Picks, Picks]]:
    """Picks in the shrunk space, and the same network's picks in the original space."""
    fixed = {choice.key: choice.options[0] for choice in space.choices}
    for slot in left.slots:
        fixed |= {slot.key: slot.options[0], slot.out_key: slot.out_widths[0]}
    for i, stage in enumerate(left.stages):
        fixed[f"s{i}.depth"] = len(stage.slots)
    known = {choice.key for choice in space.choices}
    for picks in random_picks(left, 6):
        yield picks, {key: option for key, option in {**fixed, **picks}.items() if key in known}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRUNK)
@pytest.mark.parametrize(
    "config",
    [
        {"sharing": "separate"},
        {"sharing": "collapsed", "bn_track": True},
        {"sharing": "collapsed", "kernels": "ofa_transform"},
        {"sharing": "separate", "operation_on": "edge", "wsbn": True},
        {"sharing": "separate", "operation_on": "op"},
    ],
    ids=str,
)
def test_no_weight_is_lost(name: str, config: dict[str, Any]) -> None:
    space, allowed = SHRUNK[name]
    left = space.restrict(allowed, "left")
    before, after = (
        supernet_of(space, SupernetConfig(**config)),
        MacroSupernet(left, torch.Generator().manual_seed(8), SupernetConfig(**config)),
    )
    with torch.no_grad():
        for key, tensor in [*before.named_parameters(), *before.named_buffers()]:
            if "transforms" in key or "running" in key:
                tensor.uniform_(0.1, 1.0)
    after.copy_weights(before)
    for picks, same in pairs(space, left):
        a, b = before.extract(same).state_dict(), after.extract(picks).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a if "num_batches" not in key)


@pytest.mark.parametrize(("coarse", "fine"), [("node", "edge"), ("node", "op"), ("edge", "op")])
def test_copies_start_as_what_was_shared_and_diverge_in_training(coarse: Any, fine: Any) -> None:
    space, allowed = SHRUNK["tiny"]
    left = space.restrict(allowed, "left")
    before = supernet_of(space, SupernetConfig(sharing="separate", operation_on=coarse))
    same = MacroSupernet(
        left,
        torch.Generator().manual_seed(8),
        SupernetConfig(sharing="separate", operation_on=coarse),
    )
    after = MacroSupernet(
        left,
        torch.Generator().manual_seed(9),
        SupernetConfig(sharing="separate", operation_on=fine),
    )
    same.copy_weights(before)
    after.copy_weights(before)
    assert sum(p.numel() for p in after.parameters()) > sum(p.numel() for p in same.parameters())
    x_NCHW, _ = batch(left)
    for picks in random_picks(left, 6):
        gates = one_hot(picks, left)
        assert torch.allclose(same(x_NCHW, gates), after(x_NCHW, gates), atol=1e-6)
    path = {
        "s0.width": 8,
        "s1.b0": "ir_k3_e3",
        "s1.b1": "ir_k5_e3",
        "s1.b2": "ir_k3_e3",
        "s2.width": 24,
    }
    far = {**path, "s1.b1": "skip"}
    last: Any = after.slots[3].copies
    after.zero_grad(set_to_none=True)
    after(x_NCHW, one_hot(path, left)).sum().backward()
    trained = {
        number
        for number, copy in enumerate(last)
        if any(p.grad is not None for p in copy.parameters())
    }
    after.zero_grad(set_to_none=True)
    after(x_NCHW, one_hot(far, left)).sum().backward()
    others = {
        number
        for number, copy in enumerate(last)
        if any(p.grad is not None for p in copy.parameters())
    }
    assert len(trained) == len(others) == 1 and trained != others


def test_weights_for_each_operator_that_the_input_may_come_from() -> None:
    """A slot has a copy for each option, except skip, of each slot that its input may
    come from.
    """
    space = elastic_digits_space().restrict(
        {
            "s1.b0": ["ir_k3_e3", "ir_k5_e3"],
            "s1.b1": ["ir_k3_e3", "ir_k5_e6", "skip"],
            "s1.b2": ["ir_k3_e3"],
        }
    )
    supernet = supernet_of(space, SupernetConfig(sharing="separate", operation_on="op"))
    assert [len(module.copies) for module in supernet.slots] == [1, 1, 2, 4, 1]
    sources = {}
    for first in ("ir_k3_e3", "ir_k5_e3"):
        for second in ("ir_k3_e3", "ir_k5_e6", "skip"):
            picks: Picks = {"s0.width": 8, "s1.b0": first, "s1.b1": second, "s2.width": 24}
            sources[first, second] = next(
                source for position, _, _, source in supernet.path(picks) if position == 3
            )
    # both inputs come from the same operator
    assert sources["ir_k3_e3", "ir_k3_e3"] == sources["ir_k5_e3", "ir_k3_e3"]
    assert len(set(sources.values())) == 4
    x_NCHW = batch(space)[0].double()
    supernet = supernet.double()
    for picks in random_picks(space, 8):
        assert torch.allclose(
            supernet(x_NCHW, one_hot(picks, space)),
            supernet.extract(picks).train()(x_NCHW),
            atol=1e-10,
        )


def test_a_slot_that_is_always_skipped_is_not_a_producer() -> None:
    space = elastic_digits_space().restrict({"s1.b1": ["skip"]})
    supernet = supernet_of(space, SupernetConfig(sharing="separate", operation_on="edge"))
    assert [len(module.copies) for module in supernet.slots] == [1, 1, 1, 1, 2]
    assert (
        supernet.extract({"s0.width": 8, "s1.b0": "ir_k3_e3", "s1.b2": "skip", "s2.width": 24})
        is not None
    )
