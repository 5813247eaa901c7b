"""Cost models: indexed terms, expectations and ranges, each against a slower
computation of the same number.
"""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.cost import CostModel, latency_ms, missing_ops
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SearchSpace, SpaceStage
from hwnas.core.spaces import mobile32, proxylessnas
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.errors import CoverageError, TableError, TargetError
from hwnas.testing import synthetic_table

THOUSAND = settings(deadline=None, derandomize=True, max_examples=1000)
CALIBRATION = Calibration(intercept_ms=0.7, slope=1.25, cache_miss_ms_per_mparam=0.4, networks=12)


def elastic() -> MacroSpace:
    """A space with every width searched, stem and head included, both kinds of residual
    and a fixed skip.
    """
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "skip")
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3", "cn_k5"),)),
        SpaceStage(
            widths=(8, 16, 24), slots=(options[:3], options, ("skip",)), residual="matching"
        ),
        SpaceStage(widths=(16, 24), stride=2, slots=(options[:3], options, ("ir_k3_e4_se0.25",))),
        SpaceStage(widths=(32, 48), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="elastic", resolution=32, classes=10, stages=stages)


def small() -> MacroSpace:
    """A space that is small enough to enumerate, with coupled widths."""
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16, 24),
            slots=(("ir_k3_e3", "ir_k5_e3"), ("ir_k3_e6", "skip")),
            residual="matching",
        ),
        SpaceStage(widths=(16, 24), stride=2, slots=(("ir_k3_e3", "ir_k5_e6"),)),
        SpaceStage(widths=(32, 40), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="small", resolution=16, classes=4, stages=stages)


def open_() -> MacroSpace:
    """A space with searched blocks, widths, depths and resolutions."""
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6")
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16, 24), slots=(options, options, (*options, "skip")), depths=(1, 2, 3)
        ),
        SpaceStage(
            widths=(24,), stride=2, slots=(options[:2], options, options[:2]), depths=(2, 3)
        ),
        SpaceStage(widths=(32, 48), slots=(("cn_k1",),)),
    )
    return MacroSpace(
        name="open", resolution=32, resolutions=(16, 24, 32), classes=10, stages=stages
    )


def entry_ms(op: Op) -> float:
    """A latency without any structure: only the right op has it."""
    return 0.05 + int.from_bytes(hashlib.sha256(op.key.encode()).digest()[:4]) / 2**32


def table_of(space: SearchSpace, calibration: Calibration | None = CALIBRATION) -> LatencyTable:
    unknown = "unknown"
    header = TableHeader(
        device="made-up", cpu=unknown, machine=unknown, runtime="litert", runtime_version=unknown, dtype="fp32", threads=1, cores=(0,),
        governor=unknown, layout="nhwc", batch=1, date=unknown, space=space.name,
    )  # fmt: skip
    return LatencyTable(
        header=header,
        entries={op.key: Entry(ms=entry_ms(op)) for op in space.ops},
        calibration=calibration,
    )


@cache
def cost_model(name: str) -> CostModel:
    space = {
        "proxylessnas": proxylessnas,
        "mobile32": mobile32,
        "elastic": elastic,
        "small": small,
        "open": open_,
    }[name]()
    return CostModel.of_table(space, table_of(space))


def every_index(space: SearchSpace) -> np.ndarray:
    return np.array(list(product(*(range(len(choice.options)) for choice in space.choices))))


def random_gates(space: SearchSpace, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {choice.key: rng.dirichlet(np.ones(len(choice.options))) for choice in space.choices}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["proxylessnas", "mobile32", "elastic", "open"])
def test_indexed_terms_add_up_to_the_sum_over_the_architectures_ops(name: str) -> None:
    cost = cost_model(name)
    space = cost.space

    @THOUSAND
    @given(st.tuples(*(st.integers(0, len(choice.options) - 1) for choice in space.choices)))
    def check(index: tuple[int, ...]) -> None:
        arch = space.decode(space.at(index))
        walked = 0.7 + sum(1.25 * entry_ms(op) + 0.4 * op.params / 1e6 for op in arch.ops())
        assert cost.cost(space.at(index)) == pytest.approx(walked, abs=1e-9)
        assert latency_ms(arch, cost.table) == pytest.approx(walked, abs=1e-9)

    check()


