"""The space around MobileNetV4-Conv."""

from __future__ import annotations

import pytest

from hwnas.core.arch import Picks
from hwnas.core.ops import UIB, Op
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobilenet_v4, published
from hwnas.core.written import WRITTEN


def picks_of(space: MacroSpace, stages: list[tuple[int, str]]) -> Picks:
    """Picks from widths and blocks, stage by stage."""
    picks: Picks = {}
    for number, (width, blocks) in enumerate(stages):
        options = blocks.split()
        picks |= {f"s{number}.width": width, f"s{number}.depth": len(options)}
        picks |= {f"s{number}.b{i}": option for i, option in enumerate(options)}
    return {choice.key: picks.get(choice.key, choice.options[0]) for choice in space.choices}


@pytest.mark.parametrize(("name", "second"), [("small", "cn_k1"), ("medium", "skip")])
def test_small_and_medium_are_in_the_space(name: str, second: str) -> None:
    network, space = f"mobilenet_v4_conv_{name}", mobilenet_v4()
    written = [(width, blocks) for width, _, blocks in WRITTEN[network].stages]
    if name == "small":  # the convolutions at 1/8 have widths of their own
        stages = written
    else:
        stem, fused, (width, blocks), *rest = written
        first, later = blocks.split()
        stages = [stem, (fused[0], f"{fused[1]} {second}"), (width, first), (width, later), *rest]
    assert space.decode(picks_of(space, stages)).blocks == published(network).blocks


def test_the_four_cases_have_the_papers_names() -> None:
    cases = {
        key: op.case
        for key in ("b3-k5", "k5", "b3", "")
        if isinstance(op := Op.parse(uib(key)), UIB)
    }
    assert cases == {"b3-k5": "extra_dw", "k5": "inverted_bottleneck", "b3": "convnext", "": "ffn"}


def uib(kernels: str) -> str:
    return "-".join(part for part in ("uib-h14-i64-o64-m256", kernels, "relu-id") if part)


@pytest.mark.parametrize(
    ("name", "millions"), [("small", 3.77), ("medium", 9.72), ("large", 32.59)]
)
def test_parameters_match_timms_results(name: str, millions: float) -> None:
    assert round(published(f"mobilenet_v4_conv_{name}").params / 1e6, 2) == millions
