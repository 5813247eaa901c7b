"""TuNAS's linear model of Pixel 1 latency (arXiv 2008.06120), from its
``cost_model_data.py``: a coefficient per slot and option.

    latency = bias + sum over decisions of their coefficients

The file holds base64 of big-endian float32 numbers, one kernel and one bias per space.
In ``proxylessnas_search`` the 144 coefficients are ordered by layer, within it by kernel,
then by expansion, with skip last. They belong to positions and are determined only up to
a constant per layer, so negative ones are normal. The table therefore has ``slots``
instead of entries, and the bias is its intercept.

The file is searched for its constants, never executed. *Differences from the source*: its
two other spaces also have coefficients for widths, which slots cannot hold, so they are
refused.
"""

from __future__ import annotations

import base64
import binascii
import re

import numpy as np

from hwnas.core.families import proxylessnas
from hwnas.core.option import SKIP
from hwnas.tables.known import PIXEL1
from hwnas.tables.reading import Publication, PublishedConditions, Reading, Source

SPACE = "proxylessnas_search"
_PUBLICATION = Publication(
    origin="github.com/google-research/google-research, tunas/cost_model_data.py",
    licence="Apache-2.0",
    columns={SPACE: PublishedConditions(device=PIXEL1, runtime="netadapt-lut")},
    remark="a regression onto predictions from NetAdapt's lookup tables, not onto measurements",
)


def tunas(source: Source, column: str) -> Reading:
    """TuNAS's ``cost_model_data.py``; ``column`` names one of its spaces."""
    column = column or SPACE
    if column != SPACE:
        raise source.wrong(
            f"can only be read for {SPACE!r}: {column!r} is unknown, or has costs of widths, which"
            " a table cannot hold."
        )
    keys = []
    for slot in proxylessnas().slots:
        if len(slot.options) > 1:
            # The names of options sort by kernel, then expansion; skip comes last.
            for option in sorted(slot.options, key=lambda option: (option == SKIP, option)):
                keys.append((slot.key, option))

    kernel = _constants(source, "KERNEL", len(keys))
    slots: dict[str, dict[str, float]] = {}
    for (slot_key, option), ms in zip(keys, kernel, strict=True):
        slots.setdefault(slot_key, {})[option] = ms
    return Reading(
        "proxylessnas",
        "every searched slot; stem, head and classifier are in the intercept",
        slots=slots,
        intercept_ms=_constants(source, "BIAS", 1)[0],
        column=column,
        publication=_PUBLICATION,
    )


def _constants(source: Source, name: str, count: int) -> list[float]:
    """The numbers in one constant of the file. Raises TableError unless it holds exactly
    ``count`` finite numbers.
    """
    match = re.search(
        rf'^_{SPACE.upper()}_{name} = b"""([A-Za-z0-9+/=\s]*)"""', source.text, re.MULTILINE
    )
    if match is None:
        raise source.wrong(
            f"contains no constant _{SPACE.upper()}_{name}: it was cut off, or needs another"
            " --format."
        )
    try:
        content = base64.b64decode("".join(match[1].split()), validate=True)
    except binascii.Error as error:
        raise source.wrong(
            f"contains a {name} that is not base64 ({error}): it is corrupt; fetch it again."
        ) from error
    # numpy would raise a ValueError of its own for a length that does not fit.
    values = []
    if len(content) == 4 * count:
        values = np.frombuffer(content, ">f4").astype(float).tolist()
    if not values or not np.isfinite(values).all():
        raise source.wrong(
            f"contains {len(content)} bytes of {name}, not {count} finite float32 numbers: it is"
            " corrupt; fetch it again."
        )
    return values