@pytest.mark.parametrize("name", ["proxylessnas", "elastic", "open"])
def test_a_batch_costs_what_its_members_cost(name: str) -> None:
    cost, rng = cost_model(name), np.random.default_rng(0)
    index_NC = np.stack(
        [rng.integers(len(choice.options), size=100) for choice in cost.space.choices], axis=1
    )
    single = [cost.cost(cost.space.at(index)) for index in index_NC]
    assert cost.costs(index_NC) == pytest.approx(np.array(single), abs=1e-12)
    assert cost.costs(index_NC[:0]).shape == (0,)


def test_the_expectation_is_the_weighted_sum_over_all_architectures() -> None:
    cost = cost_model("small")
    index_NC = every_index(cost.space)
    assert len(index_NC) == cost.space.size == 192
    for seed in range(20):
        gates = random_gates(cost.space, np.random.default_rng(seed))
        weight_N = np.prod(
            [gates[choice.key][index_NC[:, i]] for i, choice in enumerate(cost.space.choices)],
            axis=0,
        )
        expected = float(weight_N @ cost.costs(index_NC))
        assert float(cost.expected(gates)) == pytest.approx(expected, rel=1e-12)
        tensors = {key: torch.tensor(gate) for key, gate in gates.items()}
        assert float(cost.expected(tensors, torch)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["proxylessnas", "elastic", "open"])
def test_the_expectation_is_the_mean_of_samples(name: str) -> None:
    cost, rng = cost_model(name), np.random.default_rng(7)
    gates = random_gates(cost.space, rng)
    index_NC = np.stack([rng.choice(len(p), size=100_000, p=p) for p in gates.values()], axis=1)
    latencies_ms = cost.costs(index_NC)
    error = abs(latencies_ms.mean() - float(cost.expected(gates)))
    # within four standard errors of the mean
    assert error < 4 * latencies_ms.std() / np.sqrt(len(latencies_ms))


def test_the_expectation_of_a_certain_pick_is_its_latency() -> None:
    cost = cost_model("elastic")
    for seed in range(20):
        picks = cost.space.sample(np.random.default_rng(seed))
        gates = {
            choice.key: np.eye(len(choice.options))[choice.options.index(picks[choice.key])]
            for choice in cost.space.choices
        }
        assert float(cost.expected(gates)) == pytest.approx(cost.cost(picks), rel=1e-12)


@pytest.mark.parametrize("name", ["elastic", "small", "open"])
def test_the_gradient_of_the_expectation_matches_finite_differences(name: str) -> None:
    torch.set_num_threads(1)
    cost = cost_model(name)
    keys = [choice.key for choice in cost.space.choices]
    generator = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(
            len(choice.options), dtype=torch.float64, generator=generator, requires_grad=True
        )
        for choice in cost.space.choices
    ]

    def expectation(*logits: torch.Tensor) -> torch.Tensor:
        return cost.expected(
            {key: logit.softmax(0) for key, logit in zip(keys, logits, strict=True)}, torch
        )

    assert torch.autograd.gradcheck(expectation, logits, eps=1e-6, atol=1e-7)
    expectation(*logits).backward()
    assert all(logit.grad is not None and logit.grad.abs().max() > 1e-4 for logit in logits)


