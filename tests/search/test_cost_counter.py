"""The cost of a search, against MACs of networks that are added up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hwnas.core.arch import Picks
from hwnas.core.spaces import nasbench201
from hwnas.search.cost_counter import CostCounter, CountedEvaluator, CountedWeights, SearchCost
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Gates, Metrics, Probes
from tests.search.staging import elastic_digits_space

SPACE = elastic_digits_space()
A, B = (SPACE.sample(np.random.default_rng(seed)) for seed in (0, 1))
MACS_A, MACS_B = (SPACE.decode(picks).macs for picks in (A, B))


class Asked:
    """Weights, and what evaluates them, that write down what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        self.calls.append(("train", gates, split, teach, skip_dropout))
        return {"loss": 2.0}

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        self.calls.append(("qualities", gates, multiple))
        return [0.25]

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        self.calls.append(("gate_gradients", gates, probes, order, skip_dropout))
        return 3.0, {}

    def remember_teacher(self, picks: Picks) -> None:
        self.calls.append(("remember_teacher", picks))

    def grow(self, number: int) -> None:
        self.calls.append(("grow", number))

    def evaluate(self, picks: Picks) -> float:
        self.calls.append(("evaluate", picks))
        return 0.75


class Counted(CountedWeights):
    """A search whose weights have nothing to do, and what it has cost."""

    def __init__(self, cost_counter: CostCounter) -> None:
        super().__init__(Asked(), cost_counter)

    @property
    def cost(self) -> SearchCost:
        return self.cost_counter.cost


def cost_counter() -> CostCounter:
    return CostCounter(SPACE, [SPACE], batch_size=30, evaluation_images=100)


def counted() -> Counted:
    return Counted(cost_counter())


def test_what_is_counted_is_asked_for_as_it_was() -> None:
    asked, gates = Asked(), one_hot(A, SPACE)
    weights, evaluator = (
        CountedWeights(asked, cost_counter()),
        CountedEvaluator(asked, cost_counter()),
    )
    assert weights.train([gates], split=True, teach=False, skip_dropout=0.5) == {"loss": 2.0}
    assert weights.qualities([gates], 4) == [0.25]
    assert weights.gate_gradients(gates, {}, 2, 0.25) == (3.0, {})
    weights.remember_teacher(B)
    weights.grow(0)
    assert evaluator.evaluate(A) == evaluator.evaluate(A) == 0.75
    assert evaluator.cost_counter.cost == SearchCost(
        macs=100 * MACS_A, training_images=0, evaluated=1
    )
    assert asked.calls == [
        ("train", [gates], True, False, 0.5),
        ("qualities", [gates], 4),
        ("gate_gradients", gates, {}, 2, 0.25),
        ("remember_teacher", B),
        ("grow", 0),
        ("evaluate", A),
        ("evaluate", A),
    ]


def test_training_counts_three_forward_passes_of_every_path() -> None:
    found = counted()
    found.train([one_hot(A, SPACE), one_hot(B, SPACE)], split=False, teach=False, skip_dropout=0.0)
    assert found.cost.macs == 3 * 30 * (MACS_A + MACS_B) and found.cost.training_images == 60
    found.train([one_hot(A, SPACE), one_hot(B, SPACE)], split=True, teach=False, skip_dropout=0.0)
    assert found.cost.macs == 3 * 45 * (MACS_A + MACS_B) and found.cost.training_images == 90
    found.remember_teacher(B)
    found.train([one_hot(A, SPACE)], split=False, teach=True, skip_dropout=0.0)
    assert found.cost.macs == 3 * 45 * (MACS_A + MACS_B) + 3 * 30 * MACS_A + 30 * MACS_B


def test_what_is_held_out_is_passed_forward() -> None:
    found = counted()
    found.qualities([one_hot(A, SPACE), one_hot(B, SPACE)], multiple=4)
    assert found.cost.macs == 60 * (MACS_A + MACS_B)


def test_a_mixture_costs_all_that_it_executes() -> None:
    """Two options of one slot cost what the two networks cost together, less what they share."""
    key = next(choice.key for choice in SPACE.choices if len(choice.options) == 4)
    first, second = ({**A, key: option} for option in ("ir_k3_e3", "ir_k5_e6"))
    without = SPACE.decode(first).macs - next(
        op.macs for slot, op in SPACE.walk(first) if slot.key == key and op is not None
    )
    other = SPACE.decode(second).macs - without
    gates = {name: torch.as_tensor(gate) for name, gate in one_hot(first, SPACE).items()}
    gates[key] = gates[key] * 0.7
    position = next(choice for choice in SPACE.choices if choice.key == key).options.index(
        "ir_k5_e6"
    )
    mixed = {**gates, key: gates[key].clone()}
    mixed[key][position] = 0.3
    for executed, probes in ((mixed, {}), (gates, {key: [position]})):
        found = counted()
        found.gate_gradients(executed, probes, order=1, skip_dropout=0.0)
        assert found.cost.macs == 3 * 30 * (SPACE.decode(first).macs + other)
    found = counted()
    found.gate_gradients(mixed, {}, order=2, skip_dropout=0.0)
    assert found.cost.macs == 4 * 3 * 30 * (SPACE.decode(first).macs + other)


def test_an_architecture_is_judged_once_until_the_weights_change() -> None:
    found = cost_counter()
    for picks in (A, B, A):
        found.count_evaluation(picks)
    assert (found.cost.macs, found.cost.evaluated) == (100 * (MACS_A + MACS_B), 2)
    found.count_evaluation(A, images=7)  # the last ranking, on other images
    assert found.cost.macs == 107 * MACS_A + 100 * MACS_B
    other = cost_counter()
    state = found.state_dict()
    state["judged"] = state.pop("evaluated")  # as in checkpoints of before
    other.load_state_dict(state)
    assert other.cost == found.cost
    other.load_state_dict(found.state_dict())
    assert other.cost == found.cost
    Counted(found).train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    found.count_evaluation(A)
    assert found.cost.evaluated == 4


def test_cells_of_the_same_blocks_are_judged_one_by_one() -> None:
    space = nasbench201(width=0.25, resolution=8)
    texts = (
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|",
        "|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|",
    )
    one, other = (space.read(text) for text in texts)
    assert space.decode(one).blocks == space.decode(other).blocks
    found = CostCounter(space, [space], batch_size=4, evaluation_images=10)
    for picks in (one, other, one):
        found.count_evaluation(picks)
    assert found.cost.evaluated == 2


def test_a_super_net_that_grows_costs_what_it_is() -> None:
    large = SPACE.model_validate({**SPACE.model_dump(), "resolution": 2 * SPACE.resolution})
    found, macs = (
        Counted(CostCounter(large, [SPACE, large], batch_size=30, evaluation_images=100)),
        large.decode(A).macs,
    )
    found.grow(0)
    found.train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    assert found.cost.macs == 90 * MACS_A < 90 * macs
    found.grow(1)
    found.train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    assert found.cost.macs == 90 * (MACS_A + macs)
