"""The metrics of a search, and how their values are displayed.

Accuracy and AP are shown as percentages, their differences in points. 1 / (1 + loss) is
not a percentage, so it is shown as a plain number.
"""

from __future__ import annotations

ACCURACY = "accuracy"
"""The metric of classifiers."""
AP = "AP"
"""The metric of detectors."""
OF_LOSS = "1 / (1 + loss)"
"""The metric of both with ``search.quality = "loss"``."""


def shown(metric: str, value: float) -> str:
    """A quality as text.

    Example:
        >>> shown(ACCURACY, 0.431), shown(OF_LOSS, 0.431)
        ('43.1%', '0.431')
    """
    if metric == OF_LOSS:
        return f"{value:.3f}"
    return f"{value:.1%}"


def shown_points(metric: str, value: float) -> str:
    """A difference between two qualities as text.

    Example:
        >>> shown_points(ACCURACY, 0.012), shown_points(OF_LOSS, 0.012)
        ('1.2 points', '0.012')
    """
    if metric == OF_LOSS:
        return f"{value:.3f}"
    return f"{100 * value:.1f} points"


def shown_difference(metric: str, value: float, error: float) -> str:
    """A difference between two qualities, with its standard error, as text.

    Example:
        >>> shown_difference(ACCURACY, 0.042, 0.0101)
        '4.2 ± 1.0 points'
        >>> shown_difference(OF_LOSS, 0.042, 0.0101)
        '0.042 ± 0.010'
    """
    if metric == OF_LOSS:
        return f"{value:.3f} ± {error:.3f}"
    return f"{100 * value:.1f} ± {100 * error:.1f} points"
