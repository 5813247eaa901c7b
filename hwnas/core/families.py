"""The built-in macro search spaces.

=========================  ============================================================
``proxylessnas``           TuNAS's ``proxylessnas_search`` (Bender et al., CVPR 2020,
                           arXiv 2008.06120)
``proxylessnas_enlarged``  TuNAS's ``proxylessnas_enlarged_search``, which also searches
                           all widths
``mobilenet_v3_like``      TuNAS's ``mobilenet_v3_like_search``: SE, hard-swish,
                           expansions 1 to 6, all widths
``proxylessnas_original``  the space of ProxylessNAS itself (Cai et al., ICLR 2019,
                           arXiv 1812.00332)
``fbnet``                  FBNet (Wu et al., CVPR 2019, arXiv 1812.03443): 22 layers
                           with 9 blocks to choose from
``fbnet_no_expand``        FBNet as mobile-vision builds it: no expansion convolution
                           if e = 1
``fairnas``                FairNAS (Chu et al., ICCV 2021): 19 layers with 6 blocks to
                           choose from, none of them skipped
``ofa_mobilenet_v3``       once-for-all (Cai et al., ICLR 2020): depth, kernel,
                           expansion and resolution
``mobilenet_v4``           ours, around MobileNetV4-Conv (arXiv 2404.10518)
``nasbench_macro``         NAS-Bench-Macro (Su et al., CVPR 2021, arXiv 2103.11922): 8
                           layers with 3 blocks on CIFAR-10, all networks trained by
                           the benchmark
``mobile32``               ours, for 32-pixel images
=========================  ============================================================

Every builder takes the overrides of ``Shape``; ``width`` multiplies the width of all
stages (``MacroSpace.scaled``).

*Differences from the papers' code*:

- The classifier is pooling and a fully connected layer with 1000 classes. TuNAS has a
  1 x 1 convolution to 1001 channels and pooling, which computes the same.
- Once-for-all's last 1 x 1 convolution has a bias, as in MobileNetV3, and there are
  four resolutions instead of every fourth pixel from 128 to 224.
- If an FBNet layer changes the shape, its ``skip`` is the 1 x 1 convolution ``cn_k1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TypedDict, Unpack

from hwnas.core.option import SKIP, scale_width
from hwnas.core.size import Size, square
from hwnas.core.space import MacroSpace, SpaceStage

KERNELS_EXPANSIONS = ("ir_k3_e3", "ir_k5_e3", "ir_k7_e3", "ir_k3_e6", "ir_k5_e6", "ir_k7_e6")
"""Inverted residuals in the order of TuNAS's model archive: kernels 3, 5 and 7 with
expansion 3, then with expansion 6. Index 6 is skip.
"""

PROXYLESSNAS_FILTERS = (32, 16, 32, 40, 80, 96, 192, 320, 1280)
PROXYLESSNAS_ORIGINAL_FILTERS = (32, 16, 24, 40, 80, 96, 192, 320, 1280)
ENLARGED_FILTERS = (16, 16, 16, 32, 64, 128, 256, 512, 1024)
MOBILENET_V3_FILTERS = (16, 16, 32, 64, 128, 256, 512, 1024)
MULTIPLIERS = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)
"""TuNAS's searched widths, relative to the width of the stage."""

Widths = tuple[int, ...]
"""The options of the width of one stage."""


class Shape(TypedDict, total=False):
    """Overrides that every built-in space accepts. ``resolution`` is the height = width (or both)
    of the input in pixels; ``width`` multiplies the channels of all stages.
    """

    name: str
    resolution: Size
    in_channels: int
    classes: int
    act: str
    bn_eps: float
    width: float


_IMAGENET = Shape(resolution=224, in_channels=3, classes=1000, act="relu", bn_eps=1e-3, width=1.0)
"""The shape of a space for ImageNet, where neither the space nor the caller sets
another.
"""


