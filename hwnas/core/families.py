"""The built-in search spaces.

=========================  ==========================================================================================
``proxylessnas``           TuNAS's ``proxylessnas_search`` (Bender et al., CVPR 2020, arXiv 2008.06120)
``proxylessnas_enlarged``  TuNAS's ``proxylessnas_enlarged_search``: all widths are searched too
``mobilenet_v3_like``      TuNAS's ``mobilenet_v3_like_search``: SE, hard-swish, expansions 1 to 6, all widths
``proxylessnas_original``  ProxylessNAS's own (Cai et al., ICLR 2019, arXiv 1812.00332)
``fbnet``                  FBNet (Wu et al., CVPR 2019, arXiv 1812.03443): 22 layers of 9 blocks
``fbnet_no_expand``        the same as mobile-vision builds it: e = 1 has no expansion convolution
``fairnas``                FairNAS (Chu et al., ICCV 2021): 19 layers of 6 blocks, nothing skipped
``ofa_mobilenet_v3``       once-for-all (Cai et al., ICLR 2020): depth, kernel, expansion and resolution
``nasbench_macro``         NAS-Bench-Macro (Su et al., CVPR 2021, arXiv 2103.11922): 8 layers of 3 blocks on CIFAR-10, all trained
``mobile32``               ours, for 32-pixel images
=========================  ==========================================================================================

Every builder takes the overrides of ``Shape``; ``width`` makes all stages that many
times as wide (``MacroSpace.scaled``).

*Differences from the papers' code*: the classifier is pooling and a fully connected
layer with 1000 classes, instead of TuNAS's 1 x 1 convolution to 1001 and pooling, which
computes the same; once-for-all's last 1 x 1 convolution has a bias, as MobileNetV3's
has, and its resolutions are four instead of every fourth pixel from 128 to 224; FBNet's
``skip`` of a layer that changes the shape is the 1 x 1 convolution ``cn_k1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

from hwnas.core.option import SKIP, scale_width
from hwnas.core.space import MacroSpace, SpaceStage

KERNELS_EXPANSIONS = ("ir_k3_e3", "ir_k5_e3", "ir_k7_e3", "ir_k3_e6", "ir_k5_e6", "ir_k7_e6")
"""Inverted residuals in the order of TuNAS's model archive: index 3 * [e = 6] + kernel
index; skip is index 6.
"""

PROXYLESSNAS_FILTERS = (32, 16, 32, 40, 80, 96, 192, 320, 1280)
PROXYLESSNAS_ORIGINAL_FILTERS = (32, 16, 24, 40, 80, 96, 192, 320, 1280)
ENLARGED_FILTERS = (16, 16, 16, 32, 64, 128, 256, 512, 1024)
MOBILENET_V3_FILTERS = (16, 16, 32, 64, 128, 256, 512, 1024)
MULTIPLIERS = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of TuNAS's searched widths."""

Widths = tuple[int, ...]


class Shape(TypedDict, total=False):
    """What every built-in space may be given: its name, its input and outputs, its
    activation, and how wide it is.
    """

    name: str
    resolution: int
    in_channels: int
    classes: int
    act: str
    bn_eps: float
    width: float


def _space(
    stages: Sequence[SpaceStage],
    *,
    name: str,
    resolution: int = 224,
    in_channels: int = 3,
    classes: int = 1000,
    act: str = "relu",
    bn_eps: float = 1e-3,
    width: float = 1.0,
    resolutions: tuple[int, ...] = (),
) -> MacroSpace:
    space = MacroSpace(
        name=name,
        resolution=resolution,
        resolutions=resolutions,
        in_channels=in_channels,
        classes=classes,
        act=act,
        bn_eps=bn_eps,
        stages=tuple(stages),
    )
    return space if width == 1.0 else space.scaled(width, name=name)