@pytest.mark.parametrize("name", ["proxylessnas", "elastic", "open"])
def test_marginals_are_the_gradient_of_the_expectation(name: str) -> None:
    cost = cost_model(name)
    gates = random_gates(cost.space, np.random.default_rng(3))
    leaves = {key: torch.tensor(gate, requires_grad=True) for key, gate in gates.items()}
    cost.expected(leaves, torch).backward()
    marginal_ms = cost.marginals(gates)
    assert list(marginal_ms) == [choice.key for choice in cost.space.choices]
    for key, leaf in leaves.items():
        assert marginal_ms[key] == pytest.approx(leaf.grad.numpy(), rel=1e-12)
        for i in range(len(leaf)):
            moved = {**gates, key: gates[key] + 1e-6 * np.eye(len(leaf))[i]}
            slope = (float(cost.expected(moved)) - float(cost.expected(gates))) / 1e-6
            assert marginal_ms[key][i] == pytest.approx(slope, abs=1e-6)


def test_precisions_can_be_mixed_between_calls() -> None:
    cost = cost_model("small")
    gates = random_gates(cost.space, np.random.default_rng(0))
    expected = float(cost.expected(gates))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float64, 1e-12)):
        expectation = cost.expected(
            {key: torch.tensor(gate, dtype=dtype) for key, gate in gates.items()}, torch
        )
        assert expectation.dtype == dtype
        assert float(expectation) == pytest.approx(expected, rel=tolerance)


