"""Strict fairness, checked exactly by counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwnas.core.families import fairnas
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.search.fairnas import FairNAS, FairNASConfig, fair_paths
from hwnas.testing import tiny_space
from tests.search.recording import Recorder, elastic_space, run_steps

torch.set_num_threads(1)


def counts_of(paths_index: np.ndarray, options: int) -> list[int]:
    return np.bincount(paths_index, minlength=options).tolist()  # type: ignore[no-any-return]


def test_equal_counts_of_options_follow_the_paper_exactly() -> None:
    """FairNAS's own space: 19 layers of 6 options; every step is 6 paths, and each
    option is on exactly one of them.
    """
    space = fairnas()
    assert {len(choice.options) for choice in space.choices} == {6}
    assert len(space.choices) == 19
    rng = np.random.default_rng(0)
    for _ in range(20):
        paths = np.array([space.index(picks) for picks in fair_paths(space, rng)])
        assert paths.shape == (6, 19)
        assert all(counts_of(paths[:, i], 6) == [1] * 6 for i in range(19))


@pytest.mark.parametrize("space", [tiny_space(), elastic_space()], ids=["tiny", "elastic"])
def test_with_unequal_counts_of_options_trainings_differ_by_at_most_one(space: MacroSpace) -> None:
    """There are as many paths as the largest choice has options; in every step, a
    choice with fewer options spreads them over the paths as evenly as possible.
    """
    path_count = max(len(choice.options) for choice in space.choices)
    rng = np.random.default_rng(0)
    for _ in range(50):
        paths = np.array([space.index(picks) for picks in fair_paths(space, rng)])
        assert len(paths) == path_count
        for i, choice in enumerate(space.choices):
            counts = counts_of(paths[:, i], len(choice.options))
            assert min(counts) >= path_count // len(choice.options)
            assert max(counts) - min(counts) <= 1


def test_in_the_long_run_every_option_is_trained_twice_equally_often() -> None:
    """Of 4 options on 5 paths, one is trained twice: each of the four equally often."""
    space, steps = tiny_space(), 2000
    rng = np.random.default_rng(1)
    index = np.array(
        [[space.index(picks)[0] for picks in fair_paths(space, rng)] for _ in range(steps)]
    )
    twice = np.array([np.bincount(row, minlength=4).argmax() for row in index])
    shares = np.bincount(twice, minlength=4) / steps
    # within four standard errors
    assert np.all(np.abs(shares - 0.25) < 4 * np.sqrt(0.25 * 0.75 / steps))


def test_choices_are_permuted_independently() -> None:
    """Every pair of options of two choices is on 1 / 9 of the paths."""
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5", "cn_k7"), ("cn_k3", "cn_k5", "cn_k7"))),
    )
    space = MacroSpace(name="pairs", resolution=8, classes=2, stages=stages)
    rng, steps = np.random.default_rng(2), 1500
    index_NC = np.array(
        [space.index(picks) for _ in range(steps) for picks in fair_paths(space, rng)]
    )
    pairs = np.bincount(3 * index_NC[:, 0] + index_NC[:, 1], minlength=9) / (3 * steps)
    assert np.all(np.abs(pairs - 1 / 9) < 0.02)


def test_a_step_is_one_update_on_one_batch() -> None:
    """The gradients of the paths are summed on the same batch, which is not split, and
    every step has new permutations.
    """
    recorder = Recorder(tiny_space())
    strategy, ctx = FairNAS(FairNASConfig()), recorder.context(12)
    strategy.setup(ctx)
    metrics = run_steps(strategy, ctx)
    assert len(recorder.updates) == 12
    assert all(
        len(update.index_PC) == 5 and not update.split and not update.teach
        for update in recorder.updates
    )
    assert len({update.index_PC.tobytes() for update in recorder.updates}) == 12
    latency = [ctx.cost_model.costs(update.index_PC).mean() for update in recorder.updates]
    assert [row["latency_ms"] for row in metrics] == pytest.approx(latency)
