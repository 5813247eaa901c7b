"""Published networks as documents: picks where a built-in space holds the network, written out where none does.

Sources: TuNAS's model archive (google-research:tunas/mobile_model_archive.py) for MobileNetV2 (arXiv 1801.04381), MnasNet-B1
(arXiv 1807.11626), ProxylessNAS-Mobile and the Multi-Hardware models (arXiv 2008.08178); the authors' configurations
(han-cai/files) for the other ProxylessNAS networks (arXiv 1812.00332); timm's architecture strings for MnasNet-A1,
MobileNetV3 (arXiv 1905.02244) and Single-Path NAS (arXiv 1904.02877); facebookresearch/mobile-vision for FBNet (arXiv 1812.03443);
fairnas/FairNAS (arXiv 1907.01845); torchvision's ``ssdlite320_mobilenet_v3_large`` for the detector of that name, whose last stages
are half as wide (MobileNetV3, section 6.3) and whose first tap is the expansion of the first block of stride 32.

FBNets are counted with the expansion convolution of e = 1 (timm, HW-NAS-Bench) and without (mobile-vision: ``_no_expand``).

*Width multipliers* (``mobilenet_v2-w0.35``, or ``width``) make every layer's width a multiple of 8 and never less than 90 % of what is
asked for. The head, the last layer before the classifier, differs by family:

- MobileNetV2: only ever widened (torchvision's ``width_mult``, timm's ``mobilenetv2_050``);
- MnasNet, Single-Path NAS, MobileNetV3, FBNet: always as published (torchvision's ``mnasnet0_5``, timm's ``mnasnet_140``,
  ``mobilenetv3_large_075`` and code for the others). MobileNetV3 below 0.75 also keeps its stem, as timm's ``mobilenetv3_small_050`` does;
  expansions are multiples of the scaled input, as in timm, where torchvision scales the rounded products;
- ProxylessNAS, FairNAS, Multi-AVG, Multi-MAX: no rule is published, so they follow MobileNetV2's (ours);
- the detector: none is published either; all of its backbone is scaled as MobileNetV3 is, the last layer too (ours), its extras are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hwnas.core.arch import Architecture
from hwnas.core.families import PROXYLESSNAS_FILTERS, Shape, fairnas, fbnet, proxylessnas
from hwnas.core.ops import DSConv, MBConv, Op
from hwnas.core.search_space import SearchSpace
from hwnas.core.space import MacroSpace, Stage
from hwnas.core.ssdlite import split_expansion, ssdlite
from hwnas.core.stage import Residual
from hwnas.document import nearest
from hwnas.errors import SpaceError

_MOBILE = ("k3e3", "k5e3", "k7e3", "k3e6", "k5e6", "k7e6", "-")
_FBNET = ("k3e1", "k3e1g2", "k3e3", "k3e6", "k5e1", "k5e1g2", "k5e3", "k5e6", "-")
"""Options of a slot in its space's order; ``-`` is skip, or FBNet's 1 x 1 convolution where the shape changes."""

_PROXYLESSNAS: dict[str, tuple[tuple[int, ...], str, str]] = {
    # name: filters (stem, separable layer, six stages, head), activation, blocks of the six stages; the separable kernel is 3
    "mobilenet_v2": (
        (32, 16, 24, 32, 64, 96, 160, 320, 1280),
        "relu6",
        "k3e6 k3e6 - - | k3e6 k3e6 k3e6 - | k3e6 k3e6 k3e6 k3e6 | k3e6 k3e6 k3e6 - | k3e6 k3e6 k3e6 - | k3e6",
    ),
    "mnasnet_b1": (
        (32, 16, 24, 40, 80, 96, 192, 320, 1280),
        "relu",
        "k3e3 k3e3 k3e3 - | k5e3 k5e3 k5e3 - | k5e6 k5e6 k5e6 - | k3e6 k3e6 - - | k5e6 k5e6 k5e6 k5e6 | k3e6",
    ),
    "single_path_nas": (
        (32, 16, 24, 40, 80, 96, 192, 320, 1280),
        "relu",
        "k3e3 k3e3 k3e3 - | k5e6 k3e3 k3e3 k3e3 | k5e6 k3e3 k3e3 k3e3 | k5e6 k5e3 k5e3 k5e3 | k5e6 k5e6 k5e6 k5e6 | k3e6",
    ),
    "proxylessnas_mobile": (
        PROXYLESSNAS_FILTERS,
        "relu6",
        "k5e3 k3e3 - - | k7e3 k3e3 k5e3 k5e3 | k7e6 k5e3 k5e3 k5e3 | k5e6 k5e3 k5e3 k5e3 | k7e6 k7e6 k7e3 k7e3 | k7e6",
    ),
    "proxylessnas_cpu": (
        (40, 24, 32, 48, 88, 104, 216, 360, 1432),
        "relu6",
        "k3e6 k3e3 k3e3 k3e3 | k3e6 k3e3 k3e3 k5e3 | k3e6 - - k3e3 | k5e6 k3e3 k3e3 k3e3 | k5e6 k5e3 k5e3 k3e3 | k5e6",
    ),
    "proxylessnas_gpu": (
        (40, 24, 32, 56, 112, 128, 256, 432, 1728),
        "relu6",
        "k5e3 - - - | k7e3 - - k3e3 | k7e6 - - k5e3 | k5e6 - k3e3 k5e3 | k7e6 k7e6 k7e6 k5e6 | k7e6",
    ),
    "proxylessnas_mobile_14": (
        (48, 24, 40, 56, 112, 136, 256, 448, 1792),
        "relu6",
        "k5e3 k3e3 - - | k7e3 k3e3 k5e3 k5e3 | k7e6 k5e3 k5e3 k5e3 | k5e6 k5e3 k5e3 k5e3 | k7e6 k7e6 k7e3 k7e3 | k7e6",
    ),
}

_FAIRNAS = {
    "fairnas_a": "k7e3 k3e3 | k7e3 k3e6 k7e6 k3e3 | k3e3 k7e6 k7e6 k5e3 | k3e6 k5e3 k5e3 k3e6 | k3e6 k7e6 k3e6 k7e6 | k5e6",
    "fairnas_b": "k5e3 k3e3 | k5e3 k3e3 k3e6 k5e3 | k7e3 k3e3 k3e6 k5e3 | k3e3 k3e6 k7e3 k3e3 | k7e6 k5e6 k7e6 k3e6 | k5e6",
    "fairnas_c": "k5e3 k3e3 | k7e3 k3e3 k3e3 k3e3 | k3e3 k3e3 k3e3 k3e6 | k3e3 k3e3 k3e3 k3e3 | k7e6 k7e6 k3e6 k3e6 | k5e6",
}

_FBNETS: dict[str, tuple[int, str]] = {
    # name: head, blocks of the seven stages
    "fbnet_a": (
        1504,
        "- | k3e3 k3e1 - - | k5e6 k3e3 k5e1 k3e3 | k5e6 k5e3 k5e1g2 k5e6 | k3e6 k5e1g2 k5e3 k3e1g2 | k5e6 k5e6 k5e3 k5e6 | k5e6",
    ),
    "fbnet_b": (
        1984,
        "k3e1 | k3e6 k5e1 k3e1 k3e1 | k5e6 k5e3 k3e6 k5e6 | k5e6 k5e6 - k5e3 | k5e6 k3e1 k5e1 k5e3 | k5e6 k5e1 k5e6 k5e6 | k3e6",
    ),
    "fbnet_c": (
        1984,
        "k3e1 | k3e6 - k3e1 k3e1 | k5e6 k5e3 k5e6 k3e6 | k5e6 k5e3 k5e6 k5e6 | k5e6 k5e6 k5e6 k5e3 | k5e6 k5e6 k5e6 k5e6 | k3e6",
    ),
}


@dataclass(frozen=True)
class _Written:
    """A network stage by stage: width, stride, blocks. ``se_of_input`` takes SE's hidden width from a block's input, unrounded.

    ``head_scales`` says that a width multiplier above 1 widens the head, too.
    """

    act: str
    stages: tuple[tuple[int, int, str], ...]
    residual: Residual = "matching"
    se_of_input: bool = False
    head_scales: bool = False


_WRITTEN = {
    "mnasnet_a1": _Written(
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
    "mobilenet_v3_large": _Written(
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
    ),
    "mobilenet_v3_small": _Written(
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
    ),
    "multi_avg": _Written(  # the archive gives absolute sizes: e96 after 32 channels is e3
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
    "multi_max": _Written(
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
}

_SSDLITE = "ssdlite320_mobilenet_v3_large"
_SSDLITE_BACKBONE = _Written(
    "hswish",
    (
        *_WRITTEN["mobilenet_v3_large"].stages[:6],
        (80, 2, "ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig"),
        (480, 1, "cn_k1"),
    ),
)

_NAMES = (*_PROXYLESSNAS, *_FAIRNAS, *_FBNETS, *(f"{name}_no_expand" for name in _FBNETS), *_WRITTEN, _SSDLITE)
NETWORKS: tuple[str, ...] = tuple(sorted(_NAMES))
"""Names that ``published`` knows."""


_FIXED_HEADS = ("mnasnet_b1", "single_path_nas")
"""Networks of ProxylessNAS's form whose head no multiplier changes."""

