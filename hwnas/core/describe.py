"""Spaces and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms, missing_ops
from hwnas.core.ops import Classifier, Op
from hwnas.core.size import area, by
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.core.table import Calibration, LatencyTable

MAX_LISTED = 3
"""How many missing ops of a network are listed; the rest are counted."""

COVERED = 0.1
"""If a table covers less than this share of a space's ops, it was made for something
else (our choice).
"""


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of equally many cells as left-aligned columns, two spaces apart."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    layout = "  ".join(f"{{:{width}}}" for width in widths)
    return "\n".join([layout.format(*row).rstrip() for row in table])


def format_count(number: int) -> str:
    """A count in full below 1e9, else with three significant digits.

    Example:
        >>> format_count(15_625), format_count(5**20)
        ('15,625', '9.54e+13')
    """
    return f"{number:,}" if number < 10**9 else f"{number:.3g}"


def describe_space(
    space: SearchSpace, table: LatencyTable | None = None, networks: Sequence[Architecture] = ()
) -> str:
    """A space's size, the ops to measure and a sample; if there is a ``table``, its
    coverage of the space and its predictions for ``networks``.
    """
    picks = space.sample(np.random.default_rng(0))
    arch = space.decode(picks, f"{space.name}-sample-0")
    lines = [f"space {space.name}  (sha256 {space.sha256[:12]})", *_facts(space)]
    architectures = f"{format_count(space.architectures)} architectures"
    if space.size > space.architectures:
        architectures += (
            f" ({format_count(space.size)} combinations of options; the others make the same"
            " networks, or no network)"
        )
    lines.append(f"choices      {len(space.choices)}, {architectures}")
    if space.ADDITIVE:
        lines.append(f"ops          {len(space.ops)} to measure:")
        lines += _indented(op.key for op in space.ops)

    lines.append(
        f"sample       {arch.name}: {arch.macs / 1e6:.1f} M MACs, {arch.params / 1e6:.2f} M"
        " parameters"
    )
    if space.notation:
        lines.append(f"genotype     {space.write(picks)}")
    lines += _indented(op.key for op in arch.ops())
    if table is not None:
        lines += _coverage_lines(space, table)
    lines += describe_networks(networks, table)
    return "\n".join(lines)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _coverage_lines(space: SearchSpace, table: LatencyTable) -> list[str]:
    """How many ops of the space are in the table, and which are missing."""
    missing = missing_ops(space.ops, table)
    covered = len(space.ops) - len(missing)
    summary = f"coverage     {covered} of {len(space.ops)} ops in table {table.title}"
    if missing:
        summary += "; missing:"
    lines = [summary]
    reason = why_uncovered(space.ops, table)
    if reason:
        lines.append(f"  {reason}")
    return lines + _indented(missing)


@singledispatch
def _facts(space: SearchSpace) -> list[str]:
    """Input and classes of a space's networks, and what is special to its kind of
    space.
    """
    return [f"input        {space.in_channels} x {by(space.resolution)}, {space.classes} classes"]


@_facts.register
def _facts_of_blocks(space: MacroSpace) -> list[str]:
    sizes = space.resolutions or (space.resolution,)
    pixels = " or ".join(f"{space.in_channels} x {by(size)}" for size in sizes)
    return [
        f"input        {pixels}, {space.classes} classes, {space.act}",
        f"decisions    {format_count(space.decisions)} raw combinations of separate decisions"
        " (kernel, expansion, skip, width, depth, resolution)",
    ]


def describe_networks(networks: Sequence[Architecture], table: LatencyTable | None) -> list[str]:
    """One line per network: its name, its size, and its latency predicted by ``table``,
    or the ops that the table lacks.
    """
    rows: list[tuple[str, ...]] = []
    for arch in networks:
        macs = f"{arch.macs / 1e6:.1f} M MACs"
        params = f"{arch.params / 1e6:.2f} M parameters"
        prediction = "" if table is None else _predicted(arch, table)
        rows.append((f"network      {arch.name}", macs, params, prediction))
    return columns(rows).splitlines()


def _predicted(arch: Architecture, table: LatencyTable) -> str:
    missing = missing_ops(arch.ops(), table)
    if not missing:
        return f"{latency_ms(arch, table):.4g} ms predicted"
    names = ", ".join(missing[:MAX_LISTED])
    if len(missing) > MAX_LISTED:
        names += f" and {len(missing) - MAX_LISTED} more"
    return f"lacks {len(missing)} of {len(arch.ops())} ops: {names}"


def coverage(
    space: SearchSpace, table: LatencyTable, networks: Sequence[Architecture] = ()
) -> dict[str, Any]:
    """A table's coverage of a space, and its predictions for networks, as JSON values.
    ``ms`` is None if the table lacks ops of the network.
    """
    predictions = []
    for arch in networks:
        missing = missing_ops(arch.ops(), table)
        ms = None if missing else latency_ms(arch, table)
        predictions.append(
            {
                "name": arch.name,
                "macs": arch.macs,
                "params": arch.params,
                "ms": ms,
                "missing": missing,
            }
        )
    missing = missing_ops(space.ops, table)
    return {
        "space": space.name,
        "space_sha256": space.sha256,
        "table_sha256": table.sha256,
        "ops": len(space.ops),
        "covered": len(space.ops) - len(missing),
        "missing": missing,
        "reason": why_uncovered(space.ops, table),
        "networks": predictions,
    }


def why_uncovered(ops: Sequence[Op], table: LatencyTable) -> str | None:
    """One line that explains why a table has almost none of these ops.

    None if it has many of them, or has no entries by op.
    """
    known = [Op.parse(key) for key in table.entries]
    covered = sum(op.key in table.entries for op in ops)
    if not known or not ops or covered >= COVERED * len(ops):
        return None

    theirs = _traits(known)
    ours = _traits(ops)
    differences = []
    for trait, value in theirs.items():
        if value != ours[trait]:
            differences.append(f"{value} {trait}, but this space uses {ours[trait]} {trait}")
    if not differences:
        return (
            f"the table (made for {table.header.space}) has ops of other kinds or widths than this"
            " space."
        )
    return f"the table (made for {table.header.space}) has ops for {'; for '.join(differences)}."


def _traits(ops: Sequence[Op]) -> dict[str, str]:
    """What distinguishes the ops of one space from those of another: noun -> value."""
    size = max((op.size for op in ops), key=area)
    # The stem reads the image: it has the fewest input channels at the largest size.
    channels = min(op.in_ch for op in ops if op.size == size)
    classes = {op.out_ch for op in ops if isinstance(op, Classifier)}
    acts = {op.act for op in ops} - {"none"}
    return {
        "px": str(size),
        "input channels": str(channels),
        "classes": "/".join(map(str, sorted(classes))) or "no",
        "activations": "/".join(sorted(acts)) or "no",
    }


def describe_table(table: LatencyTable) -> str:
    """Header, calibration and entries of a table, the slowest entries first."""
    lines = [f"table {table.title}", columns(_header_rows(table))]
    lines += _calibration_lines(table.calibration)
    noisy = sum(entry.noisy for entry in table.entries.values())
    lines.append(f"entries      {len(table.entries)} ({noisy} noisy)")

    rows: list[tuple[str, ...]] = [("op", "ms", "p10", "p90", "spread", "")]
    for key, entry in sorted(table.entries.items(), key=lambda item: -item[1].ms):
        rows.append(
            (
                key,
                _number(entry.ms),
                _number(entry.p10_ms),
                _number(entry.p90_ms),
                _share(entry.spread),
                "noisy" if entry.noisy else "",
            )
        )
    lines.append(columns(rows))

    slot_rows = []
    for slot, options in table.slots.items():
        for option, ms in options.items():
            slot_rows.append((f"{slot}:{option}", _number(ms)))
    if slot_rows:
        lines.append(columns(slot_rows))
    return "\n".join(lines)


def _header_rows(table: LatencyTable) -> list[tuple[str, str]]:
    rows = []
    for name, value in table.header.model_dump().items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append((name, text))
    return rows


def _calibration_lines(calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return ["calibration  none: sums of entries are not latencies of networks"]
    lines = [f"calibration  {calibration}, fitted on {calibration.networks} networks"]
    held_out = calibration.held_out
    if held_out is not None:
        rank = "" if held_out.spearman is None else f", Spearman {held_out.spearman:.3f}"
        lines.append(
            f"held out     {held_out.networks} networks: mean error {held_out.mape:.1%}, largest"
            f" {held_out.max_error:.1%}{rank}; uncalibrated sum {held_out.raw_mape:.1%}"
        )
    return lines


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"
