"""Search methods on cells: DARTS's derivation and P-DARTS's limit on skips against
worked examples, problems with known optima, and short searches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.core.arch import Architecture, Picks
from hwnas.core.cell_steps import NONE, SKIP_CONNECT
from hwnas.core.cells import CellSpace
from hwnas.core.cost import CostModel
from hwnas.core.limits import Limits
from hwnas.core.objective import AbsoluteObjective
from hwnas.core.spaces import darts, nasbench201
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError, SpaceError
from hwnas.nn.cells import GrowingSupernet
from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.genotype import all_edges, any_pair, derive_cell
from hwnas.search.pdarts import PDARTS, PDARTSConfig
from hwnas.search.result import SearchResult
from hwnas.search.skips import count_of_skips, with_few_skips
from hwnas.search.strategy import Gates, SearchContext
from hwnas.testing import KnownWeights, prepared, proposed, searched, synthetic_table
from tests.search.staging import experiment, run

torch.set_num_threads(1)
SMALL = {
    "nasbench201": nasbench201(width=0.25, resolution=8, in_channels=1),
    "darts": darts(channels=4, layers=5, resolution=8, in_channels=1),
}


def random_policy(space: CellSpace, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {choice.key: rng.dirichlet(np.ones(len(choice.options))) for choice in space.choices}


def genotype(space: CellSpace, policy: dict[str, np.ndarray], cell: str) -> dict[str, str]:
    """DARTS's own derivation: every node keeps the two edges whose best option other
    than none is the strongest. Maps each kept edge to that option.
    """
    option_of = {}
    for node in range(2, 6):
        strongest = {}
        for source in range(node):
            key = f"{cell}.e{source}-{node}"
            strongest[key] = max(
                (p, option)
                for p, option in zip(policy[key], space.edges[key], strict=True)
                if option != NONE
            )
        for key in sorted(strongest, key=lambda key: -strongest[key][0])[:2]:
            option_of[key] = strongest[key][1]
    return option_of


def kept(space: CellSpace, picks: Picks, cell: str) -> dict[str, str]:
    """The edges of a cell that ``picks`` keep, with their options."""
    return {
        key: str(picks[key])
        for key in space.edges
        if key.startswith(f"{cell}.") and space.is_kept(key, picks)
    }


def argmax(space: CellSpace, policy: dict[str, np.ndarray]) -> Picks:
    return space.at([int(policy[choice.key].argmax()) for choice in space.choices])


@pytest.mark.parametrize("seed", range(10))
def test_the_derived_cell_is_that_of_darts(seed: int) -> None:
    space, policy = SMALL["darts"], random_policy(SMALL["darts"], seed)
    picks = argmax(space, derive_cell(space, policy))
    for cell in ("normal", "reduce"):
        assert kept(space, picks, cell) == genotype(space, policy, cell)


@pytest.mark.parametrize("seed", range(10))
def test_p_darts_deletes_the_weakest_skips(seed: int) -> None:
    space, policy = SMALL["darts"], random_policy(SMALL["darts"], seed)
    skip = space.edges["normal.e0-2"].index(SKIP_CONNECT)
    for key in space.edges:
        policy[key][skip] += 1.0  # nearly all edges are skips
    # delete the weakest skip and derive the cell again, until at most two are left
    limited = {key: p.copy() for key, p in policy.items()}
    while True:
        normal = genotype(space, limited, "normal")
        skips = [key for key, option in normal.items() if option == SKIP_CONNECT]
        if len(skips) <= 2:
            break
        limited[min(skips, key=lambda key: limited[key][skip])][skip] = 0.0
    picks = argmax(space, with_few_skips(space, policy, 2))
    assert kept(space, picks, "normal") == normal
    assert count_of_skips(space).cost(picks) == 2
    # reductions are not limited
    assert kept(space, picks, "reduce") == genotype(space, policy, "reduce")
    assert list(kept(space, picks, "reduce").values()).count(SKIP_CONNECT) == 8


def test_a_derived_nasbench201_cell_may_contain_none() -> None:
    space, policy = SMALL["nasbench201"], random_policy(SMALL["nasbench201"], 0)
    policy["c.e0-1"] = np.array([0.9, 0.1, 0.0, 0.0, 0.0])
    assert argmax(space, derive_cell(space, policy))["c.e0-1"] == NONE


def test_all_edges_run_during_the_search_and_pair_probabilities_sum_to_one() -> None:
    space = SMALL["darts"]
    mixture = {
        choice.key: torch.full((len(choice.options),), 1 / len(choice.options))
        for choice in space.choices
    }
    gates, likely = all_edges(space, mixture), any_pair(space, mixture)
    for key, pairs in space.inputs.items():
        for source in {source for pair in pairs for source in pair.split("+")}:
            inside = [source in pair.split("+") for pair in pairs]
            assert float(gates[key][inside].sum()) == pytest.approx(1.0)
        assert float(likely[key].sum()) == pytest.approx(1.0)
    assert all(
        gates[choice.key] is mixture[choice.key] for choice in space.choices if choice.kind == "op"
    )


class CellProblem:
    """A cell space whose best options are known: every option of an edge adds a gain to
    the quality, and which edges are kept adds nothing.
    """

    def __init__(self, space: CellSpace, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.cost = space, CostModel.of_table(space, synthetic_table(space))
        self.gains = {
            choice.key: 0.02 * rng.random(len(choice.options)) for choice in space.choices
        }
        for choice in space.choices:
            if choice.kind == "inputs":
                self.gains[choice.key][:] = 0.0

    def quality(self, gates: Gates) -> float:
        return 0.5 + sum(
            float(np.dot(np.asarray(gates[key], dtype=float), gain))
            for key, gain in self.gains.items()
        )

    def context(self, steps: int) -> SearchContext:
        low, high = self.cost.range()
        weights = CellWeights(self)  # type: ignore[arg-type]
        limits = Limits(self.space, (), LatencyTable.load)
        return SearchContext(
            self.space,
            self.cost,
            AbsoluteObjective(),
            (low + high) / 2,
            0.99,
            steps,
            8,
            weights=weights,
            evaluator=weights,
            limits=limits,
        )


class CellWeights(KnownWeights):
    """Known weights that record which super-net the strategy grows to."""

    def __init__(self, problem: CellProblem) -> None:
        super().__init__(problem)  # type: ignore[arg-type]
        self.grown: list[int] = []

    def grow(self, number: int) -> None:
        self.grown.append(number)

    def _check(self, gates: Gates) -> None:
        assert gates.keys() == self.problem.gains.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_darts_finds_the_known_cell(name: str) -> None:
    problem = CellProblem(SMALL[name], 0)
    ctx = problem.context(150)
    strategy = DARTS(
        DARTSConfig(order=1, alpha_lr=0.1, alpha_weight_decay=0.0, latency_weight=1e-6)
    )
    prepared(strategy, ctx, 0)
    searched(strategy, ctx, 0)
    [picks, *_] = proposed(strategy, ctx, 0, 3)
    best = {
        key: problem.space.edges[key][int(gain.argmax())]
        for key, gain in problem.gains.items()
        if key in problem.space.edges
    }
    assert strategy.alphas.policy().keys() == {choice.key for choice in problem.space.choices}
    if name == "nasbench201":
        assert picks == best
        return
    for cell in ("normal", "reduce"):
        for key, option in kept(problem.space, picks, cell).items():
            # the derivation keeps no NONE, even where it is the best option
            assert option == best[key] or best[key] == NONE


def test_p_darts_grows_and_drops_as_published() -> None:
    problem = CellProblem(SMALL["darts"], 1)
    ctx = problem.context(75)  # three stages of 25 steps
    strategy = PDARTS(PDARTSConfig(alpha_lr=0.05, latency_weight=1e-6))
    prepared(strategy, ctx, 0)
    counts = []
    for step in range(75):
        searched(strategy, ctx, 0, step, step + 1)
        counts.append({int(strategy.alphas.kept[key].sum()) for key in problem.space.edges})
    assert [counts[step] for step in (0, 24, 25, 49, 50, 74)] == [{8}, {8}, {5}, {5}, {3}, {3}]
    assert ctx.weights.grown == [0] * 25 + [1] * 25 + [2] * 25  # type: ignore[union-attr]
    assert strategy.growth(problem.space) == (1, 3, 5)
    for picks in proposed(strategy, ctx, 0, 4):
        assert count_of_skips(problem.space).cost(picks) <= 2


def cell_experiment(strategy: str, **options: object):
    short = {
        "epochs": 0.08,
        "evaluation_images": 64,
        "recalibration_images": 64,
        "candidates": 2,
        "random_samples": 1,
    }
    return experiment(strategy, strategy={"name": strategy, **options}, tolerance=0.3, **short)


SHORT = {"generations": 2, "population": 4}
METHODS = {
    "spos": {**SHORT, "mutations": 2, "crossovers": 2},
    "fairnas": SHORT,
    "random": {},
    "random_standalone": {"trainings": 2},
    "darts": {"order": 1},
    "pdarts": {"cells": (1, 1, 2), "dropout": (0.0, 0.1, 0.2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_methods_search_cells(method: str, name: str, tmp_path: Path) -> None:
    space = SMALL[name].changed("cells", cells=(2, 1))
    run(
        tmp_path / "search",
        cell_experiment(method, **METHODS[method]),
        synthetic_table(space),
        space=space,
    )
    result = SearchResult.load(tmp_path / "search" / "search.json")
    arch = Architecture.load(tmp_path / "search" / "arch.json")
    assert space.encode(arch) == result.candidates[0].picks
    assert abs(result.candidates[0].predicted / result.target - 1) <= 0.3
    assert 0 <= result.candidates[0].quality <= 1


def test_methods_and_settings_for_chains_of_blocks_refuse_cells(tmp_path: Path) -> None:
    space = SMALL["nasbench201"]
    with pytest.raises(
        SpaceError,
        match=r"'tunas' is for chains of blocks.*darts, fairnas, pdarts, random",
    ):
        run(tmp_path / "search", cell_experiment("tunas"), synthetic_table(space), space=space)
    config = cell_experiment("spos", **METHODS["spos"])
    config = config.model_copy(
        update={
            "search": config.search.model_copy(
                update={"supernet": config.search.supernet.model_copy(update={"wsbn": True})}
            )
        }
    )
    with pytest.raises(ConfigError, match="wsbn"):
        run(tmp_path / "search", config, synthetic_table(space), space=space)


@pytest.mark.slow
def test_a_new_growing_super_net_is_at_its_last_stage() -> None:
    growing = GrowingSupernet(
        SMALL["darts"], torch.Generator().manual_seed(0), experiment().search.supernet, (1, 1)
    )
    # so a search resumed after its last step evaluates the super-net trained last
    assert growing.grown == 1
