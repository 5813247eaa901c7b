"""How figures look, and how they become inline SVG.

Figures are drawn in the colours of the light theme. In the SVG, each colour becomes the
CSS variable of the same name, so that the page's dark theme applies to figures as well.
Text stays text, in the font of the page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from hwnas.report.ticks import plain_ticks

LIGHT = {
    "ink": "#1b2430",
    "muted": "#5a6572",
    "line": "#dfe3e8",
    "paper": "#fefefe",
    "wash": "#f4f6f8",
    "shade": "#c4cbd3",
    "blue": "#1f63c4",
    "pale-blue": "#a9c6ee",
    "orange": "#b8500a",
    "band": "#fdeede",
    "green": "#1a7a3a",
    "red": "#c0262d",
    "k1": "#c9d3de",
    "k3": "#9cc3ee",
    "k5": "#3f82d2",
    "k7": "#173f7c",
}
DARK = {
    "ink": "#e7eaee",
    "muted": "#a0abb8",
    "line": "#313a45",
    "paper": "#14181e",
    "wash": "#1c222a",
    "shade": "#475262",
    "blue": "#78aef5",
    "pale-blue": "#5b80b5",
    "orange": "#f39a55",
    "band": "#33261c",
    "green": "#5cc27e",
    "red": "#ff7b78",
    "k1": "#4a5563",
    "k3": "#35659f",
    "k5": "#6aa6ee",
    "k7": "#d3e5fc",
}
"""CSS variable -> colour. The values in ``LIGHT`` must be unique: ``inline_svg`` finds
the variable by its value.
"""

KERNEL_MARKERS = {1: "D", 3: "o", 5: "s", 7: "^"}
"""Kernel size -> marker, so that readers do not have to tell colours apart."""

_RC: Any = {
    "svg.fonttype": "none",  # text stays text, so that it can be searched and copied
    "svg.hashsalt": "hwnas",  # ids are random otherwise, and reports must be reproducible
    "text.parse_math": False,  # names may contain a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 10.5,
    "xtick.minor.size": 0,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["line"],
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "grid.color": LIGHT["line"],
}


@contextmanager
def canvas(width: float, height: float, *, arranged: bool = True) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` CSS pixels in the house style. Call
    ``inline_svg`` inside the ``with``, because the style ends with it.
    """
    with matplotlib.rc_context(_RC):
        size = (width / 72, height / 72)  # an SVG of matplotlib has 72 pixels per inch
        yield Figure(figsize=size, layout="constrained" if arranged else None)


def kernel_colour(kernel: int) -> str:
    """The colour of a kernel size; sizes above 7 share the darkest."""
    return LIGHT.get(f"k{kernel}", LIGHT["k7"])


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an SVG element for any page: ids prefixed by ``name``, no prolog,
    no metadata, no URLs.
    """
    plain_ticks(figure)
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=no_metadata)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)[0])
    body = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]

    # a style element in the figure would apply to the whole page
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    # inline SVG in HTML5 has no namespaces
    body = body.replace("xlink:href", "href")

    # several figures share a page, so ids need a prefix; most ids are never referred to
    used_ids = set(re.findall(r'(?:href="|url\()#([^")]+)', body))

    def renamed(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used_ids else ""

    body = re.sub(r' id="([^"]+)"', renamed, body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)

    body = re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLES.get(match[0], match[0]), body)
    for font in ("'DejaVu Sans', sans-serif", "'DejaVu Sans'"):
        body = body.replace(f"font-family: {font}", "font-family: inherit")
    body = re.sub(r"\s*\n\s*", "\n", body)
    label = html.escape(description, quote=True)
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img"'
        f' aria-label="{label}">{body}</svg>'
    )


_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
