"""Published networks as documents: picks where a built-in space holds the network,
written out where none does.

Sources: TuNAS's model archive (google-research:tunas/mobile_model_archive.py) for
MobileNetV2 (arXiv 1801.04381), MnasNet-B1 (arXiv 1807.11626) and ProxylessNAS-Mobile;
the authors' configurations (han-cai/files) for the other ProxylessNAS networks (arXiv
1812.00332); timm's architecture string for Single-Path NAS (arXiv 1904.02877);
facebookresearch/mobile-vision for FBNet (arXiv 1812.03443); fairnas/FairNAS (arXiv
1907.01845); ``written`` for those that are no picks; torchvision's
``ssdlite320_mobilenet_v3_large`` for the detector of that name, whose last stages are
half as wide (MobileNetV3, section 6.3) and whose first tap is the expansion of the
first block of stride 32.

FBNets are counted with the expansion convolution of e = 1 (timm, HW-NAS-Bench) and
without (mobile-vision: ``_no_expand``).

*Width multipliers* (``mobilenet_v2-w0.35``, or ``width``) make every layer's width a
multiple of 8 and never less than 90 % of what is asked for. The head, the last layer
before the classifier, differs by family:

- MobileNetV2: only ever widened (torchvision's ``width_mult``, timm's ``mobilenetv2_050``);
- MnasNet, Single-Path NAS, MobileNetV3, FBNet: always as published (torchvision's
  ``mnasnet0_5``, timm's ``mnasnet_140``, ``mobilenetv3_large_075`` and code for the
  others). MobileNetV3 below 0.75 also keeps its stem, as timm's
  ``mobilenetv3_small_050`` does; expansions are multiples of the scaled input, as in
  timm, where torchvision scales the rounded products;
- MobileNetV4: always as published (timm's ``mobilenetv4_conv_small_050``; its stem, too, below 1);
- ProxylessNAS, FairNAS, Multi-AVG, Multi-MAX: no rule is published, so they follow
  MobileNetV2's (ours);
- the detector: none is published either; all of its backbone is scaled as MobileNetV3
  is, the last layer too (ours), its extras are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hwnas.core.arch import Architecture
from hwnas.core.families import PROXYLESSNAS_FILTERS, Shape, fairnas, fbnet, proxylessnas
from hwnas.core.search_space import SearchSpace
from hwnas.core.space import MacroSpace
from hwnas.core.ssdlite import split_expansion, ssdlite
from hwnas.core.written import WRITTEN, Written, widened, written
from hwnas.document import nearest
from hwnas.errors import SpaceError

_MOBILE = ("k3e3", "k5e3", "k7e3", "k3e6", "k5e6", "k7e6", "-")
_FBNET = ("k3e1", "k3e1g2", "k3e3", "k3e6", "k5e1", "k5e1g2", "k5e3", "k5e6", "-")
"""Options of a slot in its space's order; ``-`` is skip, or FBNet's 1 x 1 convolution
where the shape changes.
"""

_PROXYLESSNAS: dict[str, tuple[tuple[int, ...], str, str]] = {
    # name: filters (stem, separable layer, six stages, head), activation, blocks of the
    # six stages; the separable kernel is 3
    "mobilenet_v2": (
        (32, 16, 24, 32, 64, 96, 160, 320, 1280),
        "relu6",
        (
            "k3e6 k3e6 - - | k3e6 k3e6 k3e6 - | k3e6 k3e6 k3e6 k3e6 | k3e6 k3e6 k3e6 - | k3e6 k3e6"
            " k3e6 - | k3e6"
        ),
    ),
    "mnasnet_b1": (
        (32, 16, 24, 40, 80, 96, 192, 320, 1280),
        "relu",
        (
            "k3e3 k3e3 k3e3 - | k5e3 k5e3 k5e3 - | k5e6 k5e6 k5e6 - | k3e6 k3e6 - - | k5e6 k5e6"
            " k5e6 k5e6 | k3e6"
        ),
    ),
    "single_path_nas": (
        (32, 16, 24, 40, 80, 96, 192, 320, 1280),
        "relu",
        (
            "k3e3 k3e3 k3e3 - | k5e6 k3e3 k3e3 k3e3 | k5e6 k3e3 k3e3 k3e3 | k5e6 k5e3 k5e3 k5e3 |"
            " k5e6 k5e6 k5e6 k5e6 | k3e6"
        ),
    ),
    "proxylessnas_mobile": (
        PROXYLESSNAS_FILTERS,
        "relu6",
        (
            "k5e3 k3e3 - - | k7e3 k3e3 k5e3 k5e3 | k7e6 k5e3 k5e3 k5e3 | k5e6 k5e3 k5e3 k5e3 | k7e6"
            " k7e6 k7e3 k7e3 | k7e6"
        ),
    ),
    "proxylessnas_cpu": (
        (40, 24, 32, 48, 88, 104, 216, 360, 1432),
        "relu6",
        (
            "k3e6 k3e3 k3e3 k3e3 | k3e6 k3e3 k3e3 k5e3 | k3e6 - - k3e3 | k5e6 k3e3 k3e3 k3e3 | k5e6"
            " k5e3 k5e3 k3e3 | k5e6"
        ),
    ),
    "proxylessnas_gpu": (
        (40, 24, 32, 56, 112, 128, 256, 432, 1728),
        "relu6",
        (
            "k5e3 - - - | k7e3 - - k3e3 | k7e6 - - k5e3 | k5e6 - k3e3 k5e3 | k7e6 k7e6 k7e6 k5e6 |"
            " k7e6"
        ),
    ),
    "proxylessnas_mobile_14": (
        (48, 24, 40, 56, 112, 136, 256, 448, 1792),
        "relu6",
        (
            "k5e3 k3e3 - - | k7e3 k3e3 k5e3 k5e3 | k7e6 k5e3 k5e3 k5e3 | k5e6 k5e3 k5e3 k5e3 | k7e6"
            " k7e6 k7e3 k7e3 | k7e6"
        ),
    ),
}

_FAIRNAS = {
    "fairnas_a": (
        "k7e3 k3e3 | k7e3 k3e6 k7e6 k3e3 | k3e3 k7e6 k7e6 k5e3 | k3e6 k5e3 k5e3 k3e6 | k3e6 k7e6"
        " k3e6 k7e6 | k5e6"
    ),
    "fairnas_b": (
        "k5e3 k3e3 | k5e3 k3e3 k3e6 k5e3 | k7e3 k3e3 k3e6 k5e3 | k3e3 k3e6 k7e3 k3e3 | k7e6 k5e6"
        " k7e6 k3e6 | k5e6"
    ),
    "fairnas_c": (
        "k5e3 k3e3 | k7e3 k3e3 k3e3 k3e3 | k3e3 k3e3 k3e3 k3e6 | k3e3 k3e3 k3e3 k3e3 | k7e6 k7e6"
        " k3e6 k3e6 | k5e6"
    ),
}

_FBNETS: dict[str, tuple[int, str]] = {
    # name: head, blocks of the seven stages
    "fbnet_a": (
        1504,
        (
            "- | k3e3 k3e1 - - | k5e6 k3e3 k5e1 k3e3 | k5e6 k5e3 k5e1g2 k5e6 | k3e6 k5e1g2 k5e3"
            " k3e1g2 | k5e6 k5e6 k5e3 k5e6 | k5e6"
        ),
    ),
    "fbnet_b": (
        1984,
        (
            "k3e1 | k3e6 k5e1 k3e1 k3e1 | k5e6 k5e3 k3e6 k5e6 | k5e6 k5e6 - k5e3 | k5e6 k3e1 k5e1"
            " k5e3 | k5e6 k5e1 k5e6 k5e6 | k3e6"
        ),
    ),
    "fbnet_c": (
        1984,
        (
            "k3e1 | k3e6 - k3e1 k3e1 | k5e6 k5e3 k5e6 k3e6 | k5e6 k5e3 k5e6 k5e6 | k5e6 k5e6 k5e6"
            " k5e3 | k5e6 k5e6 k5e6 k5e6 | k3e6"
        ),
    ),
}


_SSDLITE = "ssdlite320_mobilenet_v3_large"
_SSDLITE_BACKBONE = Written(
    "hswish",
    (
        *WRITTEN["mobilenet_v3_large"].stages[:6],
        (80, 2, "ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig ir_k5_e6_se0.25_hsig"),
        (480, 1, "cn_k1"),
    ),
    fixed_stem_below=0.75,
)

_NAMES = (
    *_PROXYLESSNAS,
    *_FAIRNAS,
    *_FBNETS,
    *(f"{name}_no_expand" for name in _FBNETS),
    *WRITTEN,
    _SSDLITE,
)
NETWORKS: tuple[str, ...] = tuple(sorted(_NAMES))
"""Names that ``published`` knows."""


_FIXED_HEADS = ("mnasnet_b1", "single_path_nas")
"""Networks of ProxylessNAS's form whose head no multiplier changes."""


