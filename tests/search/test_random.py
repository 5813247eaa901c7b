"""Random search with standalone networks, and the random finder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.errors import TargetError
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.random import (
    RandomFinder,
    RandomFinderConfig,
    RandomStandalone,
    RandomStandaloneConfig,
)
from hwnas.testing import KnownWeights, Problem, tiny_space
from tests.search.recording import Recorder, run_steps

torch.set_num_threads(1)


def standalone(recorder: Recorder, steps: int, trainings: int, seed: int = 0) -> RandomStandalone:
    strategy, ctx = (
        RandomStandalone(RandomStandaloneConfig(trainings=trainings)),
        recorder.context(steps),
    )
    ctx.rng = np.random.default_rng(seed)
    strategy.setup(ctx)
    return strategy


def test_the_networks_are_drawn_from_the_seed_within_the_budget() -> None:
    recorder = Recorder(tiny_space())
    strategy = standalone(recorder, 10, 6)
    index_NC = np.array([recorder.space.index(picks) for picks in strategy.standalone])
    assert len(np.unique(index_NC, axis=0)) == 6
    assert np.all(is_feasible(recorder.context(), index_NC))
    assert standalone(recorder, 10, 6).standalone == strategy.standalone
    assert standalone(recorder, 10, 6, seed=1).standalone != strategy.standalone


def test_networks_take_turns_at_equal_cost() -> None:
    """With 26 steps and 8 networks, step t trains network t mod 8: each 3 or 4 times,
    from the start of the schedule to its end.
    """
    recorder = Recorder(tiny_space())
    strategy = standalone(recorder, 26, 8)
    ctx = recorder.context(26)
    metrics = run_steps(strategy, ctx)
    turns = [strategy.standalone.index(recorder.space.at(row)) for row in recorder.trained]
    assert turns == [t % 8 for t in range(26)]
    assert all(len(update.index_PC) == 1 for update in recorder.updates)
    assert [row["latency_ms"] for row in metrics] == pytest.approx(
        [ctx.cost_model.cost(strategy.standalone[turn]) for turn in turns]
    )


def test_proposes_its_own_networks_best_first() -> None:
    """Ranked by reward; only trained networks are evaluated and proposed."""
    problem = Problem(0)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    strategy, ctx = standalone(recorder, 10, 8), recorder.context(10)
    proposals = strategy.propose(ctx, 5)
    assert recorder.evaluated == strategy.standalone
    rewards = [
        ctx.reward(recorder.quality(picks), ctx.cost_model.cost(picks))
        for picks in strategy.standalone
    ]
    assert proposals == [
        strategy.standalone[i] for i in np.argsort(-np.array(rewards), kind="stable")[:5]
    ]


def test_the_state_holds_the_networks(tmp_path: Path) -> None:
    """Even if it is loaded into a strategy that drew others: the weights on disk belong
    to the networks of the state.
    """
    recorder = Recorder(tiny_space())
    strategy, restored = standalone(recorder, 10, 5), standalone(recorder, 10, 5, seed=1)
    torch.save(strategy.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.standalone == strategy.standalone


def test_the_state_of_the_previous_release_is_read() -> None:
    strategy = standalone(Recorder(tiny_space()), 10, 5)
    restored = RandomStandalone(strategy.config)
    restored.load_state_dict({"alone": strategy.state_dict()["standalone"]})
    assert restored.standalone == strategy.standalone


def test_fewer_networks_if_fewer_meet_the_budget_and_an_error_if_none_do() -> None:
    problem = Problem(0)
    ctx = problem.context(10)
    ctx.target = 1.01 * problem.cost.range()[0]
    count = int(is_feasible(ctx, problem.index_NC).sum())
    strategy = RandomStandalone(RandomStandaloneConfig(trainings=30))
    strategy.setup(ctx)
    assert len(strategy.standalone) == count < 30
    run_steps(strategy, ctx)
    ctx.target = 0.5 * problem.cost.range()[0]
    with pytest.raises(TargetError, match=r"space tiny within 0.02 of .* raise search.tolerance"):
        strategy.setup(ctx)


def test_the_finder_is_best_of_n() -> None:
    """The best by reward of the n that ``sample_feasible`` draws; if n is the number of
    all architectures within the budget, the optimum.
    """
    problem = Problem(2)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx = problem.context(0)
    ctx.weights, ctx.evaluator, ctx.rng = None, recorder, np.random.default_rng(5)
    proposals = RandomFinder(RandomFinderConfig(architectures=30)).find(ctx, 4)
    drawn = sample_feasible(ctx, 30, np.random.default_rng(5))
    assert recorder.evaluated == drawn
    rewards = [ctx.reward(recorder.quality(picks), ctx.cost_model.cost(picks)) for picks in drawn]
    assert proposals == [drawn[i] for i in np.argsort(-np.array(rewards), kind="stable")[:4]]
    assert RandomFinder(RandomFinderConfig(architectures=222)).find(ctx, 1) == [problem.best]
