"""The kinds of detectors, by the names that documents and configurations use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hwnas.core.fcos import FCOS, FCOSSpec
from hwnas.core.ssdlite import SSDLite, SSDLiteSpec


def _kind(value: Any) -> str:
    """The kind of a detector or of a specification. SSDLite names none: its documents are
    older than the other kinds.
    """
    if isinstance(value, Mapping):
        return str(value.get("kind", SSDLiteSpec.KIND))
    return str(getattr(value, "kind", SSDLiteSpec.KIND))


AnyDetector = Annotated[
    Annotated[SSDLite, Tag("ssdlite")] | Annotated[FCOS, Tag("fcos")], Discriminator(_kind)
]
"""A detector as a field of a document."""
AnySpec = Annotated[
    Annotated[SSDLiteSpec, Tag("ssdlite")] | Annotated[FCOSSpec, Tag("fcos")],
    Discriminator(_kind),
]
"""A specification as a field of a document."""
