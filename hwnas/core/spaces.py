"""The built-in search spaces, and the published networks that are picks in them.

``proxylessnas`` is TuNAS's ``proxylessnas_search`` (Bender et al., CVPR 2020, arXiv 2008.06120; google-research:tunas/
mobile_search_space_v3.py): a stem, a depthwise-separable layer, five stages of one shape-changing and three skippable
inverted residuals, one last inverted residual, a 1 x 1 head. Kernel {3, 5, 7}, expansion {3, 6}, ReLU, no SE.

*Differences from the paper's code*: 1000 classes instead of 1001; the classifier is pooling and a fully connected layer
instead of a 1 x 1 convolution and pooling, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hwnas.core.arch import Architecture
from hwnas.core.option import SKIP
from hwnas.core.space import MacroSpace, SearchSpace, Stage
from hwnas.document import explain, nearest
from hwnas.errors import SpaceError

KERNELS_EXPANSIONS = ("ir_k3_e3", "ir_k5_e3", "ir_k7_e3", "ir_k3_e6", "ir_k5_e6", "ir_k7_e6")
"""Inverted residuals in the order of TuNAS's model archive: index 3 * [e = 6] + kernel index; skip is index 6."""

PROXYLESSNAS_FILTERS = (32, 16, 32, 40, 80, 96, 192, 320, 1280)


def proxylessnas(
    filters: tuple[int, ...] = PROXYLESSNAS_FILTERS,
    *,
    name: str = "proxylessnas",
    resolution: int = 224,
    in_channels: int = 3,
    classes: int = 1000,
    act: str = "relu",
    bn_eps: float = 1e-3,
) -> MacroSpace:
    """TuNAS's ProxylessNAS space: 22 searchable slots, 15 of them skippable, 3 * 6^6 * 7^15 architectures.

    ``filters`` are the widths of stem, separable layer, stages 2 to 7 and head.
    """
    first, later = KERNELS_EXPANSIONS, (*KERNELS_EXPANSIONS, SKIP)
    strides = (2, 2, 2, 1, 2)
    stages = [
        Stage(widths=(filters[0],), stride=2, slots=(("cn_k3",),)),
        Stage(widths=(filters[1],), slots=(("ds_k3", "ds_k5", "ds_k7"),)),
        *(
            Stage(widths=(width,), stride=stride, slots=(first, later, later, later))
            for width, stride in zip(filters[2:7], strides, strict=True)
        ),
        Stage(widths=(filters[7],), slots=(first,)),
        Stage(widths=(filters[8],), slots=(("cn_k1",),)),
    ]
    return MacroSpace(
        name=name, resolution=resolution, in_channels=in_channels, classes=classes, act=act, bn_eps=bn_eps, stages=tuple(stages)
    )


def mobile32(
    *, name: str = "mobile32", resolution: int = 32, in_channels: int = 3, classes: int = 10, act: str = "relu", bn_eps: float = 1e-3
) -> MacroSpace:
    """The same family for 32-pixel images (ours): stride 1 in the stem, four searched stages, no 7 x 7 kernels.

    Small images leave no room for five halvings: the last stage works at 4 x 4. Kernels above 5 would be wider than that.
    """
    first = tuple(option for option in KERNELS_EXPANSIONS if "k7" not in option)
    later = (*first, SKIP)
    stages = [
        Stage(widths=(16,), slots=(("cn_k3",),)),
        Stage(widths=(16,), slots=(("ds_k3", "ds_k5"),)),
        Stage(widths=(24,), stride=2, slots=(first, later, later)),
        Stage(widths=(40,), stride=2, slots=(first, later, later)),
        Stage(widths=(64,), slots=(first, later, later)),
        Stage(widths=(96,), stride=2, slots=(first, later, later)),
        Stage(widths=(160,), slots=(first,)),
        Stage(widths=(320,), slots=(("cn_k1",),)),
    ]
    return MacroSpace(
        name=name, resolution=resolution, in_channels=in_channels, classes=classes, act=act, bn_eps=bn_eps, stages=tuple(stages)
    )


SPACES: dict[str, Callable[..., MacroSpace]] = {"proxylessnas": proxylessnas, "mobile32": mobile32}

_PUBLISHED: dict[str, tuple[tuple[int, ...], str, str]] = {
    # name: filters, activation, op codes (tunas/mobile_model_archive.py)
    "mobilenet_v2": ((32, 16, 24, 32, 64, 96, 160, 320, 1280), "relu6", "0,3,3,6,6,3,3,3,6,3,3,3,3,3,3,3,6,3,3,3,6,3"),
    "mnasnet_b1": ((32, 16, 24, 40, 80, 96, 192, 320, 1280), "relu", "0,0,0,0,6,1,1,1,6,4,4,4,6,3,3,6,6,4,4,4,4,3"),
    "proxylessnas_mobile": (PROXYLESSNAS_FILTERS, "relu6", "0,1,0,6,6,2,0,1,1,5,1,1,1,4,1,1,1,5,5,2,2,5"),
}


def published(name: str, *, resolution: int = 224, classes: int = 1000, bn_eps: float = 1e-3) -> Architecture:
    """A published network, decoded from its picks in the ProxylessNAS space of its own widths and activation.

    Example:
        >>> published("mobilenet_v2").params
        3504872
    """
    if name not in _PUBLISHED:
        raise SpaceError(f"unknown network {name!r}; {nearest(name, _PUBLISHED)}")
    filters, act, codes = _PUBLISHED[name]
    space = proxylessnas(filters, name=f"{name}-space", resolution=resolution, classes=classes, act=act, bn_eps=bn_eps)
    return space.decode(picks_of_codes(space, [int(code) for code in codes.split(",")]), name)


def picks_of_codes(space: MacroSpace, codes: list[int]) -> dict[str, str | int]:
    """Picks of a ProxylessNAS-style space from TuNAS's flat op codes, one per searchable slot."""
    choices = [choice for choice in space.choices if choice.kind == "op"]
    return {choice.key: choice.options[code] for choice, code in zip(choices, codes, strict=True)}


def load_space(name_or_path: str, **overrides: Any) -> SearchSpace:
    """A built-in space by name (``overrides``: resolution, classes, act, ...), or a space document from a file."""
    if name_or_path in SPACES:
        try:
            return SPACES[name_or_path](**overrides)
        except TypeError as error:
            raise SpaceError(f"space {name_or_path!r} takes no such override ({', '.join(overrides)}): {error}.") from error
        except ValidationError as error:
            raise SpaceError(f"space {name_or_path!r}: {explain(error, MacroSpace)}") from error
    if Path(name_or_path).suffix == ".json":
        if overrides:
            raise SpaceError(
                f"a space from a file ({name_or_path}) takes no overrides: edit the document, or remove {', '.join(overrides)}."
            )
        return MacroSpace.load(name_or_path)
    raise SpaceError(f"unknown space {name_or_path!r}; {nearest(name_or_path, SPACES)} A path must end in .json.")
