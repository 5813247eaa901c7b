"""Tick labels with the fewest digits that write every tick of an axis exactly, so that
no two look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatter, ScalarFormatter

LARGE = 1e6
"""Axes whose largest value is this or more are written with a power of ten."""
SMALL = 1e-4
"""Axes whose largest value is below this are written with a power of ten."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Ticks(Formatter):
    """Formats all ticks of an axis alike, with ``unit`` after each number. matplotlib's
    own formatters move a common factor or offset into a corner.

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
    """Numbers as text, all with the same decimals, with thousands separators, and with
    a common power of ten if they are very large or very small.
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
        is_zero = not text.strip("−0.,")
        texts.append("0" if is_zero else text + power)
    return texts


def plain_ticks(figure: Figure) -> None:
    """Use ``Ticks`` on every numeric axis; axes with names or with a formatter of their
    own keep theirs.
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
    """The fewest decimals that write every value accurately, compared with the smallest
    distance between two values.
    """
    order = sorted(set(values))
    distances = [second - first for first, second in pairwise(order)]
    fallback = abs(order[0]) if order else 1.0  # a single value has no distance
    smallest = min(distances, default=fallback)
    # ticks come from float arithmetic: 0.30000000000000004 needs one decimal
    tolerance = 1e-3 * (smallest or 1.0)
    for decimals in range(15):
        if all(abs(round(value, decimals) - value) <= tolerance for value in values):
            return decimals
    return 15
