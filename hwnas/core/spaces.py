"""The built-in search spaces by name, and loading of space documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hwnas.core.cell_families import darts, darts_imagenet, nasbench101, nasbench201, nds_darts
from hwnas.core.cells import CellSpace
from hwnas.core.families import (
    Shape,
    fairnas,
    fbnet,
    fbnet_no_expand,
    mobile32,
    mobilenet_v3_like,
    mobilenet_v4,
    nasbench_macro,
    ofa_mobilenet_v3,
    proxylessnas,
    proxylessnas_enlarged,
    proxylessnas_original,
)
from hwnas.core.nasbench101 import NASBench101Space
from hwnas.core.published import picks_of_codes, published
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.document import explain, nearest, read_bytes
from hwnas.errors import SpaceError

__all__ = [
    "CELL_SPACES",
    "DARTS_SPACES",
    "MACRO_SPACES",
    "SPACES",
    "darts",
    "darts_imagenet",
    "fairnas",
    "fbnet",
    "fbnet_no_expand",
    "load_space",
    "mobile32",
    "mobilenet_v3_like",
    "mobilenet_v4",
    "nasbench101",
    "nasbench201",
    "nasbench_macro",
    "nds_darts",
    "ofa_mobilenet_v3",
    "parse_space",
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
    mobilenet_v4,
    nasbench_macro,
    mobile32,
)
_DARTS_BUILDERS: tuple[Callable[..., CellSpace], ...] = (darts, darts_imagenet, nds_darts)
_CELL_BUILDERS: tuple[Callable[..., CellSpace], ...] = (nasbench201, *_DARTS_BUILDERS)
MACRO_SPACES: dict[str, Callable[..., MacroSpace]] = {build.__name__: build for build in _BUILDERS}
CELL_SPACES: dict[str, Callable[..., CellSpace]] = {
    build.__name__: build for build in _CELL_BUILDERS
}
DARTS_SPACES = tuple(build.__name__ for build in _DARTS_BUILDERS)
"""The spaces that take ``layers``."""
SPACES: dict[str, Callable[..., SearchSpace]] = {
    **MACRO_SPACES,
    **CELL_SPACES,
    "nasbench101": nasbench101,
}
_KINDS: dict[str, type[SearchSpace]] = {
    "macro": MacroSpace,
    "cell": CellSpace,
    "nasbench101": NASBench101Space,
}


def is_document(name_or_path: str) -> bool:
    """Whether ``load_space`` would read a file rather than build a built-in space."""
    return name_or_path not in SPACES and Path(name_or_path).suffix == ".json"


def load_space(name_or_path: str, **overrides: Any) -> SearchSpace:
    """Build a built-in space by name, or load a space document from a file.

    ``overrides`` are the fields of ``Shape``, and ``layers`` for the DARTS spaces. A
    document takes none. Raises SpaceError if the name or an override is unknown or
    invalid, DocumentError if the file is not a space document.

    Example:
        >>> load_space("fbnet", width=0.5, resolution=32, classes=10).size == 9**22
        True
    """
    if name_or_path in SPACES:
        known = list(Shape.__annotations__)
        if name_or_path in DARTS_SPACES:
            known.append("layers")
        unknown = sorted(overrides.keys() - set(known))
        if unknown:
            raise SpaceError(
                f"space {name_or_path!r} does not take the override {unknown[0]!r};"
                f" {nearest(unknown[0], known)}"
            )
        # values, such as a negative resolution, are checked by pydantic
        try:
            return SPACES[name_or_path](**overrides)
        except ValidationError as error:
            raise SpaceError(f"space {name_or_path!r}: {explain(error, SearchSpace)}") from error

    if is_document(name_or_path):
        if overrides:
            raise SpaceError(
                f"a space from a file ({name_or_path}) takes no overrides: edit the document, or"
                f" remove {', '.join(overrides)}."
            )
        return parse_space(read_bytes(name_or_path), name_or_path)

    raise SpaceError(
        f"unknown space {name_or_path!r}; {nearest(name_or_path, SPACES)} A path must end in .json."
    )


def parse_space(text: str | bytes, source: str = "document") -> SearchSpace:
    """Parse a space document of any kind. Raises DocumentError, naming ``source``, if
    it is not one.
    """
    # documents without a kind are macro spaces, whose parser also reports bad JSON
    kind = "macro"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        kind = str(content.get("kind", kind))
    return _KINDS.get(kind, MacroSpace).parse(text, source)