def _inverted_residuals(
    widths: Sequence[Widths],
    slots: Sequence[int] = (4, 4, 4, 4, 4, 1),
    *,
    separable: Sequence[str] = ("ds_k3",),
    skippable: bool = True,
) -> list[SpaceStage]:
    """The family of ProxylessNAS: stem, separable layer, stages of inverted residuals
    with kernel {3, 5, 7} and e {3, 6}, head.
    """
    later = (*KERNELS_EXPANSIONS, SKIP) if skippable else KERNELS_EXPANSIONS
    return [
        SpaceStage(widths=widths[0], stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=widths[1], slots=(tuple(separable),)),
        *(
            SpaceStage(
                widths=width, stride=stride, slots=(KERNELS_EXPANSIONS, *[later] * (count - 1))
            )
            for width, stride, count in zip(widths[2:8], (2, 2, 2, 1, 2, 1), slots, strict=True)
        ),
        SpaceStage(widths=widths[8], slots=(("cn_k1",),)),
    ]


def _single(filters: Sequence[int]) -> list[Widths]:
    return [(width,) for width in filters]


def _searched(filters: Sequence[int]) -> list[Widths]:
    """TuNAS's choices around each width, equal ones merged."""
    return [
        tuple(dict.fromkeys(scale_width(width, multiplier) for multiplier in MULTIPLIERS))
        for width in filters
    ]


def proxylessnas(
    filters: Sequence[int] = PROXYLESSNAS_FILTERS, **shape: Unpack[Shape]
) -> MacroSpace:
    """TuNAS's ProxylessNAS space: 22 searchable slots, 15 of them skippable, 3 * 6^6 *
    7^15 architectures.

    ``filters`` are the widths of stem, separable layer, stages 2 to 7 and head.
    """
    stages = _inverted_residuals(_single(filters), separable=("ds_k3", "ds_k5", "ds_k7"))
    return _space(stages, **Shape(name="proxylessnas") | shape)


def proxylessnas_enlarged(**shape: Unpack[Shape]) -> MacroSpace:
    """TuNAS's enlarged space: the same blocks, and every width out of 4 to 7, stem and
    head included.
    """
    stages = _inverted_residuals(_searched(ENLARGED_FILTERS), separable=("ds_k3", "ds_k5", "ds_k7"))
    return _space(stages, **Shape(name="proxylessnas_enlarged") | shape)


def proxylessnas_original(**shape: Unpack[Shape]) -> MacroSpace:
    """ProxylessNAS's own space: the first block is fixed, its first searched stage has
    24 channels, ReLU6.
    """
    stages = _inverted_residuals(_single(PROXYLESSNAS_ORIGINAL_FILTERS))
    return _space(stages, **Shape(name="proxylessnas_original", act="relu6") | shape)


def fairnas(**shape: Unpack[Shape]) -> MacroSpace:
    """FairNAS's space: 19 searchable layers that are never skipped, 6^19 architectures, ReLU6."""
    stages = _inverted_residuals(_single(PROXYLESSNAS_FILTERS), (2, 4, 4, 4, 4, 1), skippable=False)
    return _space(stages, **Shape(name="fairnas", act="relu6") | shape)


def mobilenet_v3_like(**shape: Unpack[Shape]) -> MacroSpace:
    """TuNAS's MobileNetV3-like space: kernel, expansion 1 to 6, SE (sigmoid gate) and
    skip per layer, and every width.

    An expansion of 1 keeps its 1 x 1 convolution. ``act`` is that of the stem and the
    later half; ReLU elsewhere.
    """
    widths = _searched(MOBILENET_V3_FILTERS)
    blocks = tuple(
        f"ir_k{kernel}_e{e}{se}"
        for kernel in (3, 5, 7)
        for e in range(1, 7)
        for se in ("", "_se0.25")
    )
    later = (*blocks, SKIP)
    acts = ("relu", "relu", None, None, None)
    stages = [
        SpaceStage(
            widths=widths[0],
            stride=2,
            slots=(("cn_k3", "cn_k5"), ("ds_k3_nre", "ds_k5_nre", "ds_k7_nre", SKIP)),
        ),
        *(
            SpaceStage(widths=width, stride=stride, act=act, slots=(blocks, later, later, later))
            for width, stride, act in zip(widths[1:6], (2, 2, 2, 1, 2), acts, strict=True)
        ),
        SpaceStage(widths=widths[6], slots=(("cn_k1",),)),
        SpaceStage(widths=widths[7], slots=(("hd",),)),
    ]
    return _space(stages, **Shape(name="mobilenet_v3_like", act="hswish") | shape)


