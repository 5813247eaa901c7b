"""Two tables side by side: what the same op costs in each, and how far their orders agree."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hwnas.core.describe import columns
from hwnas.core.statistics import rank_correlation
from hwnas.core.table import LatencyTable
from hwnas.errors import TableError

NAMED = 10
"""Ops of one table alone that the text names; JSON names all."""


@dataclass(frozen=True)
class Ratio:
    """One op in both tables; ``ratio`` is a / b."""

    op: str
    a_ms: float
    b_ms: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` finds. ``ratios`` are sorted, smallest first; ``spearman`` is
    none for fewer than three ops, or all alike.

    ``zero`` are common ops that cost nothing in one of the tables: they have no ratio.
    """

    a: str
    b: str
    ratios: tuple[Ratio, ...]
    median: float
    lowest: float
    highest: float
    spearman: float | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    zero: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def compare(a: LatencyTable, b: LatencyTable) -> Comparison:
    """Compare the entries of two tables, op by op.

    Ops that differ in ReLU and ReLU6 alone, and cost the same, are one: importers enter
    a block under both where its source names no activation. Raises TableError where the
    tables have no op in common, or price positions, whose ratios mean nothing.
    """
    for table in (a, b):
        if not table.entries:
            raise TableError(
                f"table {table.title} prices positions of a space, not ops, so that ratios mean"
                " nothing: compare tables of ops."
            )
    common = [key for key in a.entries if key in b.entries]
    if not common:
        raise TableError(
            f"tables {a.title} and {b.title} have no op in common ({next(iter(a.entries))} ... and"
            f" {next(iter(b.entries))} ...): compare tables of the same space, resolution and"
            " activation."
        )
    pairs = {(_clamped(key), a.entries[key].ms, b.entries[key].ms): key for key in reversed(common)}
    timed = [(key, a_ms, b_ms) for (_, a_ms, b_ms), key in pairs.items()]
    ratios = sorted(
        (Ratio(key, a_ms, b_ms, a_ms / b_ms) for key, a_ms, b_ms in timed if a_ms > 0 and b_ms > 0),
        key=lambda one: one.ratio,
    )
    if not ratios:
        raise TableError(
            f"all ops common to tables {a.title} and {b.title} cost 0 ms in one of them: there is"
            " nothing to compare."
        )
    values = np.array([one.ratio for one in ratios])
    a_ms, b_ms = np.array([one.a_ms for one in ratios]), np.array([one.b_ms for one in ratios])
    return Comparison(
        a=a.title,
        b=b.title,
        ratios=tuple(ratios),
        median=float(np.median(values)),
        lowest=float(values[0]),
        highest=float(values[-1]),
        spearman=rank_correlation(a_ms, b_ms),
        only_a=_alone(a, common),
        only_b=_alone(b, common),
        zero=tuple(key for key, a_ms, b_ms in timed if not (a_ms > 0 and b_ms > 0)),
    )


def _clamped(key: str) -> str:
    """The key with ReLU for ReLU6."""
    return key.replace("-relu6", "-relu")


def _alone(table: LatencyTable, common: list[str]) -> tuple[str, ...]:
    """Ops of ``table`` beside the ``common`` ones; of those that differ in the clamp
    alone, the first.
    """
    seen = {(_clamped(key), table.entries[key].ms) for key in common}
    alone: dict[tuple[str, float], str] = {}
    for key, entry in table.entries.items():
        if (_clamped(key), entry.ms) not in seen:
            alone.setdefault((_clamped(key), entry.ms), key)
    return tuple(alone.values())


def describe_comparison(found: Comparison, width: int = 80) -> str:
    """As text of at most ``width`` columns (60 suffice); the milliseconds are left out
    where they do not fit.
    """
    rows = [("a / b", "a ms", "b ms", "op")]
    rows += [
        (f"{one.ratio:.2f}", f"{one.a_ms:.4g}", f"{one.b_ms:.4g}", one.op) for one in found.ratios
    ]
    ratios = columns(rows)
    if max(map(len, ratios.splitlines())) > width:
        ratios = columns((ratio, op) for ratio, _, _, op in rows)
    rank = "" if found.spearman is None else f", Spearman {found.spearman:.3f}"
    count = f"{len(found.ratios)} op{'s' if len(found.ratios) > 1 else ''} in both"
    lines = [
        *textwrap.wrap(f"a  {found.a}", width, subsequent_indent="   "),
        *textwrap.wrap(f"b  {found.b}", width, subsequent_indent="   "),
        *textwrap.wrap(
            f"{count}: a / b from {found.lowest:.2f} to {found.highest:.2f}, median"
            f" {found.median:.2f}{rank}",
            width,
        ),
        ratios,
    ]
    for label, keys in (
        ("only in a", found.only_a),
        ("only in b", found.only_b),
        ("0 ms in a or b", found.zero),
    ):
        more = [f"  and {len(keys) - NAMED} more; --json names them"] if len(keys) > NAMED else []
        lines += (
            [f"{label}: {len(keys)}", *(f"  {key}" for key in keys[:NAMED]), *more] if keys else []
        )
    return "\n".join(lines)
