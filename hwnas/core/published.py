"""Published networks as architectures: picks of a built-in space if one contains the
network, else written out.

Sources:

- MobileNetV2 (arXiv 1801.04381), MnasNet-B1 (arXiv 1807.11626) and ProxylessNAS-Mobile:
  TuNAS's model archive (google-research:tunas/mobile_model_archive.py)
- other ProxylessNAS networks (arXiv 1812.00332): the authors' configurations
  (han-cai/files)
- Single-Path NAS (arXiv 1904.02877): timm's architecture string
- FBNet (arXiv 1812.03443): facebookresearch/mobile-vision
- FairNAS (arXiv 1907.01845): fairnas/FairNAS
- networks that are not picks: see ``hwnas.core.written``
- the detector ``ssdlite320_mobilenet_v3_large``: torchvision. Its last stages are half
  as wide (MobileNetV3, section 6.3), and its first tap is the expansion of the first
  block of stride 32.

FBNets exist with the expansion convolution of e = 1 (timm, HW-NAS-Bench) and without
(``_no_expand``, as in mobile-vision).

*Width multipliers* (``mobilenet_v2-w0.35``, or ``width``) round the width of every
layer to a multiple of 8 that is at least 90 % of the requested width. The rule for the
head, the last layer before the classifier, depends on the family:

- MobileNetV2: never made narrower (torchvision's ``width_mult``, timm's
  ``mobilenetv2_050``).
- MnasNet, Single-Path NAS, MobileNetV3, FBNet: always as published (torchvision's
  ``mnasnet0_5``; timm's ``mnasnet_140``, ``mobilenetv3_large_075`` and code for the
  others). MobileNetV3 below 0.75 also keeps its stem, as timm's
  ``mobilenetv3_small_050`` does. Expansions are multiples of the scaled input, as in
  timm; torchvision scales the rounded products instead.
- MobileNetV4: always as published, and below 1 the stem as well (timm's
  ``mobilenetv4_conv_small_050``).
- ProxylessNAS, FairNAS, Multi-AVG, Multi-MAX: no rule is published, so they follow that
  of MobileNetV2 (ours).
- The detector: no rule is published. Its backbone is scaled like MobileNetV3's but
  including the last layer (ours); its extras are not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hwnas.core.arch import Architecture
from hwnas.core.families import PROXYLESSNAS_FILTERS, Shape, fairnas, fbnet, proxylessnas
from hwnas.core.search_space import SearchSpace
from hwnas.core.size import Size
from hwnas.core.space import MacroSpace
from hwnas.core.ssdlite import SSDLiteSpec, split_expansion
from hwnas.core.written import WRITTEN, Written, widened, written
from hwnas.document import nearest
from hwnas.errors import SpaceError

_MOBILE = ("k3e3", "k5e3", "k7e3", "k3e6", "k5e6", "k7e6", "-")
_FBNET = ("k3e1", "k3e1g2", "k3e3", "k3e6", "k5e1", "k5e1g2", "k5e3", "k5e6", "-")
"""The codes of the options of a slot, in the order of its space. ``-`` is skip, or
FBNet's 1 x 1 convolution if the shape changes.
"""

_PROXYLESSNAS: dict[str, tuple[tuple[int, ...], str, str]] = {
    # name: filters (stem, separable layer, six stages, head), activation, codes of the
    # blocks in the six stages; the kernel of the separable layer is 3
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
    # name: width of the head, codes of the blocks in the seven stages
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
"""The names that ``published`` accepts."""


_FIXED_HEADS = ("mnasnet_b1", "single_path_nas")
"""Networks in the space of ProxylessNAS whose head keeps its width at any multiplier.
"""


def is_name(text: str) -> bool:
    """Whether a text looks like the name of a network, known or not, rather than an
    architecture in the notation of a space: it begins with a letter and has no
    whitespace or brackets.
    """
    return re.fullmatch(r"[A-Za-z][\w.-]*", text) is not None


def resolve_arch(
    name: str,
    space: SearchSpace,
    *,
    resolution: Size,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
) -> Architecture:
    """A published network by its name, ``width`` times as wide, or an architecture of
    ``space`` in its notation (``SearchSpace.read``).

    Raises SpaceError if ``name`` is neither, or if it contradicts ``width``.
    """
    if not is_name(name):
        return space.decode(space.read(name), f"{space.name}-named")

    _, width_in_name = split_width(name)
    if width_in_name is not None:
        if width not in (1.0, width_in_name):
            raise SpaceError(
                f"{name!r} sets a width, and so does space.width = {width:g}: remove one of them."
            )
        width = 1.0  # ``published`` applies the one in the name
    return published(
        name, resolution=resolution, classes=classes, in_channels=in_channels, width=width
    )


def has_detector(name: str) -> bool:
    """Whether the published network of this name has its own detector."""
    return split_width(name)[0] == _SSDLITE


def split_width(name: str) -> tuple[str, float | None]:
    """Split a name into that of the network and its width multiplier (None if it has
    none).

    Example:
        >>> split_width("mobilenet_v2-w0.35"), split_width("fbnet_a")
        (('mobilenet_v2', 0.35), ('fbnet_a', None))
    """
    match = re.fullmatch(r"(?P<base>.+)-w(?P<width>\d+(?:\.\d+)?)", name)
    if match is None:
        return name, None
    return match["base"], float(match["width"])


def published(
    name: str,
    *,
    resolution: Size | None = None,
    classes: int | None = None,
    bn_eps: float = 1e-3,
    in_channels: int = 3,
    width: float = 1.0,
) -> Architecture:
    """A published network. If it is given by picks, its origin is the space with the
    network's own widths and activation.

    ``resolution`` and ``classes`` default to those of the publication: 224 px for most
    networks and ImageNet's 1000 classes, or 320 px and COCO's 90 classes for a
    detector. ``width`` multiplies the widths; the name may contain a multiplier as well
    (``mobilenet_v2-w0.35``). See the module for the rules. Raises SpaceError if the
    name is unknown.

    Example:
        >>> published("mobilenet_v2").params, published("mobilenet_v2-w0.35").params
        (3504872, 1677128)
    """
    base, width_in_name = split_width(name)
    if width_in_name is not None:
        width *= width_in_name
    if base not in NETWORKS:
        raise SpaceError(f"unknown network {name!r}; {nearest(base, NETWORKS)}")

    default_resolution: Size = 224  # ImageNet
    default_classes = 1000
    if base == _SSDLITE:
        default_resolution, default_classes = 320, 90  # COCO
    elif base in WRITTEN:
        default_resolution = WRITTEN[base].resolution

    name = base if width == 1.0 else f"{base}-w{width:g}"
    shape = Shape(
        name=f"{name}-space",
        resolution=default_resolution if resolution is None else resolution,
        classes=default_classes if classes is None else classes,
        in_channels=in_channels,
        bn_eps=bn_eps,
    )
    if base in _PROXYLESSNAS:
        return _of_proxylessnas(base, name, shape, width)
    if base in _FAIRNAS:
        space = widened(fairnas(**shape), width)
        return space.decode(picks_of_codes(space, _codes(_FAIRNAS[base], _MOBILE)), name)
    if base.removesuffix("_no_expand") in _FBNETS:
        return _of_fbnet(base, name, shape, width)
    if base == _SSDLITE:
        return _ssdlite320_mobilenet_v3_large(name, shape, width)
    blocks = written(WRITTEN[base], shape, width)
    return Architecture(name=name, in_channels=in_channels, bn_eps=bn_eps, blocks=blocks)


def _of_proxylessnas(base: str, name: str, shape: Shape, width: float) -> Architecture:
    filters, act, blocks = _PROXYLESSNAS[base]
    last = 1.0 if base in _FIXED_HEADS else None
    space = widened(proxylessnas(filters, **shape | Shape(act=act)), width, last=last)
    # the first choice is the kernel of the separable layer: option 0 is 3
    return space.decode(picks_of_codes(space, [0, *_codes(blocks, _MOBILE)]), name)


def _of_fbnet(base: str, name: str, shape: Shape, width: float) -> Architecture:
    head, blocks = _FBNETS[base.removesuffix("_no_expand")]
    expand = not base.endswith("_no_expand")
    space = widened(fbnet(head=head, expand=expand, **shape), width, last=1.0)
    return space.decode(picks_of_codes(space, _codes(blocks, _FBNET)), name)


def _ssdlite320_mobilenet_v3_large(name: str, shape: Shape, width: float) -> Architecture:
    # without the classifier
    blocks = list(written(_SSDLITE_BACKBONE, shape, width, last=width)[:-1])
    # the last block with a stride is the first one of stride 32: its expansion is the
    # tap
    tap = max(position for position, op in enumerate(blocks) if op.stride == 2)
    blocks[tap : tap + 1] = split_expansion(blocks[tap])
    taps = (tap, len(blocks) - 1)
    maps = [(blocks[position].out_ch, blocks[position].out_size) for position in taps]
    detector = SSDLiteSpec().detector(taps, maps, shape["classes"])
    return Architecture(
        name=name,
        in_channels=shape["in_channels"],
        bn_eps=shape["bn_eps"],
        blocks=tuple(blocks),
        detector=detector,
    )


def _codes(blocks: str, names: Sequence[str]) -> list[int]:
    """The positions in ``names`` of blocks separated by whitespace and ``|``."""
    return [names.index(block) for block in blocks.replace("|", " ").split()]


def picks_of_codes(space: MacroSpace, codes: Sequence[int]) -> dict[str, str | int]:
    """Picks of a space without searched widths from flat op codes, one per searched
    slot, as in TuNAS and HW-NAS-Bench.
    """
    choices = [choice for choice in space.choices if choice.kind == "op"]
    return {choice.key: choice.options[code] for choice, code in zip(choices, codes, strict=True)}
