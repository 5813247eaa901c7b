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

from hwnas.core.arch import Placed
from hwnas.core.ops import Op
from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg, kernel_colour

GUTTER = 92
"""Width in CSS pixels of the row names."""
ROWS = ("block", "kernel", "expansion", "stride", "output px")
LEGEND, BARS, LABELS, COSTS = 26, 190, 112, 74
"""Heights in CSS pixels of the parts of the drawing, top to bottom."""


def architecture(places: Sequence[Placed], ms: Sequence[float | None]) -> Markup:
    """One bar per slot: its height is the square root of the output channels, its colour
    the kernel size; an arc is a residual connection.

    ``ms`` holds the latency of each place (None: unknown or skipped). If all are None,
    the row of costs is left out.
    """
    has_costs = any(value is not None for value in ms)
    pitch = min(56.0, max(34.0, (FULL - GUTTER) / len(places)))
    width = GUTTER + pitch * len(places)
    height = LEGEND + BARS + LABELS + (COSTS if has_costs else 0)
    with canvas(width, height, arranged=False) as figure:

        def panel(top: float, part: float) -> Axes:
            axes = figure.add_axes((0.0, 1 - (top + part) / height, 1.0, part / height))
            axes.set_xlim(-0.5 - GUTTER / pitch, len(places) - 0.5)
            axes.set_axis_off()
            return axes

        _legend(panel(0, LEGEND), places, GUTTER / pitch, pitch)
        _bars(panel(LEGEND, BARS), places)
        _labels(panel(LEGEND + BARS, LABELS), places, GUTTER / pitch)
        if has_costs:
            _costs(panel(LEGEND + BARS + LABELS, COSTS), ms, GUTTER / pitch)
        return inline_svg(figure, "architecture", describe(places))


def describe(places: Sequence[Placed]) -> str:
    """A description of the drawing, for readers who cannot see it."""
    kept = [place.op for place in places if place.op is not None]
    skipped = len(places) - len(kept)
    counts = Counter(op.kernel for op in kept if op.kernel > 1)
    kernels = ", ".join(f"{counts[kernel]} with kernel {kernel}" for kernel in sorted(counts))
    return (
        f"Drawing of the architecture: {len(kept)} blocks from {kept[0].in_ch} x {kept[0].size} x"
        f" {kept[0].size} to {kept[-1].out_ch} outputs, {skipped} slots skipped; {kernels}. The"
        " table below lists the blocks."
    )


def _legend(axes: Axes, places: Sequence[Placed], gutter: float, pitch: float) -> None:
    axes.set_ylim(0, 1)
    x = -0.42
    unit = 1 / pitch  # a CSS pixel in units of the x axis
    for kernel in sorted({place.op.kernel for place in places if place.op is not None}):
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


def _bars(axes: Axes, places: Sequence[Placed]) -> None:
    # square roots, so that the first layers stay visible beside the last
    heights = [place.channels**0.5 for place in places]
    top = max(heights)
    axes.set_ylim(0, 1.3 * top)
    for x, (place, high) in enumerate(zip(places, heights, strict=True)):
        if place.op is None:
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
                facecolor=kernel_colour(place.op.kernel),
                edgecolor=LIGHT["ink"],
                lw=0.8,
            )
        )
        axes.text(x, high + 0.025 * top, str(place.channels), ha="center", va="bottom", size=10.5)
        if place.op.residual:
            axes.add_patch(
                Arc(
                    (x, high), 0.84, 0.32 * top, theta1=0, theta2=180, color=LIGHT["orange"], lw=1.4
                )
            )
    axes.axhline(0, color=LIGHT["muted"], lw=1, xmin=0.0)
    axes.text(
        axes.get_xlim()[0], 0.05 * top, "channels", va="bottom", size=10.5, color=LIGHT["muted"]
    )


def _labels(axes: Axes, places: Sequence[Placed], gutter: float) -> None:
    axes.set_ylim(len(ROWS) + 0.1, -0.1)
    for row, name in enumerate(ROWS):
        axes.text(-gutter - 0.5, row + 0.5, name, va="center", size=10.5, color=LIGHT["muted"])
    for x, place in enumerate(places):
        if place.op is None:
            axes.text(x, 0.5, "–", ha="center", va="center", size=10.5, color=LIGHT["muted"])
            continue
        for row, text in enumerate(_words(place.op)):
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
    for size, members in groupby(place.size for place in places):
        end = start + len(list(members))
        axes.plot([start - 0.4, end - 0.6], [4.12, 4.12], color=LIGHT["muted"], lw=1)
        # below a single bar there is only room for one number
        text = f"{size}×{size}" if end - start > 1 else f"{size}"
        axes.text((start + end - 1) / 2, 4.55, text, ha="center", va="center", size=10.5)
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