def fbnet(*, head: int = 1984, expand: bool = True, **shape: Unpack[Shape]) -> MacroSpace:
    """FBNet's space: 22 layers of 9 blocks. ``head`` is the width of the last 1 x 1
    convolution (FBNet-A: 1504).

    ``expand`` tells whether a block with e = 1 has its expansion convolution, as in
    timm and HW-NAS-Bench, or not, as in mobile-vision. Grouped blocks have both 1 x 1
    convolutions in 2 groups and a channel shuffle.
    """
    plain = "ir_k{}_e1" if expand else "ds_k{}"
    blocks = tuple(
        option
        for k in (3, 5)
        for option in (plain.format(k), plain.format(k) + "_g2", f"ir_k{k}_e3", f"ir_k{k}_e6")
    )  # HW-NAS-Bench's order
    first, later = (*blocks, "cn_k1"), (*blocks, SKIP)
    stages = [
        SpaceStage(widths=(16,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), residual="matching", slots=(later,)),
        *(
            SpaceStage(
                widths=(width,),
                stride=stride,
                residual="matching",
                slots=(first, *[later] * (count - 1)),
            )
            for width, stride, count in (
                (24, 2, 4),
                (32, 2, 4),
                (64, 2, 4),
                (112, 1, 4),
                (184, 2, 4),
                (352, 1, 1),
            )
        ),
        SpaceStage(widths=(head,), slots=(("cn_k1",),)),
    ]
    return _space(stages, **Shape(name="fbnet" if expand else "fbnet_no_expand") | shape)


def fbnet_no_expand(*, head: int = 1984, **shape: Unpack[Shape]) -> MacroSpace:
    """``fbnet`` without expansion convolutions where e = 1."""
    return fbnet(head=head, expand=False, **shape)


def ofa_mobilenet_v3(**shape: Unpack[Shape]) -> MacroSpace:
    """Once-for-all's MobileNetV3 space: five stages of 2 to 4 blocks, kernel {3, 5, 7},
    expansion {3, 4, 6}, four resolutions.

    The resolutions are 4/7, 5/7, 6/7 and all of ``resolution`` in multiples of 8: 128,
    160, 192 and 224. ``act`` is that of the stem and the later half; ReLU elsewhere.
    """
    kernels_expansions = tuple(f"ir_k{kernel}_e{e}" for kernel in (3, 5, 7) for e in (3, 4, 6))
    squeezed = tuple(f"{option}_se0.25_hsig" for option in kernels_expansions)
    elastic = (
        (24, 2, "relu", kernels_expansions),
        (40, 2, "relu", squeezed),
        (80, 2, None, kernels_expansions),
        (112, 1, None, squeezed),
        (160, 2, None, squeezed),
    )
    stages = [
        SpaceStage(widths=(16,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), act="relu", residual="matching", slots=(("ds_k3",),)),
        *(
            SpaceStage(
                widths=(width,), stride=stride, act=act, depths=(2, 3, 4), slots=(options,) * 4
            )
            for width, stride, act, options in elastic
        ),
        SpaceStage(widths=(960,), slots=(("cn_k1",),)),
        SpaceStage(widths=(1280,), slots=(("hd",),)),
    ]
    largest = shape.get("resolution", 224)
    smaller = (scale_width(largest, part / 7) for part in (4, 5, 6))
    resolutions = tuple(dict.fromkeys((*(size for size in smaller if size < largest), largest)))
    return _space(
        stages,
        resolutions=resolutions if len(resolutions) > 1 else (),
        **Shape(name="ofa_mobilenet_v3", act="hswish") | shape,
    )