def _space(
    stages: Sequence[SpaceStage], shape: Shape, *, resolutions: tuple[int, ...] = ()
) -> MacroSpace:
    """A macro space with the overrides of ``shape``, which has to name it."""
    full = _IMAGENET | shape
    space = MacroSpace(
        name=full["name"],
        resolution=full["resolution"],
        resolutions=resolutions,
        in_channels=full["in_channels"],
        classes=full["classes"],
        act=full["act"],
        bn_eps=full["bn_eps"],
        stages=tuple(stages),
    )
    if full["width"] == 1.0:
        return space
    return space.scaled(full["width"], name=full["name"])


def _inverted_residuals(
    widths: Sequence[Widths],
    slots: Sequence[int] = (4, 4, 4, 4, 4, 1),
    *,
    separable: Sequence[str] = ("ds_k3",),
    skippable: bool = True,
) -> list[SpaceStage]:
    """The stages of the ProxylessNAS family: stem, separable layer, six stages of
    inverted residuals with kernels {3, 5, 7} and expansions {3, 6}, and head.

    ``slots`` are the numbers of slots of the six stages. The first slot of a stage
    changes the shape, so it cannot be skipped; ``skippable`` is about the later ones.
    """
    first = KERNELS_EXPANSIONS
    later = (*KERNELS_EXPANSIONS, SKIP) if skippable else KERNELS_EXPANSIONS
    stages = [
        SpaceStage(widths=widths[0], stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=widths[1], slots=(tuple(separable),)),
    ]
    strides = (2, 2, 2, 1, 2, 1)
    for width, stride, count in zip(widths[2:8], strides, slots, strict=True):
        options = (first, *[later] * (count - 1))
        stages.append(SpaceStage(widths=width, stride=stride, slots=options))
    stages.append(SpaceStage(widths=widths[8], slots=(("cn_k1",),)))
    return stages


def _fixed(filters: Sequence[int]) -> list[Widths]:
    """One width for each stage."""
    return [(width,) for width in filters]


def _searched(filters: Sequence[int]) -> list[Widths]:
    """TuNAS's width options around each width; options that round to the same are
    merged.
    """
    widths: list[Widths] = []
    for width in filters:
        scaled = [scale_width(width, multiplier) for multiplier in MULTIPLIERS]
        widths.append(tuple(dict.fromkeys(scaled)))
    return widths


def proxylessnas(
    filters: Sequence[int] = PROXYLESSNAS_FILTERS, **shape: Unpack[Shape]
) -> MacroSpace:
    """TuNAS's ProxylessNAS space: 22 searched slots, 15 of them skippable, and 3 * 6^6
    * 7^15 combinations of options.

    ``filters`` are the widths of stem, separable layer, stages 2 to 7 and head.
    """
    stages = _inverted_residuals(_fixed(filters), separable=("ds_k3", "ds_k5", "ds_k7"))
    return _space(stages, Shape(name="proxylessnas") | shape)


def proxylessnas_enlarged(**shape: Unpack[Shape]) -> MacroSpace:
    """TuNAS's enlarged space: the blocks of ``proxylessnas``, and 4 to 7 width options
    for every stage, including stem and head.
    """
    stages = _inverted_residuals(_searched(ENLARGED_FILTERS), separable=("ds_k3", "ds_k5", "ds_k7"))
    return _space(stages, Shape(name="proxylessnas_enlarged") | shape)


def proxylessnas_original(**shape: Unpack[Shape]) -> MacroSpace:
    """The space of ProxylessNAS itself. Unlike in TuNAS's, the first block is fixed,
    the first searched stage has 24 channels, and the activation is ReLU6.
    """
    stages = _inverted_residuals(_fixed(PROXYLESSNAS_ORIGINAL_FILTERS))
    return _space(stages, Shape(name="proxylessnas_original", act="relu6") | shape)


def fairnas(**shape: Unpack[Shape]) -> MacroSpace:
    """FairNAS's space: 19 searched layers that are never skipped, 6^19 architectures,
    ReLU6.
    """
    stages = _inverted_residuals(_fixed(PROXYLESSNAS_FILTERS), (2, 4, 4, 4, 4, 1), skippable=False)
    return _space(stages, Shape(name="fairnas", act="relu6") | shape)


