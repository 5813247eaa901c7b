"""P-DARTS's stages, drops, dropout schedule and skip limit against the paper's numbers
and worked examples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hwnas.config import Plugin
from hwnas.core.cost import CostModel
from hwnas.core.limits import Limits, MacsLimit
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError
from hwnas.search import STRATEGIES
from hwnas.search.pdarts import PDARTS, PDARTSConfig, kept_count
from hwnas.search.skips import with_few_skips
from hwnas.search.strategy import Gates, Metrics, SearchContext
from hwnas.testing import KnownWeights, Problem, proposed, searched, synthetic_table

torch.set_num_threads(1)


class LoggedWeights(KnownWeights):
    """Known weights that log the gates and the dropout of every training step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.gates: list[Gates] = []
        self.dropout: list[float] = []

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        self.gates += [
            {key: np.asarray(gate).copy() for key, gate in path_gates.items()}
            for path_gates in gates
        ]
        self.dropout.append(skip_dropout)
        return super().train(gates, split=split, teach=teach, skip_dropout=skip_dropout)


def skippy_space() -> MacroSpace:
    """Six slots, five of which can be skipped."""
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k7_e6", "skip")
    return MacroSpace(
        name="skippy",
        resolution=16,
        classes=10,
        stages=(
            SpaceStage(widths=(8,), slots=(("cn_k3",),)),
            SpaceStage(widths=(16,), slots=(options[:3], *[options] * 5)),
        ),
    )


def context_of(space: MacroSpace, target_ms: float, tolerance: float = 0.02) -> SearchContext:
    ctx = Problem(0).context(10)
    ctx.space, ctx.cost_model, ctx.target, ctx.tolerance = (
        space,
        CostModel.of_table(space, synthetic_table(space)),
        target_ms,
        tolerance,
    )
    return ctx


def set_alphas(strategy: PDARTS, logits: dict[str, list[float]]) -> None:
    with torch.no_grad():
        for key, values in logits.items():
            strategy.alphas.values[key].copy_(torch.tensor(values))


def skips_of(picks: dict[str, object]) -> int:
    return sum(option == "skip" for option in picks.values())


def test_counts_of_kept_options() -> None:
    """The paper's 8 -> 5 -> 3, and the same fractions of other numbers of options."""
    parts = PDARTSConfig().keep
    assert [[kept_count(n, part) for part in parts] for n in (8, 7, 5, 4, 3, 2)] == [
        [8, 5, 3], [7, 4, 3], [5, 3, 2], [4, 3, 2], [3, 2, 1], [2, 1, 1],
    ]  # fmt: skip


def test_dropout_schedule() -> None:
    """Rate 0.7 in epochs 0, 9, 10, 15 and 24 of 25: 0.7 * 24/25, 0.7 * 15/25, 0.7, 0.7
    exp(-1), 0.7 exp(-2.8).
    """
    strategy = PDARTS(PDARTSConfig())
    rates = [strategy.skip_dropout(2, epoch / 25) for epoch in (0, 9, 10, 15, 24)]
    assert np.allclose(rates, [0.672, 0.42, 0.7, 0.7 * math.exp(-1), 0.7 * math.exp(-2.8)])
    assert strategy.skip_dropout(0, 0.2) == 0.0
    assert strategy.skip_dropout(1, 0.4) == pytest.approx(0.4)


def test_the_defaults_match_the_paper() -> None:
    strategy = PDARTS(PDARTSConfig())
    strategy.setup(Problem(0).context(10))
    (group,) = strategy.alphas.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (6e-4, (0.5, 0.999), 1e-3)
    assert (strategy.config.warmup, strategy.config.order, strategy.config.dropout) == (
        10 / 25,
        1,
        (0.0, 0.4, 0.7),
    )
    assert STRATEGIES.get("pdarts") is PDARTS


