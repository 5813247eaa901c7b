"""The cost of a search, against MACs of networks that are added up by hand."""

from __future__ import annotations

import numpy as np
import torch

from hwnas.core.spaces import nasbench201
from hwnas.search.meter import Meter
from hwnas.search.proposal import one_hot
from tests.search.staging import tiny_space

SPACE = tiny_space()
A, B = (SPACE.sample(np.random.default_rng(seed)) for seed in (0, 1))
MACS_A, MACS_B = (SPACE.decode(picks).macs for picks in (A, B))


def meter() -> Meter:
    return Meter(SPACE, [SPACE], batch_size=30, judged_images=100)


def test_training_counts_three_forward_passes_of_every_path() -> None:
    found = meter()
    found.train([one_hot(A, SPACE), one_hot(B, SPACE)], split=False, teach=False)
    assert found.cost.macs == 3 * 30 * (MACS_A + MACS_B) and found.cost.training_images == 60
    found.train([one_hot(A, SPACE), one_hot(B, SPACE)], split=True, teach=False)
    assert found.cost.macs == 3 * 45 * (MACS_A + MACS_B) and found.cost.training_images == 90
    found.remember_teacher(B)
    found.train([one_hot(A, SPACE)], split=False, teach=True)
    assert found.cost.macs == 3 * 45 * (MACS_A + MACS_B) + 3 * 30 * MACS_A + 30 * MACS_B


def test_what_is_held_out_is_passed_forward() -> None:
    found = meter()
    found.qualities([one_hot(A, SPACE), one_hot(B, SPACE)], multiple=4)
    assert found.cost.macs == 60 * (MACS_A + MACS_B)


def test_a_mixture_costs_all_that_it_executes() -> None:
    """Two options of one slot cost what the two networks cost together, less what they share."""
    key = next(choice.key for choice in SPACE.choices if len(choice.options) == 4)
    first, second = ({**A, key: option} for option in ("ir_k3_e3", "ir_k5_e6"))
    without = SPACE.decode(first).macs - next(op.macs for slot, op in SPACE.walk(first) if slot.key == key and op is not None)
    other = SPACE.decode(second).macs - without
    gates = {name: torch.as_tensor(gate) for name, gate in one_hot(first, SPACE).items()}
    gates[key] = gates[key] * 0.7
    position = next(choice for choice in SPACE.choices if choice.key == key).options.index("ir_k5_e6")
    mixed = {**gates, key: gates[key].clone()}
    mixed[key][position] = 0.3
    for executed, probes in ((mixed, {}), (gates, {key: [position]})):
        found = meter()
        found.gate_gradients(executed, probes, order=1)
        assert found.cost.macs == 3 * 30 * (SPACE.decode(first).macs + other)
    found = meter()
    found.gate_gradients(mixed, {}, order=2)
    assert found.cost.macs == 4 * 3 * 30 * (SPACE.decode(first).macs + other)


def test_an_architecture_is_judged_once_until_the_weights_change() -> None:
    found = meter()
    for picks in (A, B, A):
        found.judge(picks)
    assert (found.cost.macs, found.cost.judged) == (100 * (MACS_A + MACS_B), 2)
    found.judge(A, images=7)  # the last ranking, on other images
    assert found.cost.macs == 107 * MACS_A + 100 * MACS_B
    other = meter()
    other.load_state_dict(found.state_dict())
    assert other.cost == found.cost
    found.train([one_hot(A, SPACE)], split=False, teach=False)
    found.judge(A)
    assert found.cost.judged == 4


def test_cells_of_the_same_blocks_are_judged_one_by_one() -> None:
    space = nasbench201(width=0.25, resolution=8)
    texts = (
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|",
        "|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|",
    )
    one, other = (space.read(text) for text in texts)
    assert space.decode(one).blocks == space.decode(other).blocks
    found = Meter(space, [space], batch_size=4, judged_images=10)
    for picks in (one, other, one):
        found.judge(picks)
    assert found.cost.judged == 2


def test_a_super_net_that_grows_costs_what_it_is() -> None:
    large = SPACE.model_validate({**SPACE.model_dump(), "resolution": 2 * SPACE.resolution})
    found, macs = Meter(large, [SPACE, large], batch_size=30, judged_images=100), large.decode(A).macs
    found.grow(0)
    found.train([one_hot(A, SPACE)], split=False, teach=False)
    assert found.cost.macs == 90 * MACS_A < 90 * macs
    found.grow(1)
    found.train([one_hot(A, SPACE)], split=False, teach=False)
    assert found.cost.macs == 90 * (MACS_A + macs)