def test_the_range_is_that_of_all_architectures() -> None:
    space = small()
    restricted = [
        space,
        space.restrict({"s1.b1": ["skip"]}),
        space.restrict({"s1.width": [24], "s0.width": [8]}),
        space.restrict({"s1.b0": ["ir_k5_e3"]}),
    ]
    for searched in [
        *restricted,
        elastic().restrict(
            {"s1.width": [8, 24], "s2.b0": ["ir_k3_e3"], "s1.b0": ["ir_k3_e3", "ir_k5_e3"]}
        ),
    ]:
        cost = CostModel.of_table(searched, table_of(searched))
        latencies_ms = cost.costs(every_index(searched))
        assert cost.range() == pytest.approx((latencies_ms.min(), latencies_ms.max()), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_the_range_is_that_of_all_architectures_in_random_spaces(data: st.DataObject) -> None:
    widths = st.lists(st.sampled_from((8, 16, 24)), min_size=1, max_size=2, unique=True).map(tuple)
    blocks = st.lists(
        st.sampled_from(("ir_k3_e3", "ir_k5_e3", "ds_k3")), min_size=1, max_size=2, unique=True
    ).map(tuple)
    stages = []
    for _ in range(data.draw(st.integers(1, 4))):
        slots = (
            (data.draw(blocks), (*data.draw(blocks), "skip"))
            if data.draw(st.booleans())
            else (data.draw(blocks),)
        )
        stages.append(
            SpaceStage(
                widths=data.draw(widths),
                slots=slots,
                residual=data.draw(st.sampled_from(("after_first", "matching"))),
            )
        )
    space = MacroSpace(name="any", resolution=8, classes=3, stages=tuple(stages))
    cost = CostModel.of_table(space, table_of(space))
    latencies_ms = cost.costs(every_index(space)) if space.choices else np.array([cost.cost({})])
    assert cost.range() == pytest.approx((latencies_ms.min(), latencies_ms.max()), abs=1e-12)


def test_a_space_with_one_architecture_has_one_cost() -> None:
    space = small()
    picks = space.sample(np.random.default_rng(0))
    single = space.restrict({key: [option] for key, option in picks.items()})
    cost = CostModel.of_table(single, table_of(space))
    expected = cost_model("small").cost(picks)
    assert cost.range() == pytest.approx((expected, expected))
    assert cost.cost({}) == pytest.approx(expected)
    assert float(cost.expected({})) == pytest.approx(expected)


def test_missing_ops_are_named_and_never_guessed() -> None:
    space = small()
    table = table_of(space)
    lacking = [space.ops[2], space.ops[5]]
    entries = {
        key: entry for key, entry in table.entries.items() if key not in {op.key for op in lacking}
    }
    table = table.model_copy(update={"entries": entries})
    assert missing_ops(space.ops, table) == tuple(op.key for op in lacking)
    with pytest.raises(
        CoverageError,
        match=(
            f"lacks 2 of the {len(space.ops)} ops of space small: {lacking[0].key},"
            f" {lacking[1].key}\\."
        ),
    ) as caught:
        CostModel.of_table(space, table)
    assert caught.value.missing == tuple(op.key for op in lacking)
    arch = next(
        arch
        for arch in map(space.decode, map(space.at, every_index(space)))
        if lacking[0] in arch.ops()
    )
    with pytest.raises(
        CoverageError, match=f"lacks .* of architecture 'small-sample': {lacking[0].key}"
    ):
        latency_ms(arch, table)
    covered = next(
        arch
        for arch in map(space.decode, map(space.at, every_index(space)))
        if not set(lacking) & set(arch.ops())
    )
    uncalibrated = table.model_copy(update={"calibration": None})
    assert latency_ms(covered, uncalibrated) == pytest.approx(
        sum(entry_ms(op) for op in covered.ops())
    )


def test_a_long_list_of_missing_ops_is_truncated_in_the_message_but_not_in_the_error() -> None:
    with pytest.raises(CoverageError, match=r" and \d+ more\. Profile this space") as caught:
        CostModel.of_table(proxylessnas(), table_of(small()))
    assert len(caught.value.missing) == 72  # all ops of proxylessnas


def test_a_table_without_a_calibration_is_refused_unless_allowed() -> None:
    space = small()
    raw = table_of(space, calibration=None)
    with pytest.raises(
        TableError,
        match=r"made-up/litert-fp32-1t has no calibration .* search\.allow_uncalibrated = true",
    ):
        CostModel.of_table(space, raw)
    picks = space.sample(np.random.default_rng(0))
    plain = CostModel.of_table(space, raw, allow_uncalibrated=True).cost(picks)
    assert plain == pytest.approx(sum(entry_ms(op) for op in space.decode(picks).ops()))
    assert cost_model("small").cost(picks) == pytest.approx(
        0.7 + 1.25 * plain + 0.4 * space.decode(picks).params / 1e6
    )


def test_a_target_out_of_reach_is_answered_with_the_range() -> None:
    cost = cost_model("small")
    low, high = cost.range()
    for target_ms in (low * 0.99, high * 1.01):
        with pytest.raises(TargetError) as caught:
            cost.check_target(target_ms)
        assert f"{low:.4g} to {high:.4g} ms" in str(caught.value)
        assert f"target {target_ms:g} ms" in str(caught.value)
    for target_ms in (low, (low + high) / 2, high):
        cost.check_target(target_ms)


def test_a_table_of_slots_does_not_cover_widths() -> None:
    space = small()
    table = table_of(space).model_copy(
        update={"entries": {}, "slots": {"s1.b0": {"ir_k3_e3": 1.0, "ir_k5_e3": 2.0}}}
    )
    with pytest.raises(CoverageError, match="lacks slot costs of space small") as caught:
        CostModel.of_table(space, table)
    assert "s0.width" in caught.value.missing


def test_the_slope_of_a_positional_table_scales_its_slots() -> None:
    """The cost is intercept + slope * (the sum over slots)."""
    options = ("ir_k3_e3", "ir_k5_e6", "skip")
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), slots=(("ir_k3_e3",), options, options)),
    )
    space = MacroSpace(name="small", resolution=16, classes=4, stages=stages)
    rng = np.random.default_rng(0)
    slots = {
        choice.key: {str(option): float(rng.uniform(1, 2)) for option in choice.options}
        for choice in space.choices
    }
    header = synthetic_table(space).header
    calibration = Calibration(intercept_ms=3.0, slope=2.0, networks=5)
    table = LatencyTable(header=header, entries={}, slots=slots, calibration=calibration)
    cost = CostModel.of_table(space, table)
    for _ in range(5):
        picks = space.sample(rng)
        total = sum(slots[key][str(option)] for key, option in picks.items())
        assert cost.cost(picks) == pytest.approx(3.0 + 2.0 * total)
