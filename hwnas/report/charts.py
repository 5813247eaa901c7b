"""The report's figures: from documents to inline SVG."""

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
from hwnas.core.size import Size, area, by
from hwnas.core.table import Entry, HeldOutErrors
from hwnas.report.documents import Rows
from hwnas.report.style import KERNEL_MARKERS, LIGHT, canvas, inline_svg, kernel_colour
from hwnas.report.ticks import Ticks
from hwnas.search.result import Candidate, SearchResult

HALF = 464
"""Width in CSS pixels of a figure in one of two columns."""
FULL = 952
"""Width in CSS pixels of a figure across the page."""
DOTS = 40
"""Curves of exact values with at most this many points get a marker on each."""


def pareto(search: SearchResult) -> Markup:
    """Super-net quality over predicted cost: random architectures, the strategy's
    proposals, the winner, and the budget.
    """
    best = search.candidates[0]
    unit = search.shown_in
    is_percentage = search.metric != OF_LOSS
    quality_scale = 100 if is_percentage else 1
    target = search.target / unit.scale
    low = target * (1 - search.tolerance)
    high = target * (1 + search.tolerance)
    with canvas(FULL, 310) as figure:
        axes = figure.subplots()
        band_label = f"budget ± {search.tolerance:.0%}"
        axes.axvspan(low, high, color=LIGHT["band"], lw=0, zorder=0, label=band_label)
        axes.axvline(target, color=LIGHT["orange"], lw=1.2, zorder=1)
        for label, members, look in _pareto_groups(search):
            if members:
                costs = [candidate.predicted / unit.scale for candidate in members]
                qualities = [quality_scale * candidate.quality for candidate in members]
                axes.scatter(costs, qualities, label=label, **{"s": 42, "zorder": 3, **look})

        shown_candidates = (*search.candidates, *search.random, *search.random_anywhere)
        all_costs = [candidate.predicted / unit.scale for candidate in shown_candidates]
        # the band of the budget stays visible even if no architecture is inside it
        left = min(*all_costs, low)
        right = max(*all_costs, high)
        axes.set_xlim(left - 0.06 * (right - left), right + 0.06 * (right - left))
        axes.margins(y=0.15)
        if is_percentage:
            axes.yaxis.set_major_formatter(Ticks("%"))
        axes.set_xlabel(f"predicted {unit.axis}")
        axes.set_ylabel(f"super-net {search.metric}, held-out images")
        figure.legend(loc="outside upper left", ncols=5)
        return inline_svg(
            figure,
            "pareto",
            f"Scatter plot of super-net {search.metric} over predicted {unit.noun}. Chosen:"
            f" {best.predicted / unit.scale:.3g} {unit.symbol} and"
            f" {shown(search.metric, best.quality)}; budget {target:.3g}"
            f" {unit.symbol}; {len(search.random)} random architectures and"
            f" {len(search.candidates)} proposals.",
        )


def _pareto_groups(
    search: SearchResult,
) -> list[tuple[str, tuple[Candidate, ...], dict[str, Any]]]:
    """The groups of architectures in ``pareto``: label, members and marker style."""
    hollow = {"marker": "o", "facecolors": "none", "edgecolors": LIGHT["muted"]}
    star = {
        "marker": "*",
        "color": LIGHT["orange"],
        "edgecolors": LIGHT["ink"],
        "s": 210,
        "lw": 0.6,
        "zorder": 4,
    }
    return [
        ("random, anywhere", search.random_anywhere, {"marker": "x", "color": LIGHT["muted"]}),
        ("random, in the budget", search.random, hollow),
        (
            f"proposals of {search.strategy}",
            search.candidates[1:],
            {"marker": "s", "color": LIGHT["blue"]},
        ),
        ("chosen", (search.candidates[0],), star),
    ]