def test_a_search_in_stages() -> None:
    """75 steps: 25 per stage, of which 10 train only the weights. The gate of a dropped
    option stays 0, and alpha starts again in every stage.
    """
    problem = Problem(3)
    ctx = problem.context(75)
    ctx.weights = weights = LoggedWeights(problem)
    strategy = PDARTS(PDARTSConfig(alpha_lr=0.05, latency_weight=0.1))
    strategy.setup(ctx)
    metrics = searched(strategy, ctx, 3)
    assert ["held_out_loss" in row for row in metrics] == 3 * (10 * [False] + 15 * [True])
    assert np.allclose(weights.dropout[25:35], 0.4 * np.arange(24, 14, -1) / 25)
    assert np.allclose(weights.dropout[60:75], 0.7 * np.exp(-0.2 * np.arange(15)))
    for choice in ctx.space.choices:
        alive = [np.flatnonzero(gates[choice.key]) for gates in weights.gates]
        counts = [
            kept_count(len(choice.options), part) if choice.kind == "op" else len(choice.options)
            for part in (1.0, 5 / 8, 3 / 8)
        ]
        assert [len(options) for options in alive] == [count for count in counts for _ in range(25)]
        for boundary in (25, 50):
            before, after = (
                weights.gates[boundary - 1][choice.key],
                weights.gates[boundary][choice.key],
            )
            kept = np.flatnonzero(after)
            assert set(kept) == set(np.argsort(-before)[: len(kept)]), "the lowest are dropped"
            assert np.ptp(after[kept]) < 3e-3, "alpha starts near uniform again"
            assert np.ptp(before[np.flatnonzero(before)]) > 0.01, "alpha had moved before"


def test_stages_of_unequal_steps() -> None:
    """Every step is in one stage, and the completed fraction of a stage starts at 0."""
    ctx = Problem(0).context(10)
    strategy = PDARTS(PDARTSConfig())
    positions = []
    for ctx.step in range(10):
        positions.append(strategy.position(ctx))
    assert [stage for stage, _ in positions] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(0 <= fraction < 1 for _, fraction in positions)
    assert [fraction for _, fraction in positions][:4] == [0.0, 0.3, 0.6, 0.9]


def test_resumes_on_either_side_of_a_boundary() -> None:
    """Stages change before steps 20 and 40."""
    problem = Problem(0)

    def fresh() -> tuple[PDARTS, SearchContext]:
        strategy, ctx = PDARTS(PDARTSConfig(alpha_lr=0.05)), problem.context(60)
        strategy.setup(ctx)
        return strategy, ctx

    straight, ctx = fresh()
    metrics = searched(straight, ctx, 1)
    for stop in (19, 20, 21, 40, 41):
        early, early_ctx = fresh()
        searched(early, early_ctx, 1, 0, stop)
        late, late_ctx = fresh()
        late.load_state_dict(copy.deepcopy(early.state_dict()))
        assert searched(late, late_ctx, 1, stop) == metrics[stop:]
        assert proposed(late, late_ctx, 1, 6) == proposed(straight, ctx, 1, 6)