def mobilenet_v3_like(**shape: Unpack[Shape]) -> MacroSpace:
    """TuNAS's MobileNetV3-like space: for every layer kernel, expansion 1 to 6, SE
    (with a sigmoid gate) and skip; and all widths.

    An expansion of 1 keeps its 1 x 1 convolution. ``act`` applies to the stem and the
    later half; the other stages have ReLU.
    """
    widths = _searched(MOBILENET_V3_FILTERS)
    attributes = product((3, 5, 7), range(1, 7), ("", "_se0.25"))
    blocks = tuple(f"ir_k{kernel}_e{expansion}{se}" for kernel, expansion, se in attributes)
    later = (*blocks, SKIP)
    stem = (("cn_k3", "cn_k5"), ("ds_k3_nre", "ds_k5_nre", "ds_k7_nre", SKIP))
    stages = [SpaceStage(widths=widths[0], stride=2, slots=stem)]
    strides = (2, 2, 2, 1, 2)
    acts = ("relu", "relu", None, None, None)  # None: the activation of the space
    slots = (blocks, later, later, later)
    for width, stride, act in zip(widths[1:6], strides, acts, strict=True):
        stages.append(SpaceStage(widths=width, stride=stride, act=act, slots=slots))
    stages.append(SpaceStage(widths=widths[6], slots=(("cn_k1",),)))
    stages.append(SpaceStage(widths=widths[7], slots=(("hd",),)))
    return _space(stages, Shape(name="mobilenet_v3_like", act="hswish") | shape)


def fbnet(*, head: int = 1984, expand: bool = True, **shape: Unpack[Shape]) -> MacroSpace:
    """FBNet's space: 22 layers with 9 blocks to choose from. ``head`` is the width of
    the last 1 x 1 convolution (FBNet-A: 1504).

    ``expand`` tells whether a block with e = 1 has an expansion convolution, as in timm
    and HW-NAS-Bench, or not, as in mobile-vision. Grouped blocks have both 1 x 1
    convolutions in 2 groups and a channel shuffle.
    """
    blocks: list[str] = []  # in the order of HW-NAS-Bench
    for kernel in (3, 5):
        plain = f"ir_k{kernel}_e1" if expand else f"ds_k{kernel}"
        blocks += [plain, f"{plain}_g2", f"ir_k{kernel}_e3", f"ir_k{kernel}_e6"]
    # the first layer of a stage changes the shape, so a convolution stands for skip
    first = (*blocks, "cn_k1")
    later = (*blocks, SKIP)

    stages = [
        SpaceStage(widths=(16,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), residual="matching", slots=(later,)),
    ]
    searched = ((24, 2, 4), (32, 2, 4), (64, 2, 4), (112, 1, 4), (184, 2, 4), (352, 1, 1))
    for width, stride, count in searched:
        slots = (first, *[later] * (count - 1))
        stages.append(SpaceStage(widths=(width,), stride=stride, residual="matching", slots=slots))
    stages.append(SpaceStage(widths=(head,), slots=(("cn_k1",),)))
    return _space(stages, Shape(name="fbnet" if expand else "fbnet_no_expand") | shape)


def fbnet_no_expand(*, head: int = 1984, **shape: Unpack[Shape]) -> MacroSpace:
    """``fbnet`` without the expansion convolution of blocks with e = 1."""
    return fbnet(head=head, expand=False, **shape)