@dataclass(frozen=True)
class Series:
    """A column of the metrics: its key, its name in the legend and the name of its
    colour. ``exact`` series have no noise to smooth. Values are multiplied by
    ``factor``.
    """

    key: str
    label: str
    colour: str = "blue"
    exact: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Marks:
    """Lines in a plot next to its curves: the budget ``target`` with its relative
    ``tolerance``, and the step ``start`` at which the method itself began to learn.
    """

    target: float | None = None
    tolerance: float = 0.0
    start: int | None = None


NO_MARKS = Marks()


def plot_curves(
    name: str,
    title: str,
    rows: Rows,
    series: Sequence[Series],
    *,
    percent: bool = False,
    marks: Marks = NO_MARKS,
) -> Markup | None:
    """Metrics over steps, raw and smoothed; None if no row has any of them."""
    columns = []
    for one_series in series:
        factor = 100.0 if percent else one_series.factor
        steps, values = _column(rows, one_series.key, factor)
        if len(steps) > 0:
            columns.append((one_series, steps, values))
    if not columns:
        return None

    with canvas(HALF, 230) as figure:
        axes = figure.subplots()
        _draw_marks(axes, marks)
        for one_series, steps, values in columns:
            _draw_series(axes, one_series, steps, values)
        low, high = _range_of(columns)
        low = min(low, marks.target or low)
        high = max(high, marks.target or high)
        # the tiny constant gives a constant curve a range, which matplotlib requires
        axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
        axes.set_xlim(0, max(1, int(rows[-1]["step"])))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if percent:
            axes.yaxis.set_major_formatter(Ticks("%"))
        axes.set_xlabel("step")
        if len(columns) > 1 or marks.target is not None:
            figure.legend(loc="outside upper right", ncols=3)

        unit = "%" if percent else ""
        ends = []
        for one_series, _, values in columns:
            last = float(smoothed(values)[-1])
            ends.append(f"{one_series.label} ends at {last:.3g}{unit}")
        description = f"Line chart of {title} over {len(rows)} steps: {'; '.join(ends)}."
        return inline_svg(figure, name, description)


def _draw_marks(axes: Axes, marks: Marks) -> None:
    if marks.target is not None:
        low = marks.target * (1 - marks.tolerance)
        high = marks.target * (1 + marks.tolerance)
        # behind the curves, so that they stay readable inside the band
        axes.axhspan(low, high, color=LIGHT["band"], lw=0, zorder=0)
        axes.axhline(marks.target, color=LIGHT["orange"], lw=1.2, zorder=1, label="budget")
    if marks.start is not None:
        axes.axvline(marks.start, color=LIGHT["muted"], lw=1, ls=(0, (2, 3)), zorder=1)


def _draw_series(axes: Axes, series: Series, steps: np.ndarray, values: np.ndarray) -> None:
    """A thick line; noisy values are smoothed for it, and the raw ones drawn thin."""
    colour = LIGHT[series.colour]
    look: dict[str, Any] = {}
    line = values
    if series.exact:
        if len(values) <= DOTS:
            look = {"marker": "o", "ms": 4.5}
    else:
        axes.plot(*_envelope(steps, values), color=colour, lw=0.7, alpha=0.35, zorder=2)
        line = smoothed(values)
    axes.plot(*_thinned(steps, line), color=colour, lw=1.8, zorder=3, label=series.label, **look)


