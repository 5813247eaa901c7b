"""The cost of a search against sums of MACs of networks, added up by hand."""

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


class CallRecorder:
    """Weights and an evaluator that record every call."""

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
    """Counted weights that do nothing, and what they have cost."""

    def __init__(self, cost_counter: CostCounter) -> None:
        super().__init__(CallRecorder(), cost_counter)

    @property
    def cost(self) -> SearchCost:
        return self.cost_counter.cost


def cost_counter() -> CostCounter:
    return CostCounter(SPACE, [SPACE], batch_size=30, evaluation_images=100)


def counted() -> Counted:
    return Counted(cost_counter())


def test_counting_passes_every_call_on_unchanged() -> None:
    recorder, gates = CallRecorder(), one_hot(A, SPACE)
    weights, evaluator = (
        CountedWeights(recorder, cost_counter()),
        CountedEvaluator(recorder, cost_counter()),
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
    assert recorder.calls == [
        ("train", [gates], True, False, 0.5),
        ("qualities", [gates], 4),
        ("gate_gradients", gates, {}, 2, 0.25),
        ("remember_teacher", B),
        ("grow", 0),
        ("evaluate", A),
        ("evaluate", A),
    ]


def test_training_counts_three_forward_passes_of_every_path() -> None:
    weights = counted()
    weights.train(
        [one_hot(A, SPACE), one_hot(B, SPACE)], split=False, teach=False, skip_dropout=0.0
    )
    assert weights.cost.macs == 3 * 30 * (MACS_A + MACS_B) and weights.cost.training_images == 60
    weights.train([one_hot(A, SPACE), one_hot(B, SPACE)], split=True, teach=False, skip_dropout=0.0)
    assert weights.cost.macs == 3 * 45 * (MACS_A + MACS_B) and weights.cost.training_images == 90
    weights.remember_teacher(B)
    weights.train([one_hot(A, SPACE)], split=False, teach=True, skip_dropout=0.0)
    assert weights.cost.macs == 3 * 45 * (MACS_A + MACS_B) + 3 * 30 * MACS_A + 30 * MACS_B


def test_held_out_batches_count_one_forward_pass() -> None:
    weights = counted()
    weights.qualities([one_hot(A, SPACE), one_hot(B, SPACE)], multiple=4)
    assert weights.cost.macs == 60 * (MACS_A + MACS_B)


def test_a_mixture_costs_every_option_that_it_executes() -> None:
    """Two options of one slot cost what the two networks cost together, less what they
    have in common.
    """
    key = next(choice.key for choice in SPACE.choices if len(choice.options) == 4)
    first, second = ({**A, key: option} for option in ("ir_k3_e3", "ir_k5_e6"))
    common_macs = SPACE.decode(first).macs - next(
        op.macs for slot, op in SPACE.walk(first) if slot.key == key and op is not None
    )
    second_option_macs = SPACE.decode(second).macs - common_macs
    gates = {name: torch.as_tensor(gate) for name, gate in one_hot(first, SPACE).items()}
    gates[key] = gates[key] * 0.7
    position = next(choice for choice in SPACE.choices if choice.key == key).options.index(
        "ir_k5_e6"
    )
    mixed = {**gates, key: gates[key].clone()}
    mixed[key][position] = 0.3
    for executed, probes in ((mixed, {}), (gates, {key: [position]})):
        weights = counted()
        weights.gate_gradients(executed, probes, order=1, skip_dropout=0.0)
        assert weights.cost.macs == 3 * 30 * (SPACE.decode(first).macs + second_option_macs)
    weights = counted()
    weights.gate_gradients(mixed, {}, order=2, skip_dropout=0.0)
    assert weights.cost.macs == 4 * 3 * 30 * (SPACE.decode(first).macs + second_option_macs)


def test_an_evaluation_counts_once_until_the_weights_change() -> None:
    counter = cost_counter()
    for picks in (A, B, A):
        counter.count_evaluation(picks)
    assert (counter.cost.macs, counter.cost.evaluated) == (100 * (MACS_A + MACS_B), 2)
    counter.count_evaluation(A, images=7)  # the final ranking, on other images
    assert counter.cost.macs == 107 * MACS_A + 100 * MACS_B
    restored = cost_counter()
    state = counter.state_dict()
    state["judged"] = state.pop("evaluated")  # as in checkpoints of earlier versions
    restored.load_state_dict(state)
    assert restored.cost == counter.cost
    restored.load_state_dict(counter.state_dict())
    assert restored.cost == counter.cost
    Counted(counter).train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    counter.count_evaluation(A)
    assert counter.cost.evaluated == 4


def test_different_cells_of_the_same_blocks_count_separately() -> None:
    space = nasbench201(width=0.25, resolution=8)
    texts = (
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|",
        "|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|",
    )
    first, second = (space.read(text) for text in texts)
    assert space.decode(first).blocks == space.decode(second).blocks
    counter = CostCounter(space, [space], batch_size=4, evaluation_images=10)
    for picks in (first, second, first):
        counter.count_evaluation(picks)
    assert counter.cost.evaluated == 2


def test_a_growing_super_net_costs_its_current_size() -> None:
    large = SPACE.model_validate({**SPACE.model_dump(), "resolution": 2 * SPACE.resolution})
    weights, large_macs = (
        Counted(CostCounter(large, [SPACE, large], batch_size=30, evaluation_images=100)),
        large.decode(A).macs,
    )
    weights.grow(0)
    weights.train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    assert weights.cost.macs == 90 * MACS_A < 90 * large_macs
    weights.grow(1)
    weights.train([one_hot(A, SPACE)], split=False, teach=False, skip_dropout=0.0)
    assert weights.cost.macs == 90 * (MACS_A + large_macs)