_FIXED_STEM_BELOW = 0.75
"""MobileNetV3's stem stays as it is for smaller multipliers (timm)."""


def is_name(text: str) -> bool:
    """Whether a text is the name of a network, right or wrong, and no architecture of a space: a letter first, no blanks or brackets."""
    return re.fullmatch(r"[A-Za-z][\w.-]*", text) is not None


def named(
    name: str, space: SearchSpace, *, resolution: int, classes: int, in_channels: int = 3, width: float = 1.0
) -> Architecture:  # fmt: skip
    """A published network by its name, ``width`` times as wide, or an architecture of ``space`` in its notation (``SearchSpace.read``).

    Raises SpaceError where it is neither.
    """
    if not is_name(name):
        return space.decode(space.read(name), f"{space.name}-named")
    _, own = split_width(name)
    if own is not None and width not in (1.0, own):
        raise SpaceError(f"{name!r} says its width, and so does space.width = {width:g}: remove one of them.")
    return published(name, resolution=resolution, classes=classes, in_channels=in_channels, width=width if own is None else 1.0)


def has_detector(name: str) -> bool:
    """Whether the published network of a name has a detector of its own."""
    return split_width(name)[0] == _SSDLITE


def split_width(name: str) -> tuple[str, float | None]:
    """A network's name and the multiplier at its end, None where there is none.

    Example:
        >>> split_width("mobilenet_v2-w0.35"), split_width("fbnet_a")
        (('mobilenet_v2', 0.35), ('fbnet_a', None))
    """
    match = re.fullmatch(r"(?P<base>.+)-w(?P<width>\d+(?:\.\d+)?)", name)
    return (match["base"], float(match["width"])) if match else (name, None)


