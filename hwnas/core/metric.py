"""What a search measures architectures by, and how its numbers are written.

Accuracy and AP are percentages, and differences of them points. 1 / (1 + loss) is
neither: it is written as the number that it is.
"""

from __future__ import annotations

ACCURACY, AP, OF_LOSS = "accuracy", "AP", "1 / (1 + loss)"
"""The names that ``SearchResult.metric`` may have."""


def shown(metric: str, value: float) -> str:
    """A quality in words.

    Example:
        >>> shown(ACCURACY, 0.431), shown(OF_LOSS, 0.431)
        ('43.1%', '0.431')
    """
    return f"{value:.3f}" if metric == OF_LOSS else f"{value:.1%}"


def shown_points(metric: str, value: float) -> str:
    """A difference of qualities.

    Example:
        >>> shown_points(ACCURACY, 0.012), shown_points(OF_LOSS, 0.012)
        ('1.2 points', '0.012')
    """
    return f"{value:.3f}" if metric == OF_LOSS else f"{100 * value:.1f} points"


def shown_difference(metric: str, value: float, error: float) -> str:
    """A difference of qualities with its standard error.

    Example:
        >>> shown_difference(ACCURACY, 0.042, 0.0101), shown_difference(OF_LOSS, 0.042, 0.0101)
        ('4.2 ± 1.0 points', '0.042 ± 0.010')
    """
    return (
        f"{value:.3f} ± {error:.3f}"
        if metric == OF_LOSS
        else f"{100 * value:.1f} ± {100 * error:.1f} points"
    )