def ofa_mobilenet_v3(**shape: Unpack[Shape]) -> MacroSpace:
    """Once-for-all's MobileNetV3 space: five stages of 2 to 4 blocks, kernels {3, 5,
    7}, expansions {3, 4, 6}, four resolutions.

    The resolutions are 4/7, 5/7, 6/7 and all of ``resolution``, rounded to multiples of
    8: 128, 160, 192 and 224. ``act`` applies to the stem and the later half; the other
    stages have ReLU.
    """
    attributes = product((3, 5, 7), (3, 4, 6))
    plain = tuple(f"ir_k{kernel}_e{expansion}" for kernel, expansion in attributes)
    with_se = tuple(f"{option}_se0.25_hsig" for option in plain)
    stages = [
        SpaceStage(widths=(16,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), act="relu", residual="matching", slots=(("ds_k3",),)),
    ]
    elastic = (
        (24, 2, "relu", plain),
        (40, 2, "relu", with_se),
        (80, 2, None, plain),
        (112, 1, None, with_se),
        (160, 2, None, with_se),
    )
    for width, stride, act, options in elastic:
        slots = (options,) * 4
        stages.append(
            SpaceStage(widths=(width,), stride=stride, act=act, depths=(2, 3, 4), slots=slots)
        )
    stages += [
        SpaceStage(widths=(960,), slots=(("cn_k1",),)),
        SpaceStage(widths=(1280,), slots=(("hd",),)),
    ]

    largest = square(shape.get("resolution", _IMAGENET["resolution"]), "ofa_mobilenet_v3")
    resolutions = _resolutions(largest)
    return _space(
        stages,
        Shape(name="ofa_mobilenet_v3", act="hswish") | shape,
        resolutions=resolutions if len(resolutions) > 1 else (),
    )


def _resolutions(largest: int) -> tuple[int, ...]:
    """Once-for-all's four resolutions; fewer if the image is so small that they
    coincide.
    """
    scaled = [scale_width(largest, part / 7) for part in (4, 5, 6)]
    smaller = dict.fromkeys(size for size in scaled if size < largest)
    return (*smaller, largest)


def mobilenet_v4(**shape: Unpack[Shape]) -> MacroSpace:
    """A space around MobileNetV4-Conv (arXiv 2404.10518) that contains its Small and
    Medium. It is ours: the paper's space is not published.

    At 1/4 and 1/8 of the resolution there are plain, fused and universal blocks. Then
    come two stages of universal inverted bottlenecks, with 4 to 8 and 4 to 11 blocks,
    start and middle kernels {none, 3, 5}, and expansions {2, 3, 4, 6}. Widths are those
    of Small or Medium.
    """
    attributes = product((0, 3, 5), (0, 3, 5), (2, 3, 4, 6))
    universal = tuple(
        f"uir_a{start}_k{middle}_e{expansion}" for start, middle, expansion in attributes
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
    return _space(stages, Shape(name="mobilenet_v4") | shape)


def nasbench_macro(**shape: Unpack[Shape]) -> MacroSpace:
    """NAS-Bench-Macro: 8 layers of {identity, k3 e3, k5 e6}, 6,561 networks with
    published CIFAR-10 accuracies.

    In a layer that changes the shape, the identity is a 1 x 1 convolution and BN
    without activation. Options are in the order of the benchmark's digits 0, 1, 2
    (xiusu/NAS-Bench-Macro).
    """
    blocks = ("ir_k3_e3", "ir_k5_e6")
    first = ("cn_k1_nli", *blocks)
    later = (SKIP, *blocks)
    stages = [
        SpaceStage(widths=(32,), slots=(("cn_k3",),)),
        SpaceStage(widths=(64,), stride=2, slots=(first, later)),
        SpaceStage(widths=(128,), stride=2, slots=(first, later, later)),
        SpaceStage(widths=(256,), stride=2, slots=(first, later, later)),
        SpaceStage(widths=(1280,), slots=(("cn_k1",),)),
    ]
    cifar = Shape(name="nasbench_macro", resolution=32, classes=10, bn_eps=1e-5)
    return _space(stages, cifar | shape)


def mobile32(**shape: Unpack[Shape]) -> MacroSpace:
    """A ProxylessNAS-like space for 32-pixel images (ours): stride 1 in the stem, three
    halvings, and no 7 x 7 kernels.

    Small images leave no room for five halvings; the last stage works at 4 x 4 pixels.
    7 x 7 kernels would be larger than its feature maps.
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
    return _space(stages, Shape(name="mobile32", resolution=32, classes=10) | shape)
