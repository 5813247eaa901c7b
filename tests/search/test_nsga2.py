"""NSGA-II against exhaustive search, its constraints by hand, and its good behaviour
towards Optuna's other users.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from hwnas.core.limits import Limits, MacsLimit, ParamsLimit
from hwnas.core.table import LatencyTable
from hwnas.search.nsga2 import NSGA2, NSGA2Config, _excess
from hwnas.search.proposal import is_feasible
from hwnas.testing import KnownWeights, Problem
from tests.search.recording import Recorder

torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_finds_the_optimum_with_fewer_evaluations_than_exhaustive_search(seed: int) -> None:
    """Finds the known optimum under the budget by evaluating fewer than two thirds of
    the 222 architectures that meet it.
    """
    problem = Problem(seed)
    ctx = problem.context(1)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx.evaluator, ctx.rng = recorder, np.random.default_rng(seed)
    assert NSGA2(NSGA2Config()).find(ctx, 3)[0] == problem.best
    assert len(recorder.evaluated) < 2 / 3 * 222


def test_evaluates_each_architecture_once_within_the_budget_and_ranks_by_reward() -> None:
    problem = Problem(0)
    ctx = problem.context(0)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx.weights, ctx.evaluator = None, recorder  # an already trained super-net
    proposals = NSGA2(NSGA2Config(generations=5)).find(ctx, 1000)
    index_NC = np.array([problem.space.index(picks) for picks in recorder.evaluated])
    assert np.all(is_feasible(ctx, index_NC))
    assert len(np.unique(index_NC, axis=0)) == len(index_NC) == len(proposals)
    rewards = [
        ctx.reward(recorder.quality(picks), ctx.cost_model.cost(picks)) for picks in proposals
    ]
    assert rewards == sorted(rewards, reverse=True)


@pytest.mark.slow
def test_evolves_beyond_the_first_generation() -> None:
    """More than the 50 random architectures are evaluated, and the best of the later
    ones beats the best of the random ones.
    """
    problem = Problem(1)
    ctx = problem.context(1)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx.evaluator = recorder
    NSGA2(NSGA2Config(generations=20)).find(ctx, 1)
    quality = [recorder.quality(picks) for picks in recorder.evaluated]
    assert len(quality) > 60
    assert max(quality[50:]) > max(quality[:50])


def test_constraints_by_hand() -> None:
    """|T / T0 - 1| - tolerance, and value / maximum - 1 of each limit."""
    problem = Problem(0)
    ctx = problem.context(1)
    picks = problem.space.sample(np.random.default_rng(0))
    arch, latency = problem.space.decode(picks), problem.cost.cost(picks)
    limits = [
        MacsLimit(kind="macs", max_macs=2 * arch.macs),
        ParamsLimit(kind="params", max_params=arch.params // 2),
    ]
    index_NC = problem.space.index(picks)[None]
    assert _excess(ctx, index_NC) == pytest.approx({"target": abs(latency / ctx.target - 1) - 0.02})
    ctx.limits = Limits(problem.space, limits, LatencyTable.load)
    ctx.target = latency / 1.01
    assert _excess(ctx, index_NC) == pytest.approx(
        {"target": -0.01, "limit 0": -0.5, "limit 1": 1.0}, rel=1e-4
    )


@pytest.mark.slow
def test_meeting_the_constraints_dominates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna's front contains no architecture outside the budget, even if it is faster
    and smaller.

    The budget also attracts the search: twice as many children meet it as in the same
    run that does not see it (0.11 against 0.04).
    """
    studies, create_study = [], optuna.create_study
    monkeypatch.setattr(
        optuna,
        "create_study",
        lambda **settings: studies.append(create_study(**settings)) or studies[-1],
    )

    def children_within(excess: Any) -> int:
        monkeypatch.setattr("hwnas.search.nsga2._excess", excess)
        count = 0
        for seed in range(4):
            problem = Problem(seed)
            ctx = problem.context(1)
            ctx.evaluator, ctx.rng = KnownWeights(problem), np.random.default_rng(seed)
            NSGA2(NSGA2Config(generations=8, population=20)).find(ctx, 1)
            tried, front = (
                [problem.space.index(trial.params) for trial in trials]
                for trials in (studies[-1].trials, studies[-1].best_trials)
            )
            assert bool(is_feasible(ctx, np.array(front)).all()) == (excess is _excess)
            count += int(is_feasible(ctx, np.array(tried[20:])).sum())
        return count

    # in the second run, every architecture seems to meet the budget
    assert children_within(_excess) > 2 * children_within(lambda ctx, index_NC: {"target": -1.0})


def test_limits_hold_in_addition_to_the_target() -> None:
    problem = Problem(0)
    ctx = problem.context(1)
    within_NC = problem.index_NC[is_feasible(ctx, problem.index_NC)]
    max_params = int(
        np.median([problem.space.decode(problem.space.at(row)).params for row in within_NC])
    )
    ctx.limits = Limits(
        problem.space, [ParamsLimit(kind="params", max_params=max_params)], LatencyTable.load
    )
    proposals = NSGA2(NSGA2Config(generations=5)).find(ctx, 1000)
    assert len(proposals) >= 50
    assert max(problem.space.decode(picks).params for picks in proposals) <= max_params


def test_draws_from_the_given_generator_only() -> None:
    def run(seed: int) -> list[dict[str, str | int]]:
        ctx = Problem(0).context(1)
        ctx.rng = np.random.default_rng(seed)
        return NSGA2(NSGA2Config(generations=4, population=10)).find(ctx, 20)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_budget_that_nothing_meets_gives_no_proposals() -> None:
    ctx = Problem(0).context(1)
    ctx.target = 0.5 * ctx.cost_model.range()[0]
    assert NSGA2(NSGA2Config(generations=2, population=4)).find(ctx, 5) == []


def test_is_silent_and_leaves_optunas_log_level_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            NSGA2(NSGA2Config(generations=2, population=4)).find(Problem(0).context(1), 1)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capsys.readouterr() == ("", "")


def test_more_accurate_faster_and_smaller_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna's front is that of all trials within the budget, minimising -quality,
    latency and parameters.
    """
    studies, create_study = [], optuna.create_study
    monkeypatch.setattr(
        optuna,
        "create_study",
        lambda **settings: studies.append(create_study(**settings)) or studies[-1],
    )
    problem = Problem(0)
    ctx = problem.context(1)
    ctx.tolerance = 0.3  # many architectures of very different latency and size
    NSGA2(NSGA2Config(generations=4, population=20)).find(ctx, 1)
    space = problem.space
    costs = {}
    for trial in studies[-1].trials:
        index_NC = space.index(trial.params)[None]
        if is_feasible(ctx, index_NC)[0]:
            quality = KnownWeights(problem).evaluate(trial.params)
            costs[index_NC.tobytes()] = (
                -quality,
                ctx.cost_model.cost(trial.params),
                space.decode(trial.params).params,
            )
    rows = np.array(list(costs.values()))
    dominated = [np.any(np.all(rows <= row, 1) & np.any(rows < row, 1)) for row in rows]
    front = {key for key, beaten in zip(costs, dominated, strict=True) if not beaten}
    assert {space.index(trial.params)[None].tobytes() for trial in studies[-1].best_trials} == front
    assert 3 < len(front) < len(costs) - 3
