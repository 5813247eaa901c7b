"""What a reader of a foreign format gets (``Source``), and what it gives back (``Reading``)."""

from __future__ import annotations

import gzip
import hashlib
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
from hwnas.document import read_bytes
from hwnas.errors import TableError

UNKNOWN: Literal["unknown"] = "unknown"
CLAMPS = ("relu", "relu6")
"""Activations under which a block is entered where its source names none: both are a
clamp inside the convolution, and what the networks of these sources use.
"""
NOISY_ABOVE = 0.1
"""Spread of several values for one op from which on the entry is marked noisy: the
limit of our own profiles.
"""


@dataclass(frozen=True)
class Source:
    """A file to import: ``name`` for messages, its decompressed text, and the sha256 of
    the file as it lies on disk.
    """

    name: str
    text: str
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a text file, gzipped or not. Raises TableError where it is neither,
        DocumentError where it cannot be read.
        """
        stored = read_bytes(path)
        try:
            content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
            return cls(str(path), content.decode(), hashlib.sha256(stored).hexdigest())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TableError(
                f"{path} does not unpack ({error}): it is corrupt or was cut off; fetch it again."
            ) from error
        except UnicodeDecodeError as error:
            raise TableError(
                f"{path} is not text (byte {error.start}): convert it first; pickle files are never"
                " read."
            ) from error

    def wrong(self, why: str) -> TableError:
        """The error of a file that is not what it should be: ``why`` says what is wrong
        and what to do.
        """
        return TableError(f"{self.name} {why}")

    def json_object(self) -> dict[str, Any]:
        """The content as a JSON object. Raises TableError where it is none."""
        try:
            content = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.wrong(
                f"is not valid JSON ({error}): it is corrupt, was cut off, or needs another"
                " --format."
            ) from error
        if not isinstance(content, dict):
            raise self.wrong(
                f"holds a JSON {type(content).__name__} instead of an object: choose another"
                " --format."
            )
        return content

    def number(self, value: Any, of: str) -> float:
        """``value`` as a finite number. Raises TableError naming what it should be a
        time ``of``.
        """
        try:
            found = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
            raise self.wrong(
                f"has {shown} for {of}, where a number is needed: it is corrupt, was cut off, or"
                " needs another --format."
            )
        return found

    def ms(self, value: Any, of: str, unit_ms: float = 1.0) -> float:
        """``value`` times ``unit_ms`` as a time: finite and not below 0."""
        found = self.number(value, of)
        if found < 0:
            raise self.wrong(
                f"has {found:g} for {of}, where a time is needed: correct or remove that entry."
            )
        return found * unit_ms


@dataclass(frozen=True)
class Conditions:
    """The header fields that a publication gives; what it does not give is unknown."""

    device: str = UNKNOWN
    cpu: str = UNKNOWN
    runtime: str = UNKNOWN
    threads: int | Literal["unknown"] = UNKNOWN
    batch: int | Literal["unknown"] = UNKNOWN


@dataclass(frozen=True)
class Publication:
    """What is known of a published file beyond its content: where it is from, its
    licence, and what each of its columns is.

    Columns that are not listed hold nothing of use.
    """

    origin: str = UNKNOWN
    licence: str = UNKNOWN
    columns: dict[str, Conditions] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Reading:
    """What a reader made of a source: entries by op key, or prices by slot and option
    with their intercept.

    ``covers`` says what one entry of the source stands for, ``space`` the built-in
    space whose blocks they are. ``unmapped`` names everything that no op stands for,
    with the reason. ``column`` is the one that was read, where the source has several.
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
class Timed:
    """One op's time in a source; ``runs`` is how often it was measured, where the
    source says so.
    """

    op: Op
    ms: float
    runs: int | Literal["unknown"] = UNKNOWN


def entries_of(rows: Iterable[Timed]) -> dict[str, Entry]:
    """Entries from times. An op that a source prices several times (equal blocks at
    several positions) counts each as a round.

    Its ``ms`` is then their median and ``spread`` their interquartile range divided by
    it, as in a profile.
    """
    by_key: dict[str, list[Timed]] = {}
    for row in rows:
        by_key.setdefault(row.op.key, []).append(row)
    return {key: _entry(found) for key, found in by_key.items()}


def _entry(rows: list[Timed]) -> Entry:
    if len(rows) == 1:
        return Entry(ms=rows[0].ms, runs=rows[0].runs)
    low, middle, high = (
        float(value) for value in np.percentile([row.ms for row in rows], [25, 50, 75])
    )
    counts = [row.runs for row in rows if isinstance(row.runs, int)]
    spread: float | Literal["unknown"] = (high - low) / middle if middle > 0 else UNKNOWN
    return Entry(
        ms=middle,
        runs=sum(counts) if len(counts) == len(rows) else UNKNOWN,
        rounds=len(rows),
        spread=spread,
        noisy=spread == UNKNOWN or spread > NOISY_ABOVE,
    )
