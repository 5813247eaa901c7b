"""The report's figures: documents in, inline SVG out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hwnas.core.metric import OF_LOSS, shown
from hwnas.core.ops import Op, kinds
from hwnas.core.table import Entry, HeldOut
from hwnas.report.documents import Rows
from hwnas.report.style import KERNEL_MARKERS, LIGHT, canvas, inline_svg, kernel_colour
from hwnas.report.ticks import Ticks
from hwnas.search.result import Candidate, SearchResult

HALF, FULL = 464, 952
"""Widths in CSS pixels of a figure in two columns and of one across the page."""
DOTS = 40
"""Exact values up to which each is marked."""


def pareto(search: SearchResult) -> Markup:
    """Super-net quality over predicted cost: random architectures, the strategy's
    proposals, the winner, the budget.
    """
    best, percentages = search.candidates[0], search.metric != OF_LOSS
    unit, what = search.shown_in, f"predicted {search.shown_in.noun}"
    scale = 100 if percentages else 1
    with canvas(FULL, 310) as figure:
        axes = figure.subplots()
        low, high = (search.target / unit.scale * (1 + sign * search.tolerance) for sign in (-1, 1))
        axes.axvspan(
            low, high, color=LIGHT["band"], lw=0, zorder=0, label=f"budget ± {search.tolerance:.0%}"
        )
        axes.axvline(search.target / unit.scale, color=LIGHT["orange"], lw=1.2, zorder=1)
        groups: tuple[tuple[str, tuple[Candidate, ...], dict[str, Any]], ...] = (
            ("random, anywhere", search.random_anywhere, {"marker": "x", "color": LIGHT["muted"]}),
            (
                "random, in the budget",
                search.random,
                {"marker": "o", "facecolors": "none", "edgecolors": LIGHT["muted"]},
            ),
            (
                f"proposals of {search.strategy}",
                search.candidates[1:],
                {"marker": "s", "color": LIGHT["blue"]},
            ),
            (
                "chosen",
                (best,),
                {
                    "marker": "*",
                    "color": LIGHT["orange"],
                    "edgecolors": LIGHT["ink"],
                    "s": 210,
                    "lw": 0.6,
                    "zorder": 4,
                },
            ),
        )
        for label, members, look in groups:
            if members:
                points = (
                    [c.predicted / unit.scale for c in members],
                    [scale * c.quality for c in members],
                )
                axes.scatter(*points, label=label, **{"s": 42, "zorder": 3, **look})
        costs = [
            c.predicted / unit.scale
            for c in (*search.candidates, *search.random, *search.random_anywhere)
        ]
        left, right = min(*costs, low), max(*costs, high)
        axes.set_xlim(left - 0.06 * (right - left), right + 0.06 * (right - left))
        axes.margins(y=0.15)
        if percentages:
            axes.yaxis.set_major_formatter(Ticks("%"))
        axes.set_xlabel(f"predicted {unit.axis}")
        axes.set_ylabel(f"super-net {search.metric}, held-out images")
        figure.legend(loc="outside upper left", ncols=5)
        return inline_svg(
            figure,
            "pareto",
            f"Scatter plot of super-net {search.metric} over {what}. Chosen:"
            f" {best.predicted / unit.scale:.3g} {unit.symbol} and"
            f" {shown(search.metric, best.quality)}; budget {search.target / unit.scale:.3g}"
            f" {unit.symbol}; {len(search.random)} random architectures and"
            f" {len(search.candidates)} proposals.",
        )


@dataclass(frozen=True)
class Series:
    """A column of the metrics: its key, its name in the legend and its colour's name.
    ``exact`` ones have no noise to smooth.

    What is drawn are its values times ``factor``.
    """

    key: str
    label: str
    colour: str = "blue"
    exact: bool = False
    factor: float = 1.0


def course(
    name: str,
    title: str,
    rows: Rows,
    series: Sequence[Series],
    *,
    percent: bool = False,
    target: float | None = None,
    tolerance: float = 0.0,
    start: int | None = None,
) -> Markup | None:
    """Metrics over steps, raw and smoothed; None where the rows lack them all.

    ``target`` draws a line with its tolerance band, ``start`` the step at which the
    method's own learning began.
    """
    columns = [(one, *_column(rows, one.key, 100.0 if percent else one.factor)) for one in series]
    columns = [(one, steps, values) for one, steps, values in columns if len(steps) > 0]
    if not columns:
        return None
    with canvas(HALF, 230) as figure:
        axes = figure.subplots()
        if target is not None:
            axes.axhspan(
                target * (1 - tolerance),
                target * (1 + tolerance),
                color=LIGHT["band"],
                lw=0,
                zorder=0,
            )
            axes.axhline(target, color=LIGHT["orange"], lw=1.2, zorder=1, label="budget")
        if start is not None:
            axes.axvline(start, color=LIGHT["muted"], lw=1, ls=(0, (2, 3)), zorder=1)
        for one, steps, values in columns:
            if not one.exact:
                axes.plot(
                    *_envelope(steps, values), color=LIGHT[one.colour], lw=0.7, alpha=0.35, zorder=2
                )
            line = values if one.exact else smoothed(values)
            look: dict[str, Any] = (
                {"marker": "o", "ms": 4.5} if one.exact and len(values) <= DOTS else {}
            )
            axes.plot(
                *_thinned(steps, line),
                color=LIGHT[one.colour],
                lw=1.8,
                zorder=3,
                label=one.label,
                **look,
            )
        # a few spikes of a noisy curve may be cut off, for the rest would be flat; a
        # value without noise never is
        ends = [
            np.percentile(values, [0, 100] if one.exact else [0.2, 99.8])
            for one, _, values in columns
        ]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        low, high = min(low, target or low), max(high, target or high)
        axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
        axes.set_xlim(0, max(1, int(rows[-1]["step"])))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if percent:
            axes.yaxis.set_major_formatter(Ticks("%"))
        axes.set_xlabel("step")
        if len(columns) > 1 or target is not None:
            figure.legend(loc="outside upper right", ncols=3)
        last = "; ".join(
            f"{one.label} ends at {float(smoothed(values)[-1]):.3g}{'%' if percent else ''}"
            for one, _, values in columns
        )
        return inline_svg(figure, name, f"Line chart of {title} over {len(rows)} steps: {last}.")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the values; windows shrink at the ends."""
    window = np.ones(min(len(values), max(1, len(values) // 30) | 1))
    average: np.ndarray = np.convolve(values, window, "same") / np.convolve(
        np.ones(len(values)), window, "same"
    )
    return average


def _column(rows: Rows, key: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], scale * row[key]) for row in rows if row.get(key) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _thinned(
    steps: np.ndarray, values: np.ndarray, limit: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    kept = np.unique(np.linspace(0, len(steps) - 1, min(limit, len(steps))).round().astype(int))
    return steps[kept], values[kept]


def _envelope(
    steps: np.ndarray, values: np.ndarray, bins: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """At most two points per bin, its smallest and its largest: long runs stay small
    files and keep their spikes.
    """
    if len(steps) <= 2 * bins:
        return steps, values
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(steps)), bins):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    order = sorted(kept)
    return steps[order], values[order]


def held_out(judged: HeldOut) -> Markup:
    """Predicted against measured latency of the networks that the calibration has not seen."""
    predicted, measured = np.array(judged.pairs, dtype=float).reshape(-1, 2).T
    with canvas(HALF, 400) as figure:
        axes = figure.subplots()
        ends = np.array(
            [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
        )
        margin = 0.08 * float(np.ptp(ends)) or 0.1 * float(ends[1])
        span = np.array([ends[0] - margin, ends[1] + margin])
        axes.plot(
            span, span, color=LIGHT["muted"], lw=1, ls=(0, (4, 3)), label="predicted = measured"
        )
        axes.scatter(
            measured,
            predicted,
            s=46,
            color=LIGHT["blue"],
            edgecolors=LIGHT["paper"],
            lw=0.8,
            zorder=3,
            label="held-out network",
        )
        axes.set(
            xlim=span, ylim=span, aspect="equal", xlabel="measured, ms", ylabel="predicted, ms"
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.legend(loc="upper left")
        return inline_svg(
            figure,
            "heldout",
            f"Scatter plot of predicted over measured latency of {judged.networks} held-out"
            f" networks: mean error {judged.mape:.1%}, largest {judged.max_error:.1%}.",
        )


def entries(table_entries: dict[str, Entry]) -> Markup:
    """Every entry of a table as a dot, one row per kind and input size, kernel sizes by
    colour and shape, noisy ones ringed.
    """
    groups: dict[tuple[str, int], list[tuple[Op, Entry]]] = defaultdict(list)
    for key, entry in table_entries.items():
        op = Op.parse(key)
        groups[op.kind, op.size].append((op, entry))
    order_of = kinds()
    order = sorted(groups, key=lambda group: (-group[1], order_of.index(group[0])))
    values = [entry.ms for entry in table_entries.values()]
    with canvas(FULL, 90 + 40 * len(order)) as figure:
        axes = figure.subplots()
        for row, group in enumerate(order):
            kernels = sorted({op.kernel for op, _ in groups[group]})
            for op, entry in groups[group]:
                _dot(
                    axes,
                    row + 0.24 * (kernels.index(op.kernel) - (len(kernels) - 1) / 2),
                    op,
                    entry,
                )
        if min(values) > 0 and max(values) > 12 * min(values):
            axes.set_xscale("log")
            # each by itself: 0.001 and 1, not 0.001 and 1.000
            axes.xaxis.set_major_formatter(FuncFormatter(Ticks()))
            axes.xaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: Ticks()(value) if f"{value:e}"[0] in "25" else "")
            )
            axes.grid(which="minor", axis="x", alpha=0.5)
        axes.set_yticks(range(len(order)), [f"{kind}  {size}×{size}" for kind, size in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlabel("latency, ms (bars: 10th to 90th percentile of the runs)")
        kernels = sorted({op.kernel for members in groups.values() for op, _ in members})
        for kernel in kernels:
            axes.scatter([], [], s=34, label=f"{kernel}×{kernel}", **_look(kernel))
        if any(entry.noisy for entry in table_entries.values()):
            axes.scatter(
                [], [], s=110, facecolors="none", edgecolors=LIGHT["red"], lw=1.4, label="noisy"
            )
        figure.legend(loc="outside upper right", ncols=8)
        noisy = sum(entry.noisy for entry in table_entries.values())
        return inline_svg(
            figure,
            "entries",
            f"Dot plot of the latency of {len(values)} ops from {min(values):.3g} to"
            f" {max(values):.3g} ms, grouped by kind and input size; {noisy} are noisy. The table"
            " below holds the numbers.",
        )


def _look(kernel: int) -> dict[str, Any]:
    return {
        "marker": KERNEL_MARKERS.get(kernel, "P"),
        "color": kernel_colour(kernel),
        "edgecolors": LIGHT["ink"],
        "linewidths": 0.6,
        "zorder": 3,
    }


def _dot(axes: Axes, y: float, op: Op, entry: Entry) -> None:
    if isinstance(entry.p10_ms, float) and isinstance(entry.p90_ms, float) and entry.p10_ms > 0:
        axes.plot([entry.p10_ms, entry.p90_ms], [y, y], color=LIGHT["muted"], lw=1, zorder=2)
    axes.scatter([entry.ms], [y], s=34, **_look(op.kernel))
    if entry.noisy:
        axes.scatter(
            [entry.ms], [y], s=110, facecolors="none", edgecolors=LIGHT["red"], lw=1.4, zorder=4
        )
