"""The built-in search spaces by name, and space documents from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hwnas.core.families import (
    Shape,
    fairnas,
    fbnet,
    fbnet_no_expand,
    mobile32,
    mobilenet_v3_like,
    nasbench_macro,
    ofa_mobilenet_v3,
    proxylessnas,
    proxylessnas_enlarged,
    proxylessnas_original,
)
from hwnas.core.published import picks_of_codes, published
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.document import explain, nearest
from hwnas.errors import SpaceError

__all__ = [
    "SPACES",
    "fairnas",
    "fbnet",
    "fbnet_no_expand",
    "load_space",
    "mobile32",
    "mobilenet_v3_like",
    "nasbench_macro",
    "ofa_mobilenet_v3",
    "picks_of_codes",
    "proxylessnas",
    "proxylessnas_enlarged",
    "proxylessnas_original",
    "published",
]

_BUILDERS: tuple[Callable[..., MacroSpace], ...] = (
    proxylessnas,
    proxylessnas_enlarged,
    mobilenet_v3_like,
    proxylessnas_original,
    fbnet,
    fbnet_no_expand,
    fairnas,
    ofa_mobilenet_v3,
    nasbench_macro,
    mobile32,
)
SPACES: dict[str, Callable[..., MacroSpace]] = {build.__name__: build for build in _BUILDERS}


def load_space(name_or_path: str, **overrides: Any) -> SearchSpace:
    """A built-in space by name (``overrides``: those of ``Shape``), or a space document from a file.

    Example:
        >>> load_space("fbnet", width=0.5, resolution=32, classes=10).size == 9**22
        True
    """
    if name_or_path in SPACES:
        unknown = sorted(overrides.keys() - Shape.__annotations__.keys())
        if unknown:
            raise SpaceError(
                f"space {name_or_path!r} takes no such override as {unknown[0]!r}; {nearest(unknown[0], Shape.__annotations__)}"
            )
        try:
            return SPACES[name_or_path](**overrides)
        except ValidationError as error:
            raise SpaceError(f"space {name_or_path!r}: {explain(error, MacroSpace)}") from error
    if Path(name_or_path).suffix == ".json":
        if overrides:
            raise SpaceError(
                f"a space from a file ({name_or_path}) takes no overrides: edit the document, or remove {', '.join(overrides)}."
            )
        return MacroSpace.load(name_or_path)
    raise SpaceError(f"unknown space {name_or_path!r}; {nearest(name_or_path, SPACES)} A path must end in .json.")