def is_name(text: str) -> bool:
    """Whether a text is the name of a network, right or wrong, and no architecture of a
    space: a letter first, no blanks or brackets.
    """
    return re.fullmatch(r"[A-Za-z][\w.-]*", text) is not None


def resolve_arch(
    name: str,
    space: SearchSpace,
    *,
    resolution: int,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
) -> Architecture:
    """A published network by its name, ``width`` times as wide, or an architecture of
    ``space`` in its notation (``SearchSpace.read``).

    Raises SpaceError where it is neither.
    """
    if not is_name(name):
        return space.decode(space.read(name), f"{space.name}-named")
    _, own = split_width(name)
    if own is not None and width not in (1.0, own):
        raise SpaceError(
            f"{name!r} says its width, and so does space.width = {width:g}: remove one of them."
        )
    return published(
        name,
        resolution=resolution,
        classes=classes,
        in_channels=in_channels,
        width=width if own is None else 1.0,
    )


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
    """A published network. Those that are picks carry the space of their own widths and
    activation as their origin.

    ``resolution`` and ``classes`` are those of the publication where they are not
    given: 224 px for most, and ImageNet's 1000 classes; of a detector COCO's 320 px and
    90. ``width`` multiplies its widths, which the name may do, too
    (``mobilenet_v2-w0.35``); see the module.

    Example:
        >>> published("mobilenet_v2").params, published("mobilenet_v2-w0.35").params
        (3504872, 1677128)
    """
    base, own = split_width(name)
    width *= 1.0 if own is None else own
    if base not in NETWORKS:
        raise SpaceError(f"unknown network {name!r}; {nearest(base, NETWORKS)}")
    usual_resolution, usual_classes = 224, 1000
    if base == _SSDLITE:
        usual_resolution, usual_classes = 320, 90
    elif base in WRITTEN:
        usual_resolution = WRITTEN[base].resolution
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
        space = widened(
            proxylessnas(filters, **shape | Shape(act=act)),
            width,
            last=1.0 if base in _FIXED_HEADS else None,
        )
        return space.decode(picks_of_codes(space, [0, *_codes(blocks, _MOBILE)]), name)
    if base in _FAIRNAS:
        space = widened(fairnas(**shape), width)
        return space.decode(picks_of_codes(space, _codes(_FAIRNAS[base], _MOBILE)), name)
    if base.removesuffix("_no_expand") in _FBNETS:
        head, blocks = _FBNETS[base.removesuffix("_no_expand")]
        space = widened(
            fbnet(head=head, expand=not base.endswith("_no_expand"), **shape), width, last=1.0
        )
        return space.decode(picks_of_codes(space, _codes(blocks, _FBNET)), name)
    if base == _SSDLITE:
        return _ssdlite320_mobilenet_v3_large(name, shape, width)
    network = WRITTEN[base]
    return Architecture(
        name=name, in_channels=in_channels, bn_eps=bn_eps, blocks=written(network, shape, width)
    )


def _ssdlite320_mobilenet_v3_large(name: str, shape: Shape, width: float) -> Architecture:
    *blocks, _ = written(_SSDLITE_BACKBONE, shape, width, last=width)
    tap = max(position for position, op in enumerate(blocks) if op.stride == 2)
    blocks[tap : tap + 1] = split_expansion(blocks[tap])
    detector = ssdlite(blocks, (tap, len(blocks) - 1), shape["classes"])
    return Architecture(
        name=name,
        in_channels=shape["in_channels"],
        bn_eps=shape["bn_eps"],
        blocks=tuple(blocks),
        detector=detector,
    )


def _codes(blocks: str, names: Sequence[str]) -> list[int]:
    return [names.index(block) for block in blocks.replace("|", " ").split()]


def picks_of_codes(space: MacroSpace, codes: Sequence[int]) -> dict[str, str | int]:
    """Picks of a space without searched widths from flat op codes (TuNAS's,
    HW-NAS-Bench's), one per searchable slot.
    """
    choices = [choice for choice in space.choices if choice.kind == "op"]
    return {choice.key: choice.options[code] for choice, code in zip(choices, codes, strict=True)}
