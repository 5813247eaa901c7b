"""Which options are open in each phase, by hand, and what the steps train."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hwnas.core.families import fbnet, mobilenet_v3_like, ofa_mobilenet_v3, proxylessnas
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.errors import SpaceError
from hwnas.search.progressive_shrinking import (
    LARGEST,
    PHASES,
    Opening,
    ProgressiveShrinking,
    ProgressiveShrinkingConfig,
    largest_picks,
    open_options,
    phases,
)
from hwnas.testing import tiny_space
from tests.search.recording import Recorder, elastic_space, run_steps

torch.set_num_threads(1)


def names(space: MacroSpace, opening: Opening, key: str) -> set[str | int]:
    """The options of choice ``key`` that are open."""
    options = {choice.key: choice.options for choice in space.choices}[key]
    return {options[i] for i in open_options(space, opening)[key]}


def test_open_options_of_an_elastic_space() -> None:
    """Once-for-all's own table: kernel {7} -> {3, 5, 7}; depth {4} -> {3, 4} -> {2, 3,
    4}; expansion {6} -> {4, 6} -> {3, 4, 6}.
    """
    space = elastic_space()
    every = {"3", "5", "7"}
    by_hand = (
        ({"7"}, {4}, {"6"}),
        (every, {4}, {"6"}),
        (every, {3, 4}, {"6"}),
        (every, {2, 3, 4}, {"6"}),
        (every, {2, 3, 4}, {"4", "6"}),
        (every, {2, 3, 4}, {"3", "4", "6"}),
    )
    for (_, _, opening), (kernels, depths, expansions) in zip(PHASES, by_hand, strict=True):
        for key in ("s1.b0", "s1.b3", "s2.b2"):
            assert names(space, opening, key) == {
                f"ir_k{kernel}_e{e}" for kernel in kernels for e in expansions
            }
        assert names(space, opening, "s1.depth") == names(space, opening, "s2.depth") == depths
        assert names(space, opening, "resolution") == {16, 24, 32}


def test_open_options_of_the_conformance_space() -> None:
    """Skips take the place of depths. A stage has at most one skip, and there are two
    expansions and two widths, so both sub-phases of depth and of expansion open the
    same options.
    """
    space = tiny_space()
    large, both = {"ir_k5_e6"}, {"ir_k3_e6", "ir_k5_e6"}
    every = {"ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6"}
    by_hand = (
        (large, large, {32}),
        (both, both, {32}),
        (both, both | {"skip"}, {32}),
        (both, both | {"skip"}, {32}),
        (every, every | {"skip"}, {24, 32}),
        (every, every | {"skip"}, {24, 32}),
    )
    for (_, _, opening), (first, later, widths) in zip(PHASES, by_hand, strict=True):
        assert names(space, opening, "s1.b0") == names(space, opening, "s3.b0") == first
        assert names(space, opening, "s1.b1") == names(space, opening, "s2.b1") == later
        assert names(space, opening, "s1.width") == widths


def test_skips_open_from_the_end_of_a_stage() -> None:
    """The last slot that can be skipped opens first, as depth 3 of 4 leaves out the
    last block; then all of them do.
    """
    slots = (("ir_k3_e3",), ("ir_k3_e3", "skip"), ("ir_k3_e3", "skip"), ("ir_k3_e3", "ir_k3_e6"))
    space = MacroSpace(
        name="skips", resolution=8, classes=2, stages=(SpaceStage(widths=(8,), slots=slots),) * 2
    )
    for stage in ("s0", "s1"):
        assert (
            names(space, LARGEST, f"{stage}.b1")
            == names(space, LARGEST, f"{stage}.b2")
            == {"ir_k3_e3"}
        )
        assert names(space, Opening(None, 2), f"{stage}.b1") == {"ir_k3_e3"}
        assert names(space, Opening(None, 2), f"{stage}.b2") == {"ir_k3_e3", "skip"}
        assert names(space, Opening(None, None), f"{stage}.b1") == {"ir_k3_e3", "skip"}


def test_options_that_do_not_form_a_grid() -> None:
    """Kinds, SE and groups open last; the largest is the widest expansion, then the
    largest kernel.
    """
    options = ("ds_k5", "ir_k3_e6", "ir_k5_e3", "ir_k3_e6_se0.25", "ir_k3_e6_g2", "ir_k3_e3_se0.25")
    space = MacroSpace(
        name="odd",
        resolution=8,
        classes=2,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3",), options)),),
    )
    assert names(space, LARGEST, "s0.b1") == {"ir_k3_e6_se0.25"}
    assert names(space, Opening(None, None), "s0.b1") == {"ir_k3_e6_se0.25"}
    assert names(space, Opening(None, None, 2), "s0.b1") == {"ir_k3_e6_se0.25", "ir_k3_e3_se0.25"}
    assert names(space, Opening(None, None, None), "s0.b1") == set(options)


@pytest.mark.parametrize(
    "space",
    [
        tiny_space(),
        elastic_space(),
        proxylessnas(),
        mobilenet_v3_like(),
        fbnet(),
        ofa_mobilenet_v3(),
    ],
    ids=lambda space: space.name,
)
def test_each_phase_opens_more_until_everything_is_open(space: MacroSpace) -> None:
    all_phases = phases(space, ProgressiveShrinkingConfig())
    assert all(
        len(all_phases[0].options[choice.key]) == 1
        for choice in space.choices
        if choice.kind != "resolution"
    )
    for before, after in pairwise(all_phases):
        assert all(set(before.options[key]) <= set(after.options[key]) for key in before.options)
        assert before.options != after.options
    assert all(
        all_phases[-1].options[choice.key] == tuple(range(len(choice.options)))
        for choice in space.choices
    )
    ops = space.decode(largest_picks(space)).ops()
    rng = np.random.default_rng(0)
    assert all(
        sum(op.params for op in ops) >= space.decode(space.sample(rng)).params for _ in range(30)
    )


def test_shares_of_the_phases() -> None:
    """All six phases have the paper's epochs. Phases that open nothing are left out,
    and sub-phases that open the same options are merged.
    """
    config = ProgressiveShrinkingConfig()
    six = phases(elastic_space(), config)
    assert [(phase.name, phase.paths, phase.share) for phase in six] == [
        ("largest", 1, 180), ("kernel", 1, 120), ("depth", 2, 25), ("depth", 2, 120), ("expansion", 4, 25), ("expansion", 4, 120),
    ]  # fmt: skip
    four = phases(tiny_space(), config)
    assert [(phase.name, phase.share) for phase in four] == [
        ("largest", 180),
        ("kernel", 120),
        ("depth", 145),
        ("expansion", 145),
    ]
    stages = (SpaceStage(widths=(8,), slots=(("cn_k3",), ("ir_k3_e3", "ir_k3_e4", "ir_k3_e6"))),)
    widths = phases(MacroSpace(name="expansions", resolution=8, classes=2, stages=stages), config)
    assert [(phase.name, phase.share) for phase in widths] == [
        ("largest", 180),
        ("expansion", 25),
        ("expansion", 120),
    ]


def test_steps_train_what_the_phase_says() -> None:
    """59 steps for the paper's 590 epochs: phases end at steps 18, 30, 32 (32.5 rounded
    to even), 44 (44.5), 47 and 59; the teacher is taken once, at 18.
    """
    space = elastic_space()
    recorder = Recorder(space)
    strategy, ctx = ProgressiveShrinking(ProgressiveShrinkingConfig()), recorder.context(59)
    strategy.setup(ctx)
    metrics = run_steps(strategy, ctx)
    assert strategy.ends == [18, 30, 32, 44, 47, 59]
    assert [len(update.index_PC) for update in recorder.updates] == [1] * 30 + [2] * 14 + [4] * 15
    assert [update.teach for update in recorder.updates] == [False] * 18 + [True] * 41
    assert not any(update.split for update in recorder.updates)
    top = {f"s{i}.b{j}": "ir_k7_e6" for i in (1, 2) for j in range(4)} | {
        "s1.depth": 4,
        "s2.depth": 4,
        "resolution": 32,
    }
    assert recorder.teachers == [(18, top)]
    number_of = np.repeat(np.arange(6), np.diff([0, *strategy.ends]))
    assert [row["phase"] for row in metrics] == number_of.tolist()
    for number, update in zip(number_of, recorder.updates, strict=True):
        for i, choice in enumerate(space.choices):
            assert set(update.index_PC[:, i]) <= set(strategy.phases[number].options[choice.key]), (
                choice.key
            )


def test_sub_networks_are_uniform_and_share_a_resolution() -> None:
    """In the last phase, every option and every resolution is equally frequent; the
    first phase has every resolution too.
    """
    space = elastic_space()
    recorder = Recorder(space)
    strategy, ctx = ProgressiveShrinking(ProgressiveShrinkingConfig()), recorder.context(3000)
    strategy.setup(ctx)
    run_steps(strategy, ctx, strategy.ends[-2], 3000)
    resolution_column = [choice.key for choice in space.choices].index("resolution")
    assert all(len(set(update.index_PC[:, resolution_column])) == 1 for update in recorder.updates)
    assert np.mean([len(set(update.index_PC[:, 0])) > 1 for update in recorder.updates]) > 0.9
    for i, choice in enumerate(space.choices):
        # the four paths of a step share one draw of the resolution
        count = len(recorder.trained) / (4 if i == resolution_column else 1)
        p = 1 / len(choice.options)
        shares = np.bincount(recorder.trained[:, i], minlength=len(choice.options)) / len(
            recorder.trained
        )
        assert np.all(np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / count)), choice.key
    recorder.updates.clear()
    run_steps(strategy, ctx, 0, 60)
    assert set(recorder.trained[:, resolution_column]) == {0, 1, 2}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_short_searches_start_with_the_largest_network(steps: int) -> None:
    """However few steps there are, the first trains the largest network, and nothing is
    taught before there is a teacher.
    """
    recorder = Recorder(elastic_space())
    strategy, ctx = ProgressiveShrinking(ProgressiveShrinkingConfig()), recorder.context(steps)
    strategy.setup(ctx)
    run_steps(strategy, ctx)
    taught = [update.teach for update in recorder.updates]
    assert not taught[0]
    assert [at for at, _ in recorder.teachers] == ([taught.index(True)] if any(taught) else [])


def test_spaces_without_anything_to_shrink_are_refused() -> None:
    strategy = ProgressiveShrinking(ProgressiveShrinkingConfig())
    stages = (SpaceStage(widths=(8, 16), slots=(("cn_k3",), ("ir_k3_e3", "ir_k3_e3_se0.25"))),)
    space = MacroSpace(name="flat", resolution=8, classes=2, stages=stages)
    with pytest.raises(
        SpaceError, match="space flat offers no choice of kernel size, depth or expansion"
    ):
        strategy.check(space)
    for slot, depths in (
        (("ir_k3_e3", "ir_k5_e3"), ()),
        (("ir_k3_e3", "ir_k3_e6"), ()),
        (("ir_k3_e3", "skip"), ()),
        (("ir_k3_e3",), (1, 2)),
    ):
        stages = (SpaceStage(widths=(8,), slots=(("cn_k3",), slot), depths=depths),)
        strategy.check(MacroSpace(name="shrinks", resolution=8, classes=2, stages=stages))
