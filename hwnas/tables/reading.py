"""The input (``Source``) and the result (``Reading``) of a reader of a foreign format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from hwnas.core.ops import Op
from hwnas.core.table import Entry
from hwnas.document import LARGEST_BYTES, decoded_text, quoted_path, read_bytes
from hwnas.errors import TableError
from hwnas.printable import quoted

UNKNOWN: Literal["unknown"] = "unknown"
CLAMPS = ("relu", "relu6")
"""If a source does not name the activation of a block, the block is entered with each of
these. They are what the networks of these sources use, and as both clamp the result of
the convolution, they cost the same.
"""
LONGEST_MS = 1e9
"""No op takes longer than 11 days. Larger numbers come from damaged files."""
NOISY_ABOVE = 0.1
"""If the values of one op spread more than this, its entry is marked as noisy. This is
also the limit of our own profiles.
"""
GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
_LONGEST_QUOTE = 40
"""Longer values are shortened in error messages, to this many characters."""


LARGEST_TEXT = 2**28
"""Bytes of the largest text that is read, unpacked. The largest published tables have a
tenth of it, but a gzip file of a megabyte can unpack to a gigabyte.
"""


def _unpacked(stored: bytes) -> bytes:
    """The content of a gzip file, at most one byte more than ``LARGEST_TEXT``."""
    with gzip.GzipFile(fileobj=io.BytesIO(stored)) as file:
        return file.read(LARGEST_TEXT + 1)


@dataclass(frozen=True)
class Source:
    """A file to import: its ``name`` for messages, its decompressed text, and the sha256
    of the file on disk, before decompression.
    """

    name: str
    text: str
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a text file, gzipped or not. Raises TableError if it is neither, and
        DocumentError if it cannot be read.
        """
        stored = read_bytes(path, at_most=LARGEST_BYTES)
        name = quoted_path(path)
        try:
            content = stored
            if stored.startswith(GZIP_MAGIC):
                content = _unpacked(stored)
            if len(content) > LARGEST_TEXT:
                raise TableError(
                    f"{name} unpacks to more than {LARGEST_TEXT // 2**20} MiB: no table or list of"
                    " networks is that large; check the file."
                )
            text = decoded_text(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TableError(
                f"{name} cannot be unpacked ({error}): it is corrupt or was cut off; fetch it"
                " again."
            ) from error
        except UnicodeDecodeError as error:
            raise TableError(
                f"{name} is not text (byte {error.start}): convert it first; pickle files are never"
                " read."
            ) from error
        return cls(name, text, hashlib.sha256(stored).hexdigest())

    def wrong(self, why: str) -> TableError:
        """The error for a wrong file, to be raised. ``why`` follows the file's name: what
        is wrong and what to do.
        """
        return TableError(f"{self.name} {why}")

    def json_object(self) -> dict[str, Any]:
        """The content as a JSON object. Raises TableError if it is not one."""
        try:
            content = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.wrong(
                f"is not valid JSON ({error}): it is corrupt, was cut off, or needs another"
                " --format."
            ) from error
        if not isinstance(content, dict):
            raise self.wrong(
                f"contains a JSON {type(content).__name__} instead of an object: choose another"
                " --format."
            )
        return content

    def number(self, value: Any, of: str) -> float:
        """``value`` as a finite number. Raises TableError if it is not one; ``of`` says
        in the message what was read.
        """
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        # JSON's ``true`` would otherwise pass as 1.
        if isinstance(value, bool) or not math.isfinite(number):
            raise self.wrong(
                f"has {quoted(value, _LONGEST_QUOTE)} for {of}, which is not a number: it is"
                " corrupt, was cut off, or needs another --format."
            )
        return number

    def ms(self, value: Any, of: str, unit_ms: float = 1.0) -> float:
        """``value`` in units of ``unit_ms`` as milliseconds. Raises TableError if it is
        not finite or is negative.
        """
        number = self.number(value, of)
        ms = number * unit_ms
        if not 0 <= ms <= LONGEST_MS:
            raise self.wrong(
                f"has {number:g} for {of}, which is not a valid time: correct or remove that entry."
            )
        return ms


@dataclass(frozen=True)
class PublishedConditions:
    """The header fields that a publication states. Others are unknown."""

    device: str = UNKNOWN
    cpu: str = UNKNOWN
    runtime: str = UNKNOWN
    threads: int | Literal["unknown"] = UNKNOWN
    batch: int | Literal["unknown"] = UNKNOWN


@dataclass(frozen=True)
class Publication:
    """Facts about a published file that it does not contain itself: its origin, its
    licence, and the conditions of each of its columns.

    Columns that are not listed are not useful.
    """

    origin: str = UNKNOWN
    licence: str = UNKNOWN
    columns: dict[str, PublishedConditions] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Reading:
    """What a reader extracted from a source: entries by op key, or milliseconds by slot
    and option with their intercept.

    ``covers`` says what one entry of the source stands for, ``space`` is the built-in
    space that has these blocks. ``unmapped`` maps everything that does not correspond to
    an op to the reason. ``column`` is the column that was read, if the source has
    several.
    """

    space: str
    covers: str
    entries: dict[str, Entry] = field(default_factory=dict)
    slots: dict[str, dict[str, float]] = field(default_factory=dict)
    intercept_ms: float | None = None
    unmapped: dict[str, str] = field(default_factory=dict)
    column: str = ""
    publication: Publication | None = None


@dataclass(frozen=True)
class TimedOp:
    """One op's time in a source. ``runs`` is the number of measurements, if the source
    states it.
    """

    op: Op
    ms: float
    runs: int | Literal["unknown"] = UNKNOWN


def entries_of(rows: Iterable[TimedOp]) -> dict[str, Entry]:
    """Table entries from times. If a source has several times for one op, because equal
    blocks stand at several positions, each counts as a round.

    ``ms`` is then their median, and ``spread`` their interquartile range divided by it,
    as in a profile.
    """
    by_key: dict[str, list[TimedOp]] = {}
    for row in rows:
        by_key.setdefault(row.op.key, []).append(row)
    return {key: _entry(op_rows) for key, op_rows in by_key.items()}


def _entry(rows: list[TimedOp]) -> Entry:
    """The entry of one op, from all its times."""
    if len(rows) == 1:
        return Entry(ms=rows[0].ms, runs=rows[0].runs)
    low, median, high = np.percentile([row.ms for row in rows], [25, 50, 75]).tolist()
    spread: float | Literal["unknown"] = UNKNOWN
    if median > 0 and math.isfinite((high - low) / median):
        spread = (high - low) / median
    runs = [row.runs for row in rows if isinstance(row.runs, int)]
    return Entry(
        ms=median,
        runs=sum(runs) if len(runs) == len(rows) else UNKNOWN,
        rounds=len(rows),
        spread=spread,
        noisy=spread == UNKNOWN or spread > NOISY_ABOVE,
    )
