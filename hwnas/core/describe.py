"""Spaces and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hwnas.core.cost import missing_ops
from hwnas.core.nasbench101 import NASBench101Space
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.core.table import LatencyTable


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    kept = list(rows)
    widths = [max(len(row[i]) for row in kept) for i in range(len(kept[0]))] if kept else []
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in kept)


def counted(number: int) -> str:
    """A count in full below 1e9, else to three digits.

    Example:
        >>> counted(15_625), counted(5**20)
        ('15,625', '9.54e+13')
    """
    return f"{number:,}" if number < 10**9 else f"{number:.3g}"


def describe_space(space: SearchSpace, table: LatencyTable | None = None) -> str:
    """Size, plan, a sample, and the coverage by ``table``."""
    picks = space.sample(np.random.default_rng(0))
    arch = space.decode(picks, f"{space.name}-sample-0")
    lines = [f"space {space.name}  (sha256 {space.sha256[:12]})"]
    if isinstance(space, MacroSpace):
        pixels = " or ".join(f"{space.in_channels} x {size} x {size}" for size in space.resolutions or (space.resolution,))
        lines.append(f"input        {pixels}, {space.classes} classes, {space.act}")
        lines.append(f"decisions    {counted(space.decisions)} raw combinations (kernel, expansion, skip, width, depth, resolution apart)")
    else:
        lines.append(f"input        {space.in_channels} x {space.resolution} x {space.resolution}, {space.classes} classes")
    alike = f" ({counted(space.size)} combinations of options; the others make the same networks, or no network)"
    different = f"{counted(space.architectures)} architectures{alike if space.size > space.architectures else ''}"
    lines.append(f"choices      {len(space.choices)}, {different}")
    if not isinstance(space, NASBench101Space):
        lines.append(f"plan         {len(space.ops)} ops to measure:")
        lines += [f"  {op.key}" for op in space.ops]
    lines.append(f"sample       {arch.name}: {arch.macs / 1e6:.1f} M MACs, {arch.params / 1e6:.2f} M parameters")
    if not isinstance(space, MacroSpace):
        lines.append(f"genotype     {space.write(picks)}")
    lines += [f"  {op.key}" for op in arch.ops()]
    if table is not None:
        missing = missing_ops(space.ops, table)
        covered = len(space.ops) - len(missing)
        lines.append(f"coverage     {covered} of {len(space.ops)} ops in table {table.title}{'; missing:' if missing else ''}")
        lines += [f"  {key}" for key in missing]
    return "\n".join(lines)


def describe_table(table: LatencyTable) -> str:
    """Header, calibration and entries, slowest first."""
    header = table.header
    facts = [(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)) for name, value in header.model_dump().items()]
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
                f"held out     {judged.networks} networks: mean error {judged.mape:.1%}, largest {judged.max_error:.1%}{rank}; "
                f"uncalibrated sum {judged.raw_mape:.1%}"
            )
    noisy = sum(entry.noisy for entry in table.entries.values())
    lines.append(f"entries      {len(table.entries)} ({noisy} noisy)")
    rows: list[tuple[str, ...]] = [("op", "ms", "p10", "p90", "spread", "")]
    for key, entry in sorted(table.entries.items(), key=lambda item: -item[1].ms):
        rows.append(
            (key, _number(entry.ms), _number(entry.p10_ms), _number(entry.p90_ms), _share(entry.spread), "noisy" if entry.noisy else "")
        )
    lines.append(columns(rows))
    priced = [(f"{slot}:{option}", _number(ms)) for slot, options in table.slots.items() for option, ms in options.items()]
    lines += [columns(priced)] if priced else []
    return "\n".join(lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"