def published(
    name: str,
    *,
    resolution: int | None = None,
    classes: int | None = None,
    bn_eps: float = 1e-3,
    in_channels: int = 3,
    width: float = 1.0,
) -> Architecture:
    """A published network. Those that are picks carry the space of their own widths and activation as their origin.

    ``resolution`` and ``classes`` are ImageNet's 224 px and 1000 where they are not given, of a detector COCO's 320 px and 90.
    ``width`` multiplies its widths, which the name may do, too (``mobilenet_v2-w0.35``); see the module.

    Example:
        >>> published("mobilenet_v2").params, published("mobilenet_v2-w0.35").params
        (3504872, 1677128)
    """
    base, own = split_width(name)
    width *= 1.0 if own is None else own
    if base not in NETWORKS:
        raise SpaceError(f"unknown network {name!r}; {nearest(base, NETWORKS)}")
    usual_resolution, usual_classes = (320, 90) if base == _SSDLITE else (224, 1000)
    name = base if width == 1.0 else f"{base}-w{width:g}"
    shape = Shape(
        name=f"{name}-space",
        resolution=usual_resolution if resolution is None else resolution,
        classes=usual_classes if classes is None else classes,
        in_channels=in_channels,
        bn_eps=bn_eps,
    )
    if base in _PROXYLESSNAS:
        filters, act, blocks = _PROXYLESSNAS[base]
        space = _widened(proxylessnas(filters, **shape | Shape(act=act)), width, last=1.0 if base in _FIXED_HEADS else None)
        return space.decode(picks_of_codes(space, [0, *_codes(blocks, _MOBILE)]), name)
    if base in _FAIRNAS:
        space = _widened(fairnas(**shape), width)
        return space.decode(picks_of_codes(space, _codes(_FAIRNAS[base], _MOBILE)), name)
    if base.removesuffix("_no_expand") in _FBNETS:
        head, blocks = _FBNETS[base.removesuffix("_no_expand")]
        space = _widened(fbnet(head=head, expand=not base.endswith("_no_expand"), **shape), width, last=1.0)
        return space.decode(picks_of_codes(space, _codes(blocks, _FBNET)), name)
    if base == _SSDLITE:
        return _ssdlite320_mobilenet_v3_large(name, shape, width)
    network = _WRITTEN[base]
    return Architecture(name=name, in_channels=in_channels, bn_eps=bn_eps, blocks=_written(network, shape, width))