def test_the_weakest_skips_are_replaced_by_the_next_best_option() -> None:
    """Skip leads in four of five slots, and two may stay: 0.7 and 0.6 do, 0.5 and 0.4
    are deleted.
    """
    space = skippy_space()
    policy = {
        "s1.b0": np.array([0.5, 0.3, 0.2]),
        "s1.b1": np.array([0.1, 0.2, 0.1, 0.6]),
        "s1.b2": np.array([0.1, 0.3, 0.1, 0.5]),
        "s1.b3": np.array([0.1, 0.1, 0.1, 0.7]),
        "s1.b4": np.array([0.3, 0.1, 0.2, 0.4]),
        "s1.b5": np.array([0.5, 0.0, 0.2, 0.3]),
    }
    limited = with_few_skips(space, policy, 2)
    assert [int(limited[key].argmax()) for key in policy] == [0, 3, 1, 3, 0, 0]
    assert np.allclose(limited["s1.b2"], [0.2, 0.6, 0.2, 0.0])
    assert np.allclose(limited["s1.b5"], policy["s1.b5"]), (
        "a skip that does not lead may still be drawn"
    )
    assert all(np.array_equal(limited[key], policy[key]) for key in ("s1.b0", "s1.b1", "s1.b3"))
    assert all(
        np.array_equal(p, with_few_skips(space, policy, 4)[key]) for key, p in policy.items()
    )
    only_skip = {**policy, "s1.b4": np.array([0.0, 0.0, 0.0, 1.0])}
    assert np.allclose(with_few_skips(space, only_skip, 0)["s1.b4"], [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(("max_skips", "most"), [(None, 2), (0, 0), (1, 1), (5, 3)])
def test_proposals_keep_to_the_skip_limit(max_skips: int | None, most: int) -> None:
    """Although alpha favours more: 3, if 5 are allowed. The default is a quarter of the
    five slots that can be skipped, rounded up.
    """
    space = skippy_space()
    low, high = CostModel.of_table(space, synthetic_table(space)).range()
    ctx = context_of(space, low + 0.3 * (high - low), 0.05)
    strategy = PDARTS(PDARTSConfig(max_skips=max_skips))
    strategy.setup(ctx)
    set_alphas(strategy, {f"s1.b{i}": [0.0, 0.0, 0.0, 2.0 + 0.1 * i] for i in range(1, 6)})
    proposals = proposed(strategy, ctx, 0, 8)
    assert len(proposals) == 8
    assert max(skips_of(picks) for picks in proposals) == most
    for picks in proposals:
        assert abs(ctx.cost_model.cost(picks) / ctx.target - 1) <= ctx.tolerance


def test_the_budget_comes_before_the_skip_limit() -> None:
    """Only architectures with four or five skips are that fast; they are proposed
    rather than none.
    """
    space = skippy_space()
    ctx = context_of(space, CostModel.of_table(space, synthetic_table(space)).range()[0])
    strategy = PDARTS(PDARTSConfig(max_skips=1))
    strategy.setup(ctx)
    proposals = proposed(strategy, ctx, 0, 4)
    assert proposals
    assert min(skips_of(picks) for picks in proposals) > 1


def test_the_budget_comes_before_the_drops() -> None:
    """With only the fastest options kept, a slow target still gets proposals within its
    tolerance.
    """
    problem = Problem(0)
    ctx = problem.context(9)
    ctx.target = 0.97 * problem.cost.range()[1]
    strategy = PDARTS(PDARTSConfig())
    strategy.setup(ctx)
    for choice in ctx.space.choices:
        strategy.alphas.kept[choice.key] = torch.arange(len(choice.options)) == 0
    proposals = proposed(strategy, ctx, 0, 4)
    assert proposals
    for picks in proposals:
        assert abs(problem.cost.cost(picks) / ctx.target - 1) <= ctx.tolerance


def test_the_other_limits_still_hold() -> None:
    problem = Problem(0)
    ctx = problem.context(9)
    most = int(np.median([problem.space.decode(picks).macs for picks in proposed_by(ctx)]))
    ctx.limits = Limits(problem.space, [MacsLimit(kind="macs", max_macs=most)], LatencyTable.load)
    proposals = proposed_by(ctx)
    assert proposals
    assert all(problem.space.decode(picks).macs <= most for picks in proposals)


def proposed_by(ctx: SearchContext) -> list[dict[str, str | int]]:
    strategy = PDARTS(PDARTSConfig())
    strategy.setup(ctx)
    return proposed(strategy, ctx, 0, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": (1.0, 0.5)}, "dropout has 3 rates but keep has 2 fractions"),
        ({"keep": (0.5, 0.7, 0.2)}, "must start with 1, never increase"),
        ({"keep": (1.0, 0.5, 0.0)}, "stay above 0"),
        ({"dropout": (0.0, 0.5, 1.0)}, "below 1"),
    ],
)
def test_invalid_options_are_refused_and_valid_ones_accepted(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Plugin(name="pdarts", **options).options(PDARTS.Config)  # type: ignore[arg-type]
    assert Plugin(name="pdarts", keep=(1.0, 0.5), dropout=(0.0, 0.3)).options(
        PDARTS.Config
    ).keep == (
        1.0,
        0.5,
    )  # type: ignore[call-arg]
