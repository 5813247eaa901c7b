"""Shrinking by hand: the angle of two layers, means over children, sampling, and which
operators are dropped and which are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import ShrinkConfig, SupernetConfig
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import darts, nasbench_macro
from hwnas.errors import ConfigError, SpaceError
from hwnas.nn.supernet import MacroSupernet
from hwnas.search import SHRINK_METRICS
from hwnas.search.angle import Angles, arc, moments
from hwnas.search.shrinking import (
    Angle,
    Magnitude,
    MetricContext,
    Random,
    operator_means,
    operators,
    remove_operators,
    sample_children,
    select_drops,
    shrinkable,
)
from tests.nn.nets import angle, random_picks, widths_space
from tests.search.staging import elastic_digits_space


def two_layers() -> MacroSpace:
    """A 1 x 1 or a 3 x 3 convolution of one channel, and a classifier."""
    return MacroSpace(
        name="two",
        resolution=4,
        in_channels=1,
        classes=2,
        stages=(SpaceStage(widths=(1,), slots=(("cn_k1", "cn_k3"),)),),
    )


def test_the_angle_of_two_layers_by_hand() -> None:
    """V0 = (3; 0, 4), V = (4; 0, 3): <V0, V> = 24, and both norms are 5. With the other
    option, V0 and V are parallel.
    """
    space = two_layers()
    initial, trained = (
        MacroSupernet(space, torch.Generator().manual_seed(0), SupernetConfig(sharing="separate"))
        for _ in range(2)
    )
    with torch.no_grad():
        for supernet, conv, linear in ((initial, 3.0, 4.0), (trained, 4.0, 3.0)):
            layers: Any = supernet.slots[0].copies
            for name, layer in layers[0].items():
                layer.conv.weight.fill_(conv if name.startswith("cn_k1") else 0.0)
            supernet.classifier.weight.copy_(torch.tensor([[0.0], [linear]]))
            supernet.classifier.bias.fill_(100 * conv)  # biases do not count
    angles = Angles(initial, trained)
    assert angles.of({"s0.b0": "cn_k1"}) == pytest.approx(math.acos(24 / 25))
    assert angles.of({"s0.b0": "cn_k3"}) == 0.0


@pytest.mark.slow
def test_kept_moments_give_the_angle_of_the_extracted_networks() -> None:
    for space, config in (
        (widths_space(), {"sharing": "collapsed"}),
        (elastic_digits_space(), {"sharing": "separate", "operation_on": "op"}),
    ):
        initial, trained = (
            MacroSupernet(space, torch.Generator().manual_seed(seed), SupernetConfig(**config))
            for seed in (0, 1)
        )
        angles = Angles(initial, trained)
        for picks in random_picks(space, 8):
            a, b = initial.extract(picks), trained.extract(picks)
            assert angles.of(picks) == pytest.approx(angle(a, b), abs=1e-12)  # type: ignore[arg-type]


def test_an_angle_without_weights_is_nan() -> None:
    assert math.isnan(arc(moments([(torch.zeros(3), torch.ones(3))])))
    assert arc(moments([(torch.ones(2), -torch.ones(2))])) == pytest.approx(math.pi)


SPACE = elastic_digits_space().restrict(
    {
        "s1.b0": ["ir_k3_e3"],
        "s1.b1": ["ir_k3_e3", "ir_k5_e3", "skip"],
        "s1.b2": ["ir_k3_e3", "skip"],
    }
)
FIXED: dict[str, Any] = {"s0.width": 8, "s2.width": 24}


def child(first: str, second: str) -> dict[str, Any]:
    return {**FIXED, "s1.b1": first, "s1.b2": second}


def test_operator_scores_by_hand() -> None:
    children = [child("ir_k3_e3", "skip"), child("ir_k3_e3", "ir_k3_e3"), child("skip", "skip")]
    assert operator_means(SPACE, children, [1.0, 2.0, 6.0]) == {
        ("s1.b1", "ir_k3_e3"): 1.5, ("s1.b1", "skip"): 6.0, ("s1.b2", "ir_k3_e3"): 2.0, ("s1.b2", "skip"): 3.5,
    }  # fmt: skip


def test_widths_are_not_operators() -> None:
    assert [choice.key for choice in shrinkable(SPACE)] == ["s1.b1", "s1.b2"]
    assert len(operators(nasbench_macro())) == 24


A, B, C, D, E = (
    ("s1.b1", "ir_k3_e3"),
    ("s1.b1", "ir_k5_e3"),
    ("s1.b1", "skip"),
    ("s1.b2", "ir_k3_e3"),
    ("s1.b2", "skip"),
)
SCORES = {A: 1.0, B: 2.0, C: 3.0, D: 5.0, E: 4.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dropped": 1}, [A]),
        ({"dropped": 2}, [A, B]),
        ({"dropped": 3}, [A, B, E]),  # a choice keeps its last option
        ({"dropped": 9}, [A, B, E]),
        ({"dropped": 9, "keep": 2}, [A]),
        ({"drop": "each", "dropped": 1}, [A, E]),
        ({"drop": "each", "keep": 2}, [A]),
    ],
)
def test_the_lowest_are_dropped_but_never_the_last_of_a_choice(
    settings: dict[str, Any], expected: list[Any]
) -> None:
    assert select_drops(SPACE, SCORES, ShrinkConfig(**settings)) == expected


def test_operators_without_a_score_are_kept() -> None:
    assert select_drops(SPACE, {C: 1.0, E: 2.0}, ShrinkConfig(dropped=5)) == [C, E]


def test_the_remaining_space_is_a_document_of_its_own() -> None:
    left = remove_operators(SPACE, [A, E], "left")
    assert isinstance(left, MacroSpace)
    assert MacroSpace.parse(left.to_json()).sha256 == left.sha256 != SPACE.sha256
    assert {choice.key: choice.options for choice in left.choices if choice.kind == "op"} == {
        "s1.b1": ("ir_k5_e3", "skip")
    }
    assert left.slots[3].options == ("ir_k3_e3",)
    assert left.size == 2 * 2 * 2


@pytest.mark.parametrize("sampling", ["architectures", "depths"])
def test_children_differ_and_every_operator_is_in_enough_of_them(sampling: Any) -> None:
    space = nasbench_macro()
    children = sample_children(space, ShrinkConfig(sampling=sampling), 20, np.random.default_rng(0))
    # one child counts for several of the 24 operators
    assert len({tuple(picks.items()) for picks in children}) == len(children) < 24 * 20 / 4
    for choice in space.choices:
        counts = Counter(picks[choice.key] for picks in children)
        assert all(counts[option] >= 20 for option in choice.options)


def test_a_small_space_is_sampled_completely() -> None:
    children = sample_children(SPACE, ShrinkConfig(), 1000, np.random.default_rng(0))
    assert len({tuple(sorted(picks.items())) for picks in children}) == len(children) == SPACE.size


def test_depths_are_sampled_uniformly() -> None:
    """Of five slots that offer skip, 0 to 5 skip equally often; uniform architectures
    rarely skip many.
    """
    space, shares = nasbench_macro(), {}
    for sampling in ("depths", "architectures"):
        children = sample_children(
            space, ShrinkConfig(sampling=sampling), 400, np.random.default_rng(0)
        )  # type: ignore[arg-type]
        counts = Counter(sum(option == "skip" for option in picks.values()) for picks in children)
        shares[sampling] = [counts[depth] / len(children) for depth in range(6)]
    assert shares["depths"][5] > 4 * shares["architectures"][5]
    assert min(shares["depths"][:5]) > 0.1


def test_children_are_within_the_limit() -> None:
    space = nasbench_macro()
    macs = [
        space.decode(picks).macs
        for picks in sample_children(
            space, ShrinkConfig(max_macs=60e6), 20, np.random.default_rng(0)
        )
    ]
    assert len(macs) > 40 and max(macs) <= 60e6
    with pytest.raises(
        SpaceError, match=r"no architecture .* within shrink\.max_macs = 1e\+06 was found: raise it"
    ):
        sample_children(space, ShrinkConfig(max_macs=1e6), 20, np.random.default_rng(0))


def test_metrics_that_need_no_children() -> None:
    rng = np.random.default_rng(3)
    alphas = {operator: float(i) for i, operator in enumerate(operators(SPACE))} | {
        ("s0.width", "8"): -1.0
    }
    context = MetricContext(SPACE, rng, alphas=alphas)
    assert Magnitude().scores(context) == {
        operator: float(i) for i, operator in enumerate(operators(SPACE))
    }
    scores = Random().scores(context)
    assert list(scores) == operators(SPACE) and len(set(scores.values())) == 5


def test_the_angle_of_an_operator_is_the_mean_over_its_children() -> None:
    initial, trained = (
        MacroSupernet(
            SPACE, torch.Generator().manual_seed(seed), SupernetConfig(sharing="separate")
        )
        for seed in (0, 1)
    )
    children = [child("ir_k3_e3", "skip"), child("skip", "skip"), child("ir_k5_e3", "ir_k3_e3")]
    scores = Angle().scores(
        MetricContext(SPACE, np.random.default_rng(0), children, initial, trained)
    )
    angles = [angle(initial.extract(picks), trained.extract(picks)) for picks in children]  # type: ignore[arg-type]
    assert scores["s1.b2", "skip"] == pytest.approx((angles[0] + angles[1]) / 2)
    assert scores["s1.b1", "ir_k5_e3"] == pytest.approx(angles[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["angle", "angle"]}, "'angle' twice"),
        ({"operation_on": ["edge", "node"]}, "only go from node to edge to op"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShrinkConfig(**settings)


def test_an_unknown_metric_is_reported_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'angel'; did you mean 'angle'"):
        SHRINK_METRICS.get("angel")


def test_an_operator_counts_only_where_its_edge_is_kept() -> None:
    """Every node of a DARTS cell keeps two edges. The options on its other edges say
    nothing about an architecture.
    """
    space = darts(channels=4, layers=5, resolution=8).restrict(
        {"normal.n3.inputs": ["0+1"], "normal.n5.inputs": ["0+1", "3+4"]}
    )
    config = ShrinkConfig(samples=2)
    children = sample_children(space, config, 2, np.random.default_rng(0))
    kept = [picks for picks in children if picks["normal.n5.inputs"] == "3+4"]
    assert 0 < len(kept) < len(children)
    for option in {str(picks["normal.e3-5"]) for picks in children}:
        with_option = [picks for picks in kept if picks["normal.e3-5"] == option]
        assert len(with_option) >= 2
        means = operator_means(space, children, [float(picks in with_option) for picks in children])
        assert means["normal.e3-5", option] == 1.0
    assert ("normal.e2-3", "none") not in operator_means(space, children, [0.0] * len(children))
