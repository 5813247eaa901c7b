"""Small spaces that together cover every feature, and super-nets whose weights reveal a
mix-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import fbnet, mobile32, mobilenet_v3_like
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.angle import arc, moments, weights

PLAIN = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
WITH_SE = (*PLAIN, *(f"{option}_se0.25" for option in PLAIN))


def widths_space(act: str = "relu6") -> MacroSpace:
    """Searched widths from stem to head, SE, residuals wherever shapes match, and lists
    that are not full grids.
    """
    stages = (
        SpaceStage(widths=(8, 16), slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16),
            slots=(("ds_k3", "ds_k5", "ds_k3_se0.25"), ("ds_k3", "skip")),
            residual="matching",
        ),
        SpaceStage(widths=(16, 24), stride=2, slots=(WITH_SE, (*PLAIN, "skip"))),
        SpaceStage(
            widths=(16, 24),
            slots=(("ir_k3_e6_se0.25", "ir_k3_e4_se0.5", "ds_k5"), (*WITH_SE, "skip")),
            residual="matching",
        ),
        SpaceStage(widths=(24, 48), slots=(("cn_k1", "cn_k3"),)),
    )
    return MacroSpace(name="widths", resolution=10, classes=7, act=act, stages=stages)


def groups_space() -> MacroSpace:
    """Grouped and ungrouped 1 x 1 convolutions side by side, as in FBNet; a first slot
    that may be skipped.
    """
    options = ("ir_k3_e1", "ir_k3_e1_g2", "ir_k5_e3", "ir_k5_e3_g2", "skip")
    stages = (
        SpaceStage(widths=(16,), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), slots=(options,), residual="matching"),
        SpaceStage(widths=(16, 32), stride=2, slots=(options[:-1], options)),
    )
    return MacroSpace(name="groups", resolution=8, classes=5, stages=stages)


def kernels_space() -> MacroSpace:
    """A slot that changes the shape and a residual one, with three kernels and SE."""
    options = ("ir_k3_e3_se0.25", "ir_k5_e3_se0.25", "ir_k7_e3_se0.25")
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(widths=(8,), slots=(options, (*options, "skip"))),
    )
    return MacroSpace(name="kernels", resolution=8, classes=4, stages=stages)


def depths_space() -> MacroSpace:
    """Searched depths and resolutions, a pooled head and hard sigmoids: a miniature
    once-for-all, with searched widths.
    """
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16), slots=(PLAIN[:2], PLAIN, (*PLAIN, "skip"), PLAIN), depths=(1, 2, 4)
        ),
        SpaceStage(
            widths=(16,),
            stride=2,
            slots=(("ir_k5_e3_se0.25_hsig", "ir_k3_e3_se0.25_hsig"), PLAIN[:2]),
            depths=(1, 2),
        ),
        SpaceStage(widths=(24, 32), slots=(("hd",),)),
    )
    return MacroSpace(
        name="depths", resolution=12, resolutions=(8, 12), classes=6, act="hswish", stages=stages
    )


def universal_space() -> MacroSpace:
    """All four cases of the universal inverted bottleneck, fused blocks, channel
    attention, SiLU, a pooled head with BN.
    """
    cases = ("uir_a0_k0_e2", "uir_a3_k5_e4", "uir_a3_k3_e4", "uir_a5_k3_e4", "skip")
    others = (
        "er_k3_e2_nsw",
        "er_k5_e2_nsw",
        "ir_k3_e2_eca3",
        "ir_k5_e2_eca3",
        "ir_k3_e2_eca5",
        "uir_a3_k0_e2",
    )
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16),
            stride=2,
            slots=(("uir_a3_k0_e2", "uir_a0_k3_e4", "uir_a5_k3_e2"), cases, others),
        ),
        SpaceStage(widths=(24, 32), slots=(("hd_bn",),)),
    )
    return MacroSpace(name="universal", resolution=12, classes=6, act="relu", stages=stages)


def small_v3() -> MacroSpace:
    """TuNAS's MobileNetV3-like space at 32 pixels, with at most three widths each."""
    space = mobilenet_v3_like(resolution=32, classes=10, width=0.5)
    widths = {choice.key: choice.options[:3] for choice in space.choices if choice.kind == "width"}
    return space.restrict(widths)


SPACES: dict[str, Callable[[], MacroSpace]] = {
    "mobile32": lambda: mobile32(resolution=16),
    "widths": widths_space,
    "widths-hswish": lambda: widths_space("hswish"),
    "groups": groups_space,
    "depths": depths_space,
    "universal": universal_space,
    "fbnet": lambda: fbnet(resolution=32, classes=10, width=0.5),
    "mobilenet_v3_like": small_v3,
}


def supernet_of(space: MacroSpace, config: SupernetConfig | None = None) -> MacroSupernet:
    """A super-net whose BN scales and biases are not 1 and 0, so that mix-ups show."""
    generator = torch.Generator().manual_seed(3)
    supernet = MacroSupernet(space, generator, config)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        supernet.classifier.weight.normal_(0, 0.3, generator=generator)
    return supernet


def batch(space: MacroSpace, seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, space.in_channels, space.resolution, space.resolution)
    return torch.randn(shape, generator=generator), torch.randint(
        0, space.classes, (count,), generator=generator
    )


def random_picks(space: MacroSpace, count: int) -> list[Picks]:
    """All first options, all last options, and ``count`` random picks."""
    rng = np.random.default_rng(5)
    ends = [{choice.key: choice.options[end] for choice in space.choices} for end in (0, -1)]
    return [*ends, *(space.sample(rng) for _ in range(count))]


def picked_ops(space: MacroSpace, picks: Picks) -> Iterator[tuple[int, str, Op]]:
    """(slot position, option, op) of the slots that are neither skipped nor left out,
    from the space's own decoding.
    """
    blocks = iter(space.decode(picks).blocks)
    for position, slot in enumerate(space.slots):
        option = str(picks.get(slot.key, slot.options[0]))
        if option != "skip" and slot.index < int(picks.get(slot.depth_key, slot.index + 1)):
            yield position, option, next(blocks)


def shared_name(option: str, layer_name: str, kernel: int, groups: int, sharing: str) -> str:
    """The super-net's name of a layer's weights, with own weights for each kernel."""
    name = layer_name + (f"_k{kernel}" if kernel > 1 or layer_name in ("depthwise", "conv") else "")
    name += f"_g{groups}" if groups > 1 and layer_name not in ("depthwise", "start") else ""
    name = name.replace(".", "_")
    return name if sharing == "collapsed" else f"{option.replace('.', '_')}|{name}"


def angle(initial: nn.Module, trained: nn.Module) -> float:
    """The angle between the convolutions and linear layers of two networks of the same
    architecture.
    """
    return arc(moments(zip(weights(initial), weights(trained), strict=True)))  # type: ignore[arg-type]
