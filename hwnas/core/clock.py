"""Times that a clock can have measured, in milliseconds. Anything else is damaged, or in
another unit.
"""

from __future__ import annotations

SHORTEST_MS = 1e-6
"""A nanosecond: the finest that clocks of computers resolve."""
LONGEST_MS = 1e9
"""Twelve days."""


def is_possible(ms: float) -> bool:
    """Whether a network or an op can have taken this long. False for NaN.

    Example:
        >>> is_possible(0.5), is_possible(0.0), is_possible(5e-324)
        (True, False, False)
    """
    return SHORTEST_MS <= ms <= LONGEST_MS
