"""A drawing of the architecture: blocks as bars from input to output, with their
settings and costs below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Arc, Rectangle

from hwnas.core.arch import Position
from hwnas.core.ops import Op
from hwnas.core.size import by
from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg, kernel_colour

GUTTER = 92
"""Width in CSS pixels of the row names."""
ROWS = ("block", "kernel", "expansion", "stride", "output px")
LEGEND = 26
"""Height in CSS pixels of the legend, which is at the top."""
BARS = 190
"""Height in CSS pixels of the bars."""
LABELS = 112
"""Height in CSS pixels of the rows of settings below the bars."""
COSTS = 74
"""Height in CSS pixels of the row of costs at the bottom."""


def architecture(positions: Sequence[Position], ms: Sequence[float | None]) -> Markup:
    """One bar per slot: its height is the square root of the output channels, its
    colour the kernel size; an arc is a residual connection.

    ``ms`` is the latency of each position (None: unknown or skipped). If all are None,
    the row of costs is left out.
    """
    has_costs = any(value is not None for value in ms)
    # as wide as the page, but never so narrow that the labels of two slots overlap
    pitch = min(56.0, max(34.0, (FULL - GUTTER) / len(positions)))
    width = GUTTER + pitch * len(positions)
    height = LEGEND + BARS + LABELS + (COSTS if has_costs else 0)
    with canvas(width, height, arranged=False) as figure:

        def panel(top: float, part: float) -> Axes:
            axes = figure.add_axes((0.0, 1 - (top + part) / height, 1.0, part / height))
            axes.set_xlim(-0.5 - GUTTER / pitch, len(positions) - 0.5)
            axes.set_axis_off()
            return axes

        _legend(panel(0, LEGEND), positions, GUTTER / pitch, pitch)
        _bars(panel(LEGEND, BARS), positions)
        _labels(panel(LEGEND + BARS, LABELS), positions, GUTTER / pitch)
        if has_costs:
            _costs(panel(LEGEND + BARS + LABELS, COSTS), ms, GUTTER / pitch)
        return inline_svg(figure, "architecture", describe(positions))


def describe(positions: Sequence[Position]) -> str:
    """A description of the drawing, for readers who cannot see it."""
    kept = [position.op for position in positions if position.op is not None]
    skipped = len(positions) - len(kept)
    counts = Counter(op.kernel for op in kept if op.kernel > 1)
    kernels = ", ".join(f"{counts[kernel]} with kernel {kernel}" for kernel in sorted(counts))
    return (
        f"Drawing of the architecture: {len(kept)} blocks from {kept[0].in_ch} x"
        f" {by(kept[0].size)} to {kept[-1].out_ch} outputs, {skipped} slots skipped; {kernels}. The"
        " table below lists the blocks."
    )


def _legend(axes: Axes, positions: Sequence[Position], gutter: float, pitch: float) -> None:
    axes.set_ylim(0, 1)
    x = -0.42
    unit = 1 / pitch  # a CSS pixel in units of the x axis
    for kernel in sorted({position.op.kernel for position in positions if position.op is not None}):
        axes.add_patch(
            Rectangle(
                (x, 0.28),
                12 * unit,
                0.46,
                facecolor=kernel_colour(kernel),
                edgecolor=LIGHT["ink"],
                lw=0.6,
            )
        )
        axes.text(
            x + 17 * unit, 0.5, f"{kernel}×{kernel}", va="center", size=10.5, color=LIGHT["muted"]
        )
        x += 62 * unit
    for style, text in (("residual", "adds its input"), ("skipped", "slot skipped")):
        if style == "residual":
            axes.add_patch(
                Arc(
                    (x + 8 * unit, 0.32),
                    16 * unit,
                    0.9,
                    theta1=0,
                    theta2=180,
                    color=LIGHT["orange"],
                    lw=1.4,
                )
            )
        else:
            axes.add_patch(
                Rectangle(
                    (x, 0.28),
                    12 * unit,
                    0.46,
                    facecolor="none",
                    edgecolor=LIGHT["muted"],
                    lw=0.8,
                    ls=(0, (2, 2)),
                )
            )
        axes.text(x + 22 * unit, 0.5, text, va="center", size=10.5, color=LIGHT["muted"])
        x += 122 * unit
    axes.text(-gutter - 0.5, 0.5, "kernel", va="center", size=10.5, color=LIGHT["muted"])


def _bars(axes: Axes, positions: Sequence[Position]) -> None:
    # square roots, so that the first layers stay visible next to the last
    heights = [position.channels**0.5 for position in positions]
    top = max(heights)
    # room above the highest bar for its number and the arc of its residual
    axes.set_ylim(0, 1.3 * top)
    for x, (position, high) in enumerate(zip(positions, heights, strict=True)):
        if position.op is None:
            look: dict[str, Any] = {
                "facecolor": "none",
                "edgecolor": LIGHT["muted"],
                "lw": 0.8,
                "ls": (0, (2, 3)),
                "alpha": 0.8,
            }
            axes.add_patch(Rectangle((x - 0.3, 0), 0.6, high, **look))
            continue
        axes.add_patch(
            Rectangle(
                (x - 0.3, 0),
                0.6,
                high,
                facecolor=kernel_colour(position.op.kernel),
                edgecolor=LIGHT["ink"],
                lw=0.8,
            )
        )
        axes.text(
            x, high + 0.025 * top, str(position.channels), ha="center", va="bottom", size=10.5
        )
        if position.op.residual:
            axes.add_patch(
                Arc(
                    (x, high), 0.84, 0.32 * top, theta1=0, theta2=180, color=LIGHT["orange"], lw=1.4
                )
            )
    axes.axhline(0, color=LIGHT["muted"], lw=1, xmin=0.0)
    axes.text(
        axes.get_xlim()[0], 0.05 * top, "channels", va="bottom", size=10.5, color=LIGHT["muted"]
    )


def _labels(axes: Axes, positions: Sequence[Position], gutter: float) -> None:
    # downwards, so that row 0 is at the top
    axes.set_ylim(len(ROWS) + 0.1, -0.1)
    for row, name in enumerate(ROWS):
        axes.text(-gutter - 0.5, row + 0.5, name, va="center", size=10.5, color=LIGHT["muted"])
    for x, position in enumerate(positions):
        if position.op is None:
            axes.text(x, 0.5, "–", ha="center", va="center", size=10.5, color=LIGHT["muted"])
            continue
        for row, text in enumerate(_words(position.op)):
            axes.text(
                x,
                row + 0.5,
                text,
                ha="center",
                va="center",
                size=10.5,
                weight="bold" if text == "↓ 2" else "normal",
            )
    start = 0
    for size, members in groupby(position.size for position in positions):
        end = start + len(list(members))
        axes.plot([start - 0.4, end - 0.6], [4.12, 4.12], color=LIGHT["muted"], lw=1)
        # below a single bar there is only room for one number
        text = by(size, "×") if end - start > 1 else str(size)
        points = 10.5
        if end - start == 1 and not isinstance(size, int):
            text, points = by(size, "×"), 7.0
        axes.text((start + end - 1) / 2, 4.55, text, ha="center", va="center", size=points)
        start = end


def _words(op: Op) -> tuple[str, str, str, str]:
    """Block, kernel, expansion and stride of an op, as written in the drawing."""
    block = op.WORD or op.kind
    if op.se_ch:
        block += "+se"
    kernel = "pool" if op.pooled else f"{op.kernel}×{op.kernel}"
    expansion = f"×{op.mid_ch / op.in_ch:.2g}" if op.mid_ch else ""
    stride = f"↓ {op.stride}" if op.stride > 1 else ""
    return block, kernel, expansion, stride


def _costs(axes: Axes, ms: Sequence[float | None], gutter: float) -> None:
    known = [value or 0.0 for value in ms]
    total = sum(known)
    top = max(known)
    axes.set_ylim(0, 1.5 * top)
    for x, value in enumerate(known):
        if value > 0:
            axes.add_patch(
                Rectangle((x - 0.3, 0), 0.6, value, facecolor=LIGHT["muted"], lw=0, alpha=0.55)
            )
            axes.text(
                x, value + 0.06 * top, f"{value / total:.0%}", ha="center", va="bottom", size=9.5
            )
    axes.axhline(0, color=LIGHT["muted"], lw=1)
    axes.text(-gutter - 0.5, 0.08 * top, "latency", va="bottom", size=10.5, color=LIGHT["muted"])
