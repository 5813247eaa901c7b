"""Spaces and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms, missing_ops
from hwnas.core.ops import Classifier, Op
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.core.table import LatencyTable


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    kept = list(rows)
    widths = [max(len(row[i]) for row in kept) for i in range(len(kept[0]))] if kept else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in kept
    )


def format_count(number: int) -> str:
    """A count in full below 1e9, else to three digits.

    Example:
        >>> format_count(15_625), format_count(5**20)
        ('15,625', '9.54e+13')
    """
    return f"{number:,}" if number < 10**9 else f"{number:.3g}"


def describe_space(
    space: SearchSpace, table: LatencyTable | None = None, networks: Sequence[Architecture] = ()
) -> str:
    """Size, plan, a sample, the coverage by ``table``, and what it predicts of ``networks``."""
    picks = space.sample(np.random.default_rng(0))
    arch = space.decode(picks, f"{space.name}-sample-0")
    lines = [f"space {space.name}  (sha256 {space.sha256[:12]})", *_facts(space)]
    alike = (
        f" ({format_count(space.size)} combinations of options; the others make the same networks, or no"
        " network)"
    )
    different = (
        f"{format_count(space.architectures)}"
        f" architectures{alike if space.size > space.architectures else ''}"
    )
    lines.append(f"choices      {len(space.choices)}, {different}")
    if space.ADDITIVE:
        lines.append(f"plan         {len(space.ops)} ops to measure:")
        lines += [f"  {op.key}" for op in space.ops]
    lines.append(
        f"sample       {arch.name}: {arch.macs / 1e6:.1f} M MACs, {arch.params / 1e6:.2f} M"
        " parameters"
    )
    if space.notation:
        lines.append(f"genotype     {space.write(picks)}")
    lines += [f"  {op.key}" for op in arch.ops()]
    if table is not None:
        missing = missing_ops(space.ops, table)
        covered = len(space.ops) - len(missing)
        lines.append(
            f"coverage     {covered} of {len(space.ops)} ops in table"
            f" {table.title}{'; missing:' if missing else ''}"
        )
        reason = why_uncovered(space.ops, table)
        lines += [f"  {reason}"] if reason else []
        lines += [f"  {key}" for key in missing]
    lines += describe_networks(networks, table)
    return "\n".join(lines)


@singledispatch
def _facts(space: SearchSpace) -> list[str]:
    """What its networks read and tell apart, and what else its kind of space has to say."""
    return [
        f"input        {space.in_channels} x {space.resolution} x {space.resolution},"
        f" {space.classes} classes"
    ]


@_facts.register
def _facts_of_blocks(space: MacroSpace) -> list[str]:
    pixels = " or ".join(
        f"{space.in_channels} x {size} x {size}"
        for size in space.resolutions or (space.resolution,)
    )
    return [
        f"input        {pixels}, {space.classes} classes, {space.act}",
        (
            f"decisions    {format_count(space.decisions)} raw combinations (kernel, expansion, skip,"
            " width, depth, resolution apart)"
        ),
    ]


def describe_networks(networks: Sequence[Architecture], table: LatencyTable | None) -> list[str]:
    """A line for each network: its name, its size, and its latency as ``table``
    predicts it, or what is missing for that.
    """
    rows: list[tuple[str, ...]] = []
    for arch in networks:
        size = (f"{arch.macs / 1e6:.1f} M MACs", f"{arch.params / 1e6:.2f} M parameters")
        rows.append(
            (f"network      {arch.name}", *size, "" if table is None else _predicted(arch, table))
        )
    return columns(rows).splitlines()


def _predicted(arch: Architecture, table: LatencyTable) -> str:
    missing = missing_ops(arch.ops(), table)
    if not missing:
        return f"{latency_ms(arch, table):.4g} ms predicted"
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"lacks {len(missing)} of {len(arch.ops())} ops: {shown}"


def coverage(
    space: SearchSpace, table: LatencyTable, networks: Sequence[Architecture] = ()
) -> dict[str, Any]:
    """What a table covers of a space, and predicts of networks, as JSON values; ``ms``
    is None where ops are missing.
    """
    predicted = []
    for arch in networks:
        missing = missing_ops(arch.ops(), table)
        ms = None if missing else latency_ms(arch, table)
        predicted.append(
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
        "networks": predicted,
    }


COVERED = 0.1
"""Part of a space's ops below which a table is for something else (ours)."""


def why_uncovered(ops: Sequence[Op], table: LatencyTable) -> str | None:
    """In one line, why a table has next to none of some ops; None where it has many, or
    prices no ops.
    """
    known = [Op.parse(key) for key in table.entries]
    covered = sum(op.key in table.entries for op in ops)
    if not known or not ops or covered >= COVERED * len(ops):
        return None
    theirs, ours = _traits(known), _traits(ops)
    other = [
        f"{theirs[name]} {noun}, this space of {ours[name]} {noun}"
        for name, noun in _NOUNS.items()
        if theirs[name] != ours[name]
    ]
    if not other:
        return (
            f"the table (made for {table.header.space}) has ops of other kinds or widths than this"
            " space."
        )
    return f"the table (made for {table.header.space}) has ops of {'; of '.join(other)}."


_NOUNS = {"size": "px", "channels": "input channels", "classes": "classes", "acts": "activations"}


def _traits(ops: Sequence[Op]) -> dict[str, str]:
    """What tells the ops of one space from those of another: input size and channels,
    classes, activations.
    """
    size = max(op.size for op in ops)
    ends = {op.out_ch for op in ops if isinstance(op, Classifier)}
    return {
        "size": str(size),
        "channels": str(min(op.in_ch for op in ops if op.size == size)),
        "classes": "/".join(map(str, sorted(ends))) or "no",
        "acts": "/".join(sorted({op.act for op in ops if op.act != "none"})) or "no",
    }


def describe_table(table: LatencyTable) -> str:
    """Header, calibration and entries, slowest first."""
    header = table.header
    facts = [
        (name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
        for name, value in header.model_dump().items()
    ]
    lines = [f"table {table.title}", columns(facts)]
    calibration = table.calibration
    if calibration is None:
        lines.append("calibration  none: sums of entries are not latencies of networks")
    else:
        lines.append(f"calibration  {calibration}, fitted on {calibration.networks} networks")
        if calibration.held_out is not None:
            judged = calibration.held_out
            rank = "" if judged.spearman is None else f", Spearman {judged.spearman:.3f}"
            lines.append(
                f"held out     {judged.networks} networks: mean error {judged.mape:.1%}, largest"
                f" {judged.max_error:.1%}{rank}; uncalibrated sum {judged.raw_mape:.1%}"
            )
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
    rows = [
        (f"{slot}:{option}", _number(ms))
        for slot, options in table.slots.items()
        for option, ms in options.items()
    ]
    lines += [columns(rows)] if rows else []
    return "\n".join(lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"
