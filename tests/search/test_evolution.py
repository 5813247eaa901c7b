"""Evolution against exhaustive search, and its operators by their frequencies."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hwnas.config import Plugin
from hwnas.core.limits import Limits, ParamsLimit
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError
from hwnas.progress import Progress, ProgressBar
from hwnas.search.evolution import Evolution, EvolutionConfig, _crosses
from hwnas.search.finder import Leaderboard
from hwnas.search.proposal import is_feasible
from hwnas.testing import KnownWeights, Problem
from tests.search.recording import Recorder, elastic_space

torch.set_num_threads(1)

SMALL = EvolutionConfig(generations=12, population=10, parents=5, mutations=5, crossovers=5)


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_with_about_half_the_evaluations_of_exhaustive_search(seed: int) -> None:
    """Finds the known optimum under the budget by evaluating at most 120 of the 222
    architectures that meet it.
    """
    problem = Problem(seed)
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx = problem.context(1)
    ctx.evaluator, ctx.rng = recorder, np.random.default_rng(seed)
    assert Evolution(SMALL).find(ctx, 3)[0] == problem.best
    assert len(recorder.evaluated) <= 10 + 11 * 10
    assert is_feasible(ctx, problem.index_NC).sum() == 222


def test_evaluates_only_distinct_architectures_within_the_budget() -> None:
    """In a space with depths, where picks of omitted blocks make no difference. The
    proposals are sorted by reward, best first.
    """
    space = elastic_space()
    recorder = Recorder(space, lambda picks: zlib.crc32(repr(picks).encode()) / 2**32)
    ctx = recorder.context(tolerance=0.05)
    proposals = Evolution(EvolutionConfig(generations=6)).find(ctx, 20)
    names = [space.decode(picks).blocks for picks in recorder.evaluated]
    assert len(set(names)) == len(names) == 6 * 50
    assert np.all(is_feasible(ctx, np.array([space.index(picks) for picks in recorder.evaluated])))
    rewards = [
        ctx.reward(recorder.quality(picks), ctx.cost_model.cost(picks))
        for picks in recorder.evaluated
    ]
    order = np.argsort(-np.array(rewards), kind="stable")[:20]
    assert proposals == [recorder.evaluated[i] for i in order]


def test_later_generations_are_better() -> None:
    """Selection works: the mean quality of the last generation is far above that of the
    random first one.
    """
    space = elastic_space()
    recorder = Recorder(
        space, lambda picks: sum(str(option).startswith("ir_k5") for option in picks.values()) / 8
    )
    Evolution(EvolutionConfig(generations=10)).find(recorder.context(tolerance=0.1), 1)
    quality_N = np.array([recorder.quality(picks) for picks in recorder.evaluated])
    assert quality_N[-50:].mean() > quality_N[:50].mean() + 0.25


def test_limits_hold_in_addition_to_the_target() -> None:
    """Architectures at the target with more parameters than the median are never
    evaluated.
    """
    problem = Problem(0)
    ctx = problem.context(1)
    within_NC = problem.index_NC[is_feasible(ctx, problem.index_NC)]
    max_params = int(
        np.median([problem.space.decode(problem.space.at(row)).params for row in within_NC])
    )
    ctx.limits = Limits(
        problem.space, [ParamsLimit(kind="params", max_params=max_params)], LatencyTable.load
    )
    recorder = Recorder(problem.space, KnownWeights(problem).evaluate)
    ctx.evaluator = recorder
    proposals = Evolution(SMALL).find(ctx, 5)
    assert len(proposals) == 5
    assert max(problem.space.decode(picks).params for picks in recorder.evaluated) <= max_params
    feasible_NC = within_NC[ctx.limits.feasible(within_NC)]
    rewards = [
        ctx.reward(recorder.quality(p), ctx.cost_model.cost(p))
        for p in map(problem.space.at, feasible_NC)
    ]
    assert ctx.reward(
        recorder.quality(proposals[0]), ctx.cost_model.cost(proposals[0])
    ) == pytest.approx(max(rewards))


def test_needs_only_an_evaluator_of_a_trained_super_net() -> None:
    """No weights to train, no steps: only an evaluator."""
    problem = Problem(1)
    ctx = problem.context(0)
    ctx.weights = None
    assert Evolution(SMALL).find(ctx, 2)[0] == problem.best


def test_ends_if_few_or_no_architectures_meet_the_budget() -> None:
    problem = Problem(0)
    ctx = problem.context(1)
    ctx.target = 1.01 * problem.cost.range()[0]
    count = int(is_feasible(ctx, problem.index_NC).sum())
    assert 1 <= count < 20
    proposals = Evolution(SMALL).find(ctx, 50)
    assert len(proposals) == count
    ctx.target = 0.5 * problem.cost.range()[0]
    assert Evolution(SMALL).find(ctx, 5) == []


def test_mutation_redraws_each_choice_with_its_probability() -> None:
    """P(changed) = p (1 - 1 / n) for n options; the resolution may have its own
    probability.
    """
    space = elastic_space()
    ctx = Recorder(space).context()
    parents_PC = np.array([space.index(space.sample(np.random.default_rng(i))) for i in range(3)])
    count = 6000
    for config, p_resolution in (
        (EvolutionConfig(mutation_probability=0.2), 0.2),
        (EvolutionConfig(mutation_probability=0.2, resolution_mutation_probability=0.5), 0.5),
    ):
        mutants_NC = Evolution(config)._mutants(ctx, parents_PC[:1], count)
        for i, choice in enumerate(space.choices):
            p = (p_resolution if choice.kind == "resolution" else 0.2) * (
                1 - 1 / len(choice.options)
            )
            changed = np.mean(mutants_NC[:, i] != parents_PC[0, i])
            # within four standard errors
            assert abs(changed - p) < 4 * np.sqrt(p * (1 - p) / count), choice.key


def test_crossover_takes_each_choice_from_one_of_two_parents() -> None:
    space = elastic_space()
    ctx = Recorder(space).context()
    parents_PC = np.array(
        [[0] * len(space.choices), [1] * len(space.choices), [2] * len(space.choices)]
    )
    children_NC = _crosses(ctx, parents_PC, 3000)
    assert max(len(set(row)) for row in children_NC.tolist()) == 2
    for option in range(3):
        assert abs(np.mean(children_NC == option) - 1 / 3) < 0.02
    mixed = [row for row in children_NC if len(set(row.tolist())) == 2]
    # both parents are the same one a third of the time
    assert abs(len(mixed) / 3000 - 2 / 3) < 4 * np.sqrt(2 / 9 / 3000)


def test_a_leaderboard_identifies_architectures_not_picks() -> None:
    """Two slots can be skipped. Skipping one or the other gives the same architecture,
    which is evaluated once.
    """
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",), ("ir_k3_e3", "skip"), ("ir_k3_e3", "skip"))),
    )
    space = MacroSpace(name="twice", resolution=8, classes=2, stages=stages)
    recorder = Recorder(space)
    board = Leaderboard(recorder.context(), ProgressBar())
    first, second = {"s0.b1": "skip", "s0.b2": "ir_k3_e3"}, {"s0.b1": "ir_k3_e3", "s0.b2": "skip"}
    assert board.evaluate(first) is board.evaluate(second)
    assert recorder.evaluated == [first]
    assert board.best(5) == [first]


def test_the_progress_bar_counts_evaluations() -> None:
    class Counting(Progress):
        totals: list[int]
        done = 0

        @contextmanager
        def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
            counting = self

            class Bar(ProgressBar):
                def advance(self, steps: int = 1, note: str = "") -> None:
                    counting.done += steps
                    assert note.startswith("best reward 0.5")

            self.totals = [*getattr(self, "totals", []), total]
            yield Bar()

    recorder = Recorder(elastic_space())
    ctx = recorder.context(tolerance=0.1)
    ctx.progress = Counting()
    ctx.objective = ctx.objective.model_copy(update={"beta": 0.0})
    Evolution(SMALL).find(ctx, 1)
    assert ctx.progress.totals == [120]
    assert ctx.progress.done == len(recorder.evaluated) == 120


def test_the_defaults_match_the_paper_and_ofas_options_are_accepted() -> None:
    config = EvolutionConfig()
    assert (config.generations, config.population, config.parents) == (20, 50, 10)
    assert (config.mutations, config.crossovers, config.mutation_probability) == (25, 25, 0.1)
    ofa = {
        "generations": 501,
        "population": 100,
        "parents": 25,
        "mutations": 50,
        "crossovers": 50,
        "resolution_mutation_probability": 0.5,
    }
    assert Plugin(name="evolution", **ofa).options(EvolutionConfig).population == 100  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'population'"):
        Plugin(name="evolution", populaton=3).options(EvolutionConfig)  # type: ignore[call-arg]