def _widened(space: MacroSpace, width: float, *, first: float | None = None, last: float | None = None) -> MacroSpace:
    return space if width == 1.0 else space.scaled(width, name=space.name, first=first, last=last)


def _written(network: _Written, shape: Shape, width: float, *, last: float | None = 1.0) -> tuple[Op, ...]:
    stages = tuple(
        Stage(widths=(channels,), stride=stride, slots=tuple((option,) for option in blocks.split()), residual=network.residual)
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
    fixed_stem = network.act == "hswish" and width < _FIXED_STEM_BELOW  # only MobileNetV3 is written with hard-swish
    ops = _widened(space, width, first=1.0 if fixed_stem else None, last=None if network.head_scales else last).decode({}).blocks
    if network.se_of_input:
        ops = tuple(replace(op, se_ch=op.in_ch // 4) if isinstance(op, DSConv | MBConv) and op.se_ch else op for op in ops)
    return ops


def _ssdlite320_mobilenet_v3_large(name: str, shape: Shape, width: float) -> Architecture:
    *blocks, _ = _written(_SSDLITE_BACKBONE, shape, width, last=width)
    tap = max(position for position, op in enumerate(blocks) if op.stride == 2)
    blocks[tap : tap + 1] = split_expansion(blocks[tap])
    detector = ssdlite(blocks, (tap, len(blocks) - 1), shape["classes"])
    return Architecture(
        name=name, in_channels=shape["in_channels"], bn_eps=shape["bn_eps"], blocks=tuple(blocks), detector=detector
    )  # fmt: skip


def _codes(blocks: str, names: Sequence[str]) -> list[int]:
    return [names.index(block) for block in blocks.replace("|", " ").split()]


def picks_of_codes(space: MacroSpace, codes: Sequence[int]) -> dict[str, str | int]:
    """Picks of a space without searched widths from flat op codes (TuNAS's, HW-NAS-Bench's), one per searchable slot."""
    choices = [choice for choice in space.choices if choice.kind == "op"]
    return {choice.key: choice.options[code] for choice, code in zip(choices, codes, strict=True)}
