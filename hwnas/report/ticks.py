"""Tick labels: the fewest digits that still write every tick of an axis exactly, so
that no two of them look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatter, ScalarFormatter

LARGE, SMALL = 1e6, 1e-4
"""Axes whose largest value is outside are written with a power of ten."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Ticks(Formatter):
    """Writes all ticks of an axis alike, with ``unit`` behind each number. matplotlib's
    own would move a common part into a corner.

    Example:
        >>> Ticks("%").format_ticks([96.1, 96.15, 96.2])
        ['96.10%', '96.15%', '96.20%']
    """

    def __init__(self, unit: str = "") -> None:
        self.unit = unit

    def __call__(self, value: float, pos: int | None = None) -> str:
        """The label of a value by itself."""
        del pos
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of all ticks of an axis."""
        return [text + self.unit for text in numbers(values)]


def numbers(values: Sequence[float]) -> list[str]:
    """Numbers as texts: equal decimals, thousands apart, one power of ten for all where
    they are very large or very small.
    """
    largest = max((abs(value) for value in values), default=0.0)
    exponent = 0
    if largest >= LARGE or 0 < largest < SMALL:
        exponent = math.floor(math.log10(largest))
    scaled = [value / 10.0**exponent for value in values]
    decimals = _decimals(scaled)
    power = f"×10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""
    texts = []
    for value in scaled:
        text = f"{value:,.{decimals}f}".replace("-", "−")
        zero = not text.strip("−0.,")
        texts.append("0" if zero else text + power)
    return texts


def plain_ticks(figure: Figure) -> None:
    """Give every axis of numbers our labels; axes with names, or with a formatter of
    their own, keep theirs.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for get, put in (
                (axis.get_major_formatter, axis.set_major_formatter),
                (axis.get_minor_formatter, axis.set_minor_formatter),
            ):
                if isinstance(get(), (ScalarFormatter, LogFormatter)):
                    put(Ticks())


def _decimals(values: Sequence[float]) -> int:
    """The fewest decimals that write every value as exactly as the distance between two
    needs it.
    """
    order = sorted(set(values))
    distances = [second - first for first, second in pairwise(order)]
    near = min(distances, default=abs(order[0]) if order else 1.0)
    error = 1e-3 * (near or 1.0)
    for decimals in range(15):
        if all(abs(round(value, decimals) - value) <= error for value in values):
            return decimals
    return 15