def _range_of(columns: Sequence[tuple[Series, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The smallest and the largest value to show. A few spikes of a noisy curve may be
    cut off, because the rest would look flat; exact values never are.
    """
    lows = []
    highs = []
    for series, _, values in columns:
        # 0.2 % cuts off a spike or two per thousand steps, and nothing that lasts (ours)
        limits = [0.0, 100.0] if series.exact else [0.2, 99.8]
        low, high = np.percentile(values, limits)
        lows.append(low)
        highs.append(high)
    return min(lows), max(highs)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the values; the window is cut
    off at both ends.
    """
    width = max(1, len(values) // 30) | 1  # odd, so that the window is centred
    window = np.ones(min(len(values), width))
    # at the ends, fewer values are inside the window than it is wide
    counts = np.convolve(np.ones(len(values)), window, "same")
    average: np.ndarray = np.convolve(values, window, "same") / counts
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
    """The smallest and the largest value of each bin: files of long runs stay small,
    and spikes stay visible.
    """
    # each bin keeps two values, so fewer than this would not get smaller
    if len(steps) <= 2 * bins:
        return steps, values
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(steps)), bins):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    order = sorted(kept)
    return steps[order], values[order]


def held_out_errors(evaluated: HeldOutErrors) -> Markup:
    """Predicted against measured latency of networks that the calibration
    has not seen.
    """
    predicted, measured = np.array(evaluated.pairs, dtype=float).reshape(-1, 2).T
    with canvas(HALF, 400) as figure:
        axes = figure.subplots()
        low = min(predicted.min(), measured.min())
        high = max(predicted.max(), measured.max())
        # a single network, or equal ones, have no range: then a tenth of the value
        margin = 0.08 * float(high - low) or 0.1 * float(high)
        span = np.array([low - margin, high + margin])
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
            f"Scatter plot of predicted over measured latency of {evaluated.networks} held-out"
            f" networks: mean error {evaluated.mape:.1%}, largest {evaluated.max_error:.1%}.",
        )


def entries(table_entries: dict[str, Entry]) -> Markup:
    """Every entry of a table as a dot: one row per kind and input size, kernel sizes by
    colour and shape, noisy entries ringed.
    """
    groups: dict[tuple[str, Size], list[tuple[Op, Entry]]] = defaultdict(list)
    for key, entry in table_entries.items():
        op = Op.parse(key)
        groups[op.kind, op.size].append((op, entry))
    kind_order = kinds()
    # from the input of a network to its output, as its blocks run
    order = sorted(groups, key=lambda group: (-area(group[1]), kind_order.index(group[0])))
    values = [entry.ms for entry in table_entries.values()]
    noisy = sum(entry.noisy for entry in table_entries.values())
    with canvas(FULL, 90 + 40 * len(order)) as figure:
        axes = figure.subplots()
        for row, group in enumerate(order):
            _draw_row(axes, row, groups[group])
        # one decade or less is easier to read on a linear axis
        if min(values) > 0 and max(values) > 12 * min(values):
            axes.set_xscale("log")
            # each label by itself: 0.001 and 1, not 0.001 and 1.000
            axes.xaxis.set_major_formatter(FuncFormatter(Ticks()))
            axes.xaxis.set_minor_formatter(FuncFormatter(_minor_label))
            axes.grid(which="minor", axis="x", alpha=0.5)
        axes.set_yticks(range(len(order)), [f"{kind}  {by(size, '×')}" for kind, size in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlabel("latency, ms (bars: 10th to 90th percentile of the runs)")

        kernels = sorted({Op.parse(key).kernel for key in table_entries})
        for kernel in kernels:
            axes.scatter([], [], s=34, label=f"{kernel}×{kernel}", **_look(kernel))
        if noisy:
            axes.scatter(
                [], [], s=110, facecolors="none", edgecolors=LIGHT["red"], lw=1.4, label="noisy"
            )
        figure.legend(loc="outside upper right", ncols=8)
        return inline_svg(
            figure,
            "entries",
            f"Dot plot of the latency of {len(values)} ops from {min(values):.3g} to"
            f" {max(values):.3g} ms, grouped by kind and input size; {noisy} are noisy. The table"
            " below contains the numbers.",
        )


def _draw_row(axes: Axes, row: int, members: Sequence[tuple[Op, Entry]]) -> None:
    """The entries of one kind and input size, side by side by kernel size."""
    kernels = sorted({op.kernel for op, _ in members})
    for op, entry in members:
        shift = 0.24 * (kernels.index(op.kernel) - (len(kernels) - 1) / 2)
        _dot(axes, row + shift, op, entry)


def _minor_label(value: float, position: int | None) -> str:
    """Labels at 2 and 5 only: the other minor ticks of a decade would overlap."""
    del position
    return Ticks()(value) if f"{value:e}"[0] in "25" else ""


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
