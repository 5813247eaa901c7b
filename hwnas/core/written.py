"""Published networks written out stage by stage, and how width and depth multipliers change them.

Sources: timm's architecture strings for MnasNet-A1 (arXiv 1807.11626), MobileNetV3
(arXiv 1905.02244), EfficientNet-Lite0..4 (tensorflow/tpu:
models/official/efficientnet/lite), EfficientNetV2-B0..B3 (arXiv 2104.00298) and
MobileNetV4-Conv (arXiv 2404.10518); TuNAS's archive for the Multi-Hardware models
(arXiv 2008.08178).

*Differences*: EfficientNetV2-B in TensorFlow pads an even image on one side only
("SAME"); here as everywhere every side is padded by kernel // 2, as timm does with
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
    """A network stage by stage: width, stride, blocks.

    ``se_of_input`` takes SE's hidden width from a block's input, unrounded, and
    ``se_act`` its activation from the block. ``head_scales`` says that a width
    multiplier above 1 widens the head, too; multipliers smaller than
    ``fixed_stem_below`` leave the stem as it is (timm). ``resolution`` is what it was
    published at.
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
    """Options with how often each follows itself."""
    return " ".join(option for option, count in blocks for _ in range(count))


def _lite(width: float, depth: float, resolution: int) -> Written:
    """EfficientNet-Lite: stem, head, and the depths of the first and the last stage
    stay as they are; no SE, ReLU6.
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
    """EfficientNetV2-B: fused blocks first; widths are rounded to the nearest multiple of 8."""
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
    ends = (scale_width(32, width), 2, "cn_k3"), (scale_width(1280, width), 1, "cn_k1")
    return Written(
        "silu", (ends[0], *sized, ends[1]), se_of_input=True, se_act=True, resolution=resolution
    )


_LARGE_28 = (("a3_k5", 1), ("a3_k3", 3), ("a3_k5", 1), ("a5_k3", 5), ("a3_k0", 1))
_LARGE_14 = (
    ("a5_k5", 4),
    ("a5_k0", 1),
    ("a5_k3", 1),
    ("a5_k0", 2),
    ("a5_k3", 1),
    ("a5_k5", 1),
    ("a5_k0", 3),
)
"""MobileNetV4-Conv-Large at 28 and 14 px: blocks with an expansion of 4, and how often
each follows itself.
"""

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
            (192, 2, _repeated(*((f"uir_{block}_e4", count) for block, count in _LARGE_28))),
            (512, 2, _repeated(*((f"uir_{block}_e4", count) for block, count in _LARGE_14))),
            (960, 1, "cn_k1"),
            (1280, 1, "hd_bn"),
        ),
        fixed_stem_below=1.0,
    ),
}


def widened(
    space: MacroSpace, width: float, *, first: float | None = None, last: float | None = None
) -> MacroSpace:
    """The space of a network ``width`` times as wide; ``first`` and ``last`` for the
    stem and the layer before the classifier.
    """
    return space if width == 1.0 else space.scaled(width, name=space.name, first=first, last=last)


def written(
    network: Written, shape: Shape, width: float, *, last: float | None = 1.0
) -> tuple[Op, ...]:
    """The blocks of a network at a shape, ``width`` times as wide, its last layer
    ``last`` times.
    """
    stages = tuple(
        SpaceStage(
            widths=(channels,),
            stride=stride,
            slots=tuple((option,) for option in blocks.split()),
            residual=network.residual,
        )
        for channels, stride, blocks in network.stages
    )
    space = MacroSpace(
        name=shape["name"],
        resolution=shape["resolution"],
        in_channels=shape["in_channels"],
        classes=shape["classes"],
        act=network.act,
        stages=stages,
    )
    first = 1.0 if width < network.fixed_stem_below else None
    ops = (
        widened(space, width, first=first, last=None if network.head_scales else last)
        .decode({})
        .blocks
    )
    return tuple(
        _squeezed(op, network) if isinstance(op, DSConv | MBConv) and op.se_ch else op for op in ops
    )


def _squeezed(op: DSConv | MBConv, network: Written) -> Op:
    return replace(
        op, se_ch=op.in_ch // 4 if network.se_of_input else op.se_ch, se_act=network.se_act
    )