def mobilenet_v4(**shape: Unpack[Shape]) -> MacroSpace:
    """A space around MobileNetV4-Conv (arXiv 2404.10518), whose Small and Medium are
    picks of it; ours, as the paper's is not published.

    At 1/4 and 1/8 of the resolution plain, fused and universal blocks; then two stages
    of universal inverted bottlenecks with start and middle kernels {none, 3, 5} and
    expansions {2, 3, 4, 6}, of 4 to 8 and 4 to 11 blocks. Widths are Small's or
    Medium's.
    """
    kernels = [(start, middle) for start in (0, 3, 5) for middle in (0, 3, 5)]
    universal = tuple(
        f"uir_a{start}_k{middle}_e{e}" for start, middle in kernels for e in (2, 3, 4, 6)
    )
    # a stride needs a depthwise convolution
    strided = tuple(option for option in universal if not option.startswith("uir_a0_k0"))
    stages = [
        SpaceStage(widths=(32,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(32, 48), stride=2, slots=(("cn_k3", "er_k3_e4"), ("cn_k1", SKIP))),
        SpaceStage(widths=(80, 96), stride=2, slots=(("cn_k3", "er_k3_e4", "uir_a3_k5_e4"),)),
        SpaceStage(
            widths=(64, 80), residual="matching", slots=(("cn_k1", "uir_a3_k3_e2", "uir_a3_k3_e4"),)
        ),
        SpaceStage(
            widths=(96, 160), stride=2, depths=(4, 5, 6, 7, 8), slots=(strided, *[universal] * 7)
        ),
        SpaceStage(
            widths=(128, 256), stride=2, depths=(4, 6, 8, 11), slots=(strided, *[universal] * 10)
        ),
        SpaceStage(widths=(960,), slots=(("cn_k1",),)),
        SpaceStage(widths=(1280,), slots=(("hd_bn",),)),
    ]
    return _space(stages, **Shape(name="mobilenet_v4") | shape)


def nasbench_macro(**shape: Unpack[Shape]) -> MacroSpace:
    """NAS-Bench-Macro: 8 layers of {identity, k3 e3, k5 e6}, 6,561 networks whose
    CIFAR-10 accuracy is published.

    Identity in a layer that changes the shape is a 1 x 1 convolution and BN without
    activation. The options' order is that of the benchmark's digits 0, 1, 2
    (xiusu/NAS-Bench-Macro).
    """
    blocks = ("ir_k3_e3", "ir_k5_e6")
    stages = [
        SpaceStage(widths=(32,), slots=(("cn_k3",),)),
        *(
            SpaceStage(
                widths=(width,),
                stride=2,
                slots=(("cn_k1_nli", *blocks), *[(SKIP, *blocks)] * later),
            )
            for width, later in ((64, 1), (128, 2), (256, 2))
        ),
        SpaceStage(widths=(1280,), slots=(("cn_k1",),)),
    ]
    return _space(
        stages, **Shape(name="nasbench_macro", resolution=32, classes=10, bn_eps=1e-5) | shape
    )


def mobile32(**shape: Unpack[Shape]) -> MacroSpace:
    """The family of ProxylessNAS for 32-pixel images (ours): stride 1 in the stem, four
    searched stages, no 7 x 7 kernels.

    Small images leave no room for five halvings: the last stage works at 4 x 4. Kernels
    above 5 would be wider than that.
    """
    first = tuple(option for option in KERNELS_EXPANSIONS if "k7" not in option)
    later = (*first, SKIP)
    stages = [
        SpaceStage(widths=(16,), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), slots=(("ds_k3", "ds_k5"),)),
        SpaceStage(widths=(24,), stride=2, slots=(first, later, later)),
        SpaceStage(widths=(40,), stride=2, slots=(first, later, later)),
        SpaceStage(widths=(64,), slots=(first, later, later)),
        SpaceStage(widths=(96,), stride=2, slots=(first, later, later)),
        SpaceStage(widths=(160,), slots=(first,)),
        SpaceStage(widths=(320,), slots=(("cn_k1",),)),
    ]
    return _space(stages, **Shape(name="mobile32", resolution=32, classes=10) | shape)
