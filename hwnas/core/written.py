"""Published networks written out stage by stage, with their width and depth
multipliers.

Sources: timm's architecture strings for MnasNet-A1 (arXiv 1807.11626), MobileNetV3
(arXiv 1905.02244), EfficientNet-Lite0..4 (tensorflow/tpu:
models/official/efficientnet/lite), EfficientNetV2-B0..B3 (arXiv 2104.00298) and
MobileNetV4-Conv (arXiv 2404.10518); TuNAS's archive for the Multi-Hardware models
(arXiv 2008.08178).

*Difference*: EfficientNetV2-B in TensorFlow pads even images on one side only ("SAME").
Here every side is padded by kernel // 2, as in all other networks and as in timm with
``pad_type=""``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hwnas.core.families import Shape
from hwnas.core.ops import DSConv, MBConv, Op
from hwnas.core.option import make_divisible, scale_width
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.space_stage import Residual


@dataclass(frozen=True)
class Written:
    """A network stage by stage. ``stages`` holds the width, the stride and the blocks
    of each, the blocks as options separated by whitespace.

    With ``se_of_input`` the hidden width of SE is a quarter of the block's input width,
    unrounded; with ``se_act`` SE has the activation of the block. With ``head_scales``
    a width multiplier above 1 also widens the head. Multipliers below
    ``fixed_stem_below`` do not change the stem (timm). ``resolution`` is the published
    height = width in pixels.
    """

    act: str
    stages: tuple[tuple[int, int, str], ...]
    residual: Residual = "matching"
    se_of_input: bool = False
    se_act: bool = False
    head_scales: bool = False
    fixed_stem_below: float = 0.0
    resolution: int = 224


def _repeated(*blocks: tuple[str, int]) -> str:
    """Options separated by whitespace, each as many times in a row as its count."""
    options = []
    for option, count in blocks:
        options += [option] * count
    return " ".join(options)


def _lite(width: float, depth: float, resolution: int) -> Written:
    """EfficientNet-Lite: no SE, ReLU6. The multipliers do not change the stem, the
    head, or the depth of the first and the last stage.
    """
    stages = (
        (16, 1, "ds_k3", 1),
        (24, 2, "ir_k3_e6", math.ceil(2 * depth)),
        (40, 2, "ir_k5_e6", math.ceil(2 * depth)),
        (80, 2, "ir_k3_e6", math.ceil(3 * depth)),
        (112, 1, "ir_k5_e6", math.ceil(3 * depth)),
        (192, 2, "ir_k5_e6", math.ceil(4 * depth)),
        (320, 1, "ir_k3_e6", 1),
    )
    sized = [
        (make_divisible(channels * width), stride, _repeated((option, count)))
        for channels, stride, option, count in stages
    ]
    return Written("relu6", ((32, 2, "cn_k3"), *sized, (1280, 1, "cn_k1")), resolution=resolution)


def _efficientnet_v2(width: float, depth: float, resolution: int) -> Written:
    """EfficientNetV2-B: fused blocks first; widths are rounded to the nearest multiple
    of 8 (half up), so unlike in other networks they may be more than 10 % narrower.
    """
    stages = (
        (16, 1, "cn_k3_skip", 1),
        (32, 2, "er_k3_e4", 2),
        (48, 2, "er_k3_e4", 2),
        (96, 2, "ir_k3_e4_se0.25", 3),
        (112, 1, "ir_k3_e6_se0.25", 5),
        (192, 2, "ir_k3_e6_se0.25", 8),
    )
    sized = [
        (scale_width(channels, width), stride, _repeated((option, math.ceil(count * depth))))
        for channels, stride, option, count in stages
    ]
    stem = (scale_width(32, width), 2, "cn_k3")
    head = (scale_width(1280, width), 1, "cn_k1")
    return Written(
        "silu", (stem, *sized, head), se_of_input=True, se_act=True, resolution=resolution
    )


_LARGE_28 = _repeated(
    ("uir_a3_k5_e4", 1),
    ("uir_a3_k3_e4", 3),
    ("uir_a3_k5_e4", 1),
    ("uir_a5_k3_e4", 5),
    ("uir_a3_k0_e4", 1),
)
_LARGE_14 = _repeated(
    ("uir_a5_k5_e4", 4),
    ("uir_a5_k0_e4", 1),
    ("uir_a5_k3_e4", 1),
    ("uir_a5_k0_e4", 2),
    ("uir_a5_k3_e4", 1),
    ("uir_a5_k5_e4", 1),
    ("uir_a5_k0_e4", 3),
)
"""The blocks of MobileNetV4-Conv-Large at 28 and 14 px."""

WRITTEN = {
    "mnasnet_a1": Written(
        "relu",
        (
            (32, 2, "cn_k3"),
            (16, 1, "ds_k3"),
            (24, 2, "ir_k3_e6 ir_k3_e6"),
            (40, 2, "ir_k5_e3_se0.25 ir_k5_e3_se0.25 ir_k5_e3_se0.25"),
            (80, 2, "ir_k3_e6 ir_k3_e6 ir_k3_e6 ir_k3_e6"),
            (112, 1, "ir_k3_e6_se0.25 ir_k3_e6_se0.25"),
            (160, 2, "ir_k5_e6_se0.25 ir_k5_e6_se0.25 ir_k5_e6_se0.25"),
            (320, 1, "ir_k3_e6"),
            (1280, 1, "cn_k1"),
        ),
        se_of_input=True,
    ),
    "mobilenet_v3_large": Written(
        "hswish",
        (
            (16, 2, "cn_k3"),
            (16, 1, "ds_k3_nre"),
            (24, 2, "ir_k3_e4_nre ir_k3_e3_nre"),
            (40, 2, "ir_k5_e3_se0.25_hsig_nre ir_k5_e3_se0.25_hsig_nre ir_k5_e3_se0.25_hsig_nre"),
            (80, 2, "ir_k3_e6 ir_k3_e2.5 ir_k3_e2.3 ir_k3_e2.3"),
            (112, 1, "ir_k3_e6_se0.25_hsig ir_k3_e6_se0.25_hsig"),
            (160, 2, "ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig"),
            (960, 1, "cn_k1"),
            (1280, 1, "hd"),
        ),
        fixed_stem_below=0.75,
    ),
    "mobilenet_v3_small": Written(
        "hswish",
        (
            (16, 2, "cn_k3"),
            (16, 2, "ds_k3_se0.25_hsig_nre"),
            (24, 2, "ir_k3_e4.5_nre ir_k3_e3.67_nre"),
            (40, 2, "ir_k5_e4_se0.25_hsig ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig"),
            (48, 1, "ir_k5_e3_se0.25_hsig ir_k5_e3_se0.25_hsig"),
            (96, 2, "ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig"),
            (576, 1, "cn_k1"),
            (1024, 1, "hd"),
        ),
        fixed_stem_below=0.75,
    ),
    "multi_avg": Written(  # the archive gives absolute sizes: e96 after 32 channels is e3
        "relu",
        (
            (32, 2, "cn_k3"),
            (32, 2, "ir_k3_e3 ir_k3_e2"),
            (64, 2, "ir_k5_e5 ir_k3_e3 ir_k3_e2 ir_k3_e3"),
            (128, 2, "ir_k5_e6 ir_k3_e3 ir_k3_e3 ir_k3_e3"),
            (160, 1, "ir_k3_e6 ir_k3_e4"),
            (192, 2, "ir_k3_e6 ir_k5_e4 ir_k5_e4 ir_k5_e4"),
            (960, 1, "cn_k1"),
            (1280, 1, "hd"),
        ),
        residual="after_first",
        head_scales=True,
    ),
    "multi_max": Written(
        "relu",
        (
            (32, 2, "cn_k3"),
            (32, 2, "ir_k3_e3"),
            (64, 2, "ir_k5_e6 ir_k3_e2 ir_k3_e2"),
            (128, 2, "ir_k5_e6 ir_k3_e4 ir_k3_e3 ir_k3_e3"),
            (128, 1, "ir_k3_e6 ir_k3_e3"),
            (160, 2, "ir_k3_e6 ir_k5_e4 ir_k3_e5 ir_k5_e4"),
            (960, 1, "cn_k1"),
            (1280, 1, "hd"),
        ),
        residual="after_first",
        head_scales=True,
    ),
    "efficientnet_lite0": _lite(1.0, 1.0, 224),
    "efficientnet_lite1": _lite(1.0, 1.1, 240),
    "efficientnet_lite2": _lite(1.1, 1.2, 260),
    "efficientnet_lite3": _lite(1.2, 1.4, 280),
    "efficientnet_lite4": _lite(1.4, 1.8, 300),
    "efficientnet_v2_b0": _efficientnet_v2(1.0, 1.0, 224),
    "efficientnet_v2_b1": _efficientnet_v2(1.0, 1.1, 240),
    "efficientnet_v2_b2": _efficientnet_v2(1.1, 1.2, 260),
    "efficientnet_v2_b3": _efficientnet_v2(1.2, 1.4, 300),
    "mobilenet_v4_conv_small": Written(
        "relu",
        (
            (32, 2, "cn_k3"),
            (32, 2, "cn_k3 cn_k1"),
            (96, 2, "cn_k3"),
            (64, 1, "cn_k1"),
            (96, 2, _repeated(("uir_a5_k5_e3", 1), ("uir_a0_k3_e2", 4), ("uir_a3_k0_e4", 1))),
            (
                128,
                2,
                "uir_a3_k3_e6 uir_a5_k5_e4 uir_a0_k5_e4 uir_a0_k5_e3 uir_a0_k3_e4 uir_a0_k3_e4",
            ),
            (960, 1, "cn_k1"),
            (1280, 1, "hd_bn"),
        ),
        fixed_stem_below=1.0,
    ),
    "mobilenet_v4_conv_medium": Written(
        "relu",
        (
            (32, 2, "cn_k3"),
            (48, 2, "er_k3_e4"),
            (80, 2, "uir_a3_k5_e4 uir_a3_k3_e2"),
            (
                160,
                2,
                (
                    "uir_a3_k5_e6 uir_a3_k3_e4 uir_a3_k3_e4 uir_a3_k5_e4 uir_a3_k3_e4 uir_a3_k0_e4"
                    " uir_a0_k0_e2 uir_a3_k0_e4"
                ),
            ),
            (
                256,
                2,
                (
                    "uir_a5_k5_e6 uir_a5_k5_e4 uir_a3_k5_e4 uir_a3_k5_e4 uir_a0_k0_e4 uir_a3_k0_e4"
                    " uir_a3_k5_e2 uir_a5_k5_e4 uir_a0_k0_e4 uir_a0_k0_e4 uir_a5_k0_e2"
                ),
            ),
            (960, 1, "cn_k1"),
            (1280, 1, "hd_bn"),
        ),
        fixed_stem_below=1.0,
    ),
    "mobilenet_v4_conv_large": Written(
        "relu",
        (
            (24, 2, "cn_k3"),
            (48, 2, "er_k3_e4"),
            (96, 2, "uir_a3_k5_e4 uir_a3_k3_e4"),
            (192, 2, _LARGE_28),
            (512, 2, _LARGE_14),
            (960, 1, "cn_k1"),
            (1280, 1, "hd_bn"),
        ),
        fixed_stem_below=1.0,
    ),
}


def widened(
    space: MacroSpace, width: float, *, first: float | None = None, last: float | None = None
) -> MacroSpace:
    """The space of a network ``width`` times as wide. ``first`` and ``last`` are the
    factors of the stem and of the layer before the classifier; see
    ``MacroSpace.scaled``.
    """
    if width == 1.0:
        return space
    return space.scaled(width, name=space.name, first=first, last=last)


def written(
    network: Written, shape: Shape, width: float, *, last: float | None = 1.0
) -> tuple[Op, ...]:
    """The blocks of a network ``width`` times as wide. ``last`` is the factor of the
    layer before the classifier; None stands for MobileNetV2's rule.
    """
    stages = []
    for channels, stride, blocks in network.stages:
        slots = tuple((option,) for option in blocks.split())
        stages.append(
            SpaceStage(widths=(channels,), stride=stride, slots=slots, residual=network.residual)
        )
    space = MacroSpace(
        name=shape["name"],
        resolution=shape["resolution"],
        in_channels=shape["in_channels"],
        classes=shape["classes"],
        act=network.act,
        stages=tuple(stages),
    )

    # None leaves the rule to ``MacroSpace.scaled``
    first = 1.0 if width < network.fixed_stem_below else None
    if network.head_scales:
        last = None
    # every slot has a single option, so there is nothing to pick
    arch = widened(space, width, first=first, last=last).decode({})
    return tuple(_with_own_se(op, network) for op in arch.blocks)


def _with_own_se(op: Op, network: Written) -> Op:
    """A block with the network's rules for SE, which options cannot express."""
    if not isinstance(op, DSConv | MBConv) or not op.se_ch:
        return op
    se_ch = op.in_ch // 4 if network.se_of_input else op.se_ch
    return replace(op, se_ch=se_ch, se_act=network.se_act)
