"""SPOS's samplers, checked by their frequencies, and fair sampling, checked by
counting.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwnas.config import Plugin
from hwnas.errors import ConfigError
from hwnas.search.spos import SPOS, SPOSConfig, sampling_policy
from hwnas.testing import tiny_space
from tests.search.recording import Recorder, elastic_space, run_steps

torch.set_num_threads(1)


def trained(recorder: Recorder, steps: int, **options: object) -> SPOS:
    strategy = SPOS(SPOSConfig.model_validate(options))
    ctx = recorder.context(steps)
    strategy.setup(ctx)
    run_steps(strategy, ctx)
    return strategy


def test_a_step_is_one_update_on_one_path() -> None:
    recorder = Recorder(tiny_space())
    trained(recorder, 50)
    assert len(recorder.updates) == 50
    assert all(
        len(update.index_PC) == 1 and not update.split and not update.teach
        for update in recorder.updates
    )


@pytest.mark.parametrize("sampling", ["architectures", "decisions"])
def test_options_are_trained_with_the_frequencies_of_the_sampling(sampling: str) -> None:
    """Of 5 options with skip: 1/5 each, or 1/2 skip and 1/8 each block. Without skip
    both are uniform.
    """
    recorder, steps = Recorder(tiny_space()), 1500
    trained(recorder, steps, sampling=sampling)
    for i, choice in enumerate(recorder.space.choices):
        if "skip" in choice.options:
            p = np.array([0.2] * 5 if sampling == "architectures" else [0.125] * 4 + [0.5])
        else:
            p = np.full(len(choice.options), 1 / len(choice.options))
        shares = np.bincount(recorder.trained[:, i], minlength=len(p)) / steps
        # within four standard errors
        assert np.all(np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / steps)), choice.key


def test_decisions_of_depths_widths_and_resolutions_are_uniform() -> None:
    policy = sampling_policy(elastic_space(), "decisions")
    assert policy["s1.depth"].tolist() == policy["resolution"].tolist() == [1 / 3] * 3
    assert sampling_policy(tiny_space(), "decisions")["s1.width"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("space", [tiny_space(), elastic_space()], ids=["tiny", "elastic"])
def test_fair_sampling_trains_every_option_equally_often(space: object) -> None:
    """Steps k n to (k + 1) n - 1 train each of the n options of a choice exactly once,
    in an order that varies.
    """
    recorder = Recorder(space)  # type: ignore[arg-type]
    # 180 is a multiple of the number of options of every choice
    trained(recorder, 180, sampling="fair")
    for i, choice in enumerate(recorder.space.choices):
        rounds = recorder.trained[:, i].reshape(-1, len(choice.options))
        assert np.array_equal(
            np.sort(rounds, axis=1), np.tile(np.arange(len(choice.options)), (len(rounds), 1))
        )
        assert len(np.unique(rounds, axis=0)) > 1


def test_fair_sampling_resumes_within_a_permutation() -> None:
    """Stopped after 7 of 20 steps, in the middle of every permutation, it ends with the
    same paths.
    """
    straight, resumed = Recorder(tiny_space()), Recorder(tiny_space())
    trained(straight, 20, sampling="fair")
    ctx = resumed.context(20)
    first, second = SPOS(SPOSConfig(sampling="fair")), SPOS(SPOSConfig(sampling="fair"))
    first.setup(ctx)
    run_steps(first, ctx, 0, 7)
    state = first.state_dict()
    assert {key: len(left) for key, left in state["left"].items()}["s1.b1"] == 3
    # two more steps, which are lost and repeated
    run_steps(first, ctx, 7, 9)
    resumed.updates = resumed.updates[:7]
    second.setup(ctx)
    second.load_state_dict(state)
    run_steps(second, ctx, 7)
    assert np.array_equal(straight.trained, resumed.trained)


def test_within_budget_rejects_only_slow_paths() -> None:
    """Up to 1.1 x target: every trained path is within it, and options are as frequent
    as among all paths within it.
    """
    recorder, steps = Recorder(tiny_space()), 600
    trained(recorder, steps, within_budget=1.1)
    ctx = recorder.context(steps)
    latency_N = ctx.cost_model.costs(recorder.trained)
    assert latency_N.max() <= 1.1 * ctx.target
    assert latency_N.min() < 0.8 * ctx.target
    grid = np.stack(
        np.meshgrid(
            *(np.arange(len(choice.options)) for choice in recorder.space.choices), indexing="ij"
        ),
        -1,
    )
    below = grid.reshape(-1, len(recorder.space.choices))
    below = below[ctx.cost_model.costs(below) <= 1.1 * ctx.target]
    for i, choice in enumerate(recorder.space.choices):
        p = np.bincount(below[:, i], minlength=len(choice.options)) / len(below)
        shares = np.bincount(recorder.trained[:, i], minlength=len(choice.options)) / steps
        assert np.all(np.abs(shares - p) <= 4 * np.sqrt(p * (1 - p) / steps)), choice.key


def test_if_nothing_is_within_the_budget_fast_paths_are_trained() -> None:
    recorder = Recorder(tiny_space())
    trained(recorder, 20, within_budget=0.01)
    ctx = recorder.context(1)
    low, high = ctx.cost_model.range()
    assert np.all(ctx.cost_model.costs(recorder.trained) < low + 0.1 * (high - low))


def test_fair_sampling_refuses_within_budget() -> None:
    with pytest.raises(ConfigError, match="remove within_budget"):
        Plugin(name="spos", sampling="fair", within_budget=1.2).options(SPOSConfig)  # type: ignore[call-arg]
    assert Plugin(name="spos", generations=3).options(SPOSConfig).generations == 3  # type: ignore[call-arg]
