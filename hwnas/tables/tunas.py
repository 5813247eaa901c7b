"""TuNAS's linear model of Pixel 1 latency (arXiv 2008.06120), from its
``cost_model_data.py``: a price per slot and option.

    latency = bias + sum over decisions of their coefficients

The file holds base64 of big-endian float32, one kernel and one bias per space. In
``proxylessnas_search`` the 144 coefficients are ordered by layer, in it by kernel, then
expansion, skip last. They belong to positions, and are free up to a constant per layer,
so negative ones are normal: the table has ``slots`` instead of entries, and the bias is
its intercept.

The file is searched for its constants, never run. *Differences from the source*: its
two other spaces price widths as well, for which slots have no place; they are refused.
"""

from __future__ import annotations

import base64
import binascii
import re

import numpy as np

from hwnas.core.families import proxylessnas
from hwnas.core.option import SKIP
from hwnas.tables.known import PIXEL1
from hwnas.tables.reading import Conditions, Publication, Reading, Source

SPACE = "proxylessnas_search"
_PUBLICATION = Publication(
    origin="github.com/google-research/google-research, tunas/cost_model_data.py",
    licence="Apache-2.0",
    columns={SPACE: Conditions(device=PIXEL1, runtime="netadapt-lut")},
    remark="a regression onto predictions from NetAdapt's lookup tables, not onto measurements",
)


def tunas(source: Source, column: str) -> Reading:
    """TuNAS's ``cost_model_data.py``; ``column`` names one of its spaces."""
    column = column or SPACE
    if column != SPACE:
        raise source.wrong(
            f"is read for {SPACE!r} alone: {column!r} is unknown, or prices widths, for which a"
            " table has no place."
        )
    layers = [slot for slot in proxylessnas().slots if len(slot.options) > 1]
    keys = [
        (slot.key, option)
        for slot in layers
        for option in sorted(slot.options, key=lambda option: (option == SKIP, option))
    ]
    kernel = _constants(source, "KERNEL", len(keys))
    slots: dict[str, dict[str, float]] = {}
    for (slot, option), ms in zip(keys, kernel, strict=True):
        slots.setdefault(slot, {})[option] = ms
    return Reading(
        "proxylessnas",
        "every searched slot; stem, head and classifier are in the intercept",
        slots=slots,
        intercept_ms=_constants(source, "BIAS", 1)[0],
        column=column,
        publication=_PUBLICATION,
    )


def _constants(source: Source, name: str, count: int) -> list[float]:
    """The numbers of one constant of the file. Raises TableError where there are not
    ``count`` finite ones.
    """
    match = re.search(
        rf'^_{SPACE.upper()}_{name} = b"""([A-Za-z0-9+/=\s]*)"""', source.text, re.MULTILINE
    )
    if match is None:
        raise source.wrong(
            f"holds no constant _{SPACE.upper()}_{name}: it was cut off, or needs another --format."
        )
    try:
        content = base64.b64decode("".join(match[1].split()), validate=True)
    except binascii.Error as error:
        raise source.wrong(
            f"holds a {name} that is not base64 ({error}): it is corrupt; fetch it again."
        ) from error
    values = (
        [float(value) for value in np.frombuffer(content, ">f4")]
        if len(content) == 4 * count
        else []
    )
    if not values or not np.isfinite(values).all():
        raise source.wrong(
            f"holds {len(content)} bytes of {name}, not {count} finite numbers of 4: it is corrupt;"
            " fetch it again."
        )
    return values
