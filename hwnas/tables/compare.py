"""Comparison of two tables: the ratio of each op's latencies, and the rank correlation of
all of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hwnas.core.describe import columns
from hwnas.core.statistics import rank_correlation
from hwnas.core.table import LatencyTable
from hwnas.errors import TableError

MAX_LISTED = 10
"""How many ops of each group the text lists. JSON lists all."""


class Ratio(NamedTuple):
    """One op in both tables; ``ratio`` is a / b."""

    op: str
    a_ms: float
    b_ms: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    ``ratios`` are sorted in ascending order; ``median``, ``lowest`` and ``highest``
    summarise them. ``spearman`` is None for fewer than three ops, or if all latencies of
    a table are equal. ``only_a`` and ``only_b`` are ops that the other table lacks.
    ``zero`` are common ops that take 0 ms in one of the tables, so they have no ratio.
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
        return {**vars(self), "ratios": [ratio._asdict() for ratio in self.ratios]}


def compare(a: LatencyTable, b: LatencyTable) -> Comparison:
    """Compare the entries of two tables, op by op.

    Ops that differ only in ReLU or ReLU6 and have the same latencies count once, because
    importers enter a block under both if its source does not name the activation. Raises
    TableError if the tables have no op in common, or if one is a positional model, whose
    ratios are meaningless.
    """
    for table in (a, b):
        if not table.entries:
            raise TableError(
                f"table {table.title} has costs for positions of a space, not ops, so ratios are"
                " meaningless: compare tables of ops."
            )
    a_ms_of = {key: entry.ms for key, entry in a.entries.items()}
    b_ms_of = {key: entry.ms for key, entry in b.entries.items()}
    common = [key for key in a_ms_of if key in b_ms_of]
    if not common:
        raise TableError(
            f"tables {a.title} and {b.title} have no op in common ({next(iter(a.entries))} ... and"
            f" {next(iter(b.entries))} ...): compare tables of the same space, resolution and"
            " activation."
        )
    # Reversed, so that of equal ops the first key in the table is kept.
    distinct: dict[tuple[str, float, float], str] = {}
    for key in reversed(common):
        distinct[_clamped(key), a_ms_of[key], b_ms_of[key]] = key

    ratios = []
    zero = []
    for (_, a_ms, b_ms), key in distinct.items():
        if a_ms > 0 and b_ms > 0:
            ratios.append(Ratio(key, a_ms, b_ms, a_ms / b_ms))
        else:
            zero.append(key)
    if not ratios:
        raise TableError(
            f"all ops common to tables {a.title} and {b.title} cost 0 ms in one of them: there is"
            " nothing to compare."
        )
    ratios.sort(key=lambda ratio: ratio.ratio)
    values = np.array([ratio.ratio for ratio in ratios])
    all_a_ms = np.array([ratio.a_ms for ratio in ratios])
    all_b_ms = np.array([ratio.b_ms for ratio in ratios])
    return Comparison(
        a=a.title,
        b=b.title,
        ratios=tuple(ratios),
        median=float(np.median(values)),
        lowest=float(values[0]),
        highest=float(values[-1]),
        spearman=rank_correlation(all_a_ms, all_b_ms),
        only_a=_without(a_ms_of, common),
        only_b=_without(b_ms_of, common),
        zero=tuple(zero),
    )


def _clamped(key: str) -> str:
    """The key with ReLU for ReLU6."""
    return key.replace("-relu6", "-relu")


def _without(ms_of: Mapping[str, float], common: Collection[str]) -> tuple[str, ...]:
    """The ops of a table (key -> ms) that are not ``common``. Of ops that differ only in
    ReLU or ReLU6, the first.
    """
    if len(ms_of) == len(common):
        return ()
    seen = {(_clamped(key), ms_of[key]) for key in common}
    others: dict[tuple[str, float], str] = {}
    for key, ms in ms_of.items():
        if (_clamped(key), ms) not in seen:
            others.setdefault((_clamped(key), ms), key)
    return tuple(others.values())


def describe_comparison(comparison: Comparison, width: int = 80) -> str:
    """A comparison as text of at most ``width`` columns (60 are enough). Milliseconds are
    left out if they do not fit.
    """
    rows = [("a / b", "a ms", "b ms", "op")]
    for ratio in comparison.ratios:
        rows.append((f"{ratio.ratio:.2f}", f"{ratio.a_ms:.4g}", f"{ratio.b_ms:.4g}", ratio.op))
    table = columns(rows)
    if max(map(len, table.splitlines())) > width:
        table = columns((ratio, op) for ratio, _, _, op in rows)

    plural = "s" if len(comparison.ratios) > 1 else ""
    summary = (
        f"{len(comparison.ratios)} op{plural} in both: a / b from {comparison.lowest:.2f} to"
        f" {comparison.highest:.2f}, median {comparison.median:.2f}"
    )
    if comparison.spearman is not None:
        summary += f", Spearman {comparison.spearman:.3f}"
    lines = [
        *textwrap.wrap(f"a  {comparison.a}", width, subsequent_indent="   "),
        *textwrap.wrap(f"b  {comparison.b}", width, subsequent_indent="   "),
        *textwrap.wrap(summary, width),
        table,
    ]
    lines += _listed("only in a", comparison.only_a)
    lines += _listed("only in b", comparison.only_b)
    lines += _listed("0 ms in a or b", comparison.zero)
    return "\n".join(lines)


def _listed(label: str, keys: tuple[str, ...]) -> list[str]:
    """The first ``MAX_LISTED`` of these keys under a label; nothing if there are none."""
    if not keys:
        return []
    lines = [f"{label}: {len(keys)}", *(f"  {key}" for key in keys[:MAX_LISTED])]
    if len(keys) > MAX_LISTED:
        lines.append(f"  and {len(keys) - MAX_LISTED} more; --json names them")
    return lines
