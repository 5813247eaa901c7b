"""Tick labels of axes over ranges of all magnitudes: no two are equal, each is close to
its tick's value, and none is longer than necessary.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from hwnas.report import charts
from hwnas.report.style import canvas, inline_svg
from hwnas.report.ticks import Ticks, numbers

RANGES = [
    (96.1, 96.4), (0.101, 0.104), (0.0, 1.0), (0.0, 100.0), (12.0, 12.05), (99.98, 100.0), (1000.1, 1000.4), (-0.3, 0.9),
    (0.0, 95_000.0), (123_456.0, 123_460.0), (0.0, 7e6), (2.35e6, 2.36e6), (3e-7, 9e-7), (-2e-5, 5e-5), (1e8, 4e12), (0.05, 0.2),
]  # fmt: skip
"""Accuracies, latencies, steps, parameters, gradient norms."""


def labels(low: float, high: float, formatter: Ticks | None) -> tuple[list[float], list[str]]:
    """The ticks inside a range, and their labels in the drawn SVG."""
    with canvas(464, 230) as figure:
        axes = figure.subplots()
        axes.plot([low, high], [low, high])
        axes.set_xticks([])
        axes.set_ylim(low, high)
        if formatter is not None:
            axes.yaxis.set_major_formatter(formatter)
        svg = str(inline_svg(figure, "ticks", "ticks"))
        ticks = [
            float(value)
            for value in axes.get_yticks()
            if low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high)
        ]
    return ticks, re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def value_of(label: str) -> float:
    plain = label.removesuffix("%").replace("−", "-").replace(",", "")
    number, _, power = plain.partition("×10")
    return float(number) * 10.0 ** int(
        power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0
    )


@pytest.mark.parametrize("unit", ["", "%"])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_labels_differ_and_are_close_to_their_ticks(low: float, high: float, unit: str) -> None:
    ticks, shown = labels(low, high, Ticks("%") if unit else None)
    assert len(shown) == len(ticks) >= 3, "nothing is in a corner, such as +9.61e1"
    assert len(set(shown)) == len(shown)
    distance = ticks[1] - ticks[0]
    np.testing.assert_allclose([value_of(label) for label in shown], ticks, atol=0.01 * distance)
    assert all(label.endswith(unit) for label in shown)
    _, _, decimals = shown[-1].removesuffix("%").partition("×")[0].partition(".")
    if decimals:  # with one digit less, some label would be wrong
        power = 10.0 ** (
            np.log10(
                abs(value_of(shown[-1]))
                / abs(float(shown[-1].removesuffix("%").partition("×")[0].replace(",", "")))
            )
        )
        shorter = [round(tick / power, len(decimals) - 1) * power for tick in ticks]
        assert (
            max(abs(rounded - exact) for rounded, exact in zip(shorter, ticks, strict=True))
            > 0.01 * distance
        )
    assert max(map(len, shown)) <= 14


def test_examples_of_labels() -> None:
    assert Ticks("%").format_ticks([96.1, 96.15, 96.2]) == ["96.10%", "96.15%", "96.20%"]
    assert Ticks("%").format_ticks([95.0, 96.0, 100.0]) == ["95%", "96%", "100%"]
    assert numbers([0.101, 0.102, 0.103]) == ["0.101", "0.102", "0.103"]
    assert numbers([-0.5, 0.0, 0.5]) == ["−0.5", "0", "0.5"] and numbers([0, 20_000]) == [
        "0",
        "20,000",
    ]
    assert numbers([0.0, 2.5e-6, 5e-6]) == ["0", "2.5×10⁻⁶", "5.0×10⁻⁶"] and numbers([]) == []


def test_figures_use_these_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values close to each other, and many steps: matplotlib would move what they have
    in common into a corner.
    """
    drawn: list[Figure] = []
    real = charts.inline_svg

    def keep(figure: Figure, name: str, description: str) -> object:
        drawn.append(figure)
        return real(figure, name, description)

    monkeypatch.setattr(charts, "inline_svg", keep)
    rows = [{"step": 50_000 * i, "accuracy": 0.961 + 0.0001 * i} for i in range(31)]
    svg = str(
        charts.plot_curves(
            "accuracy",
            "accuracy",
            rows,
            [charts.Series("accuracy", "accuracy", exact=True)],
            percent=True,
        )
    )
    [axes] = drawn[0].axes
    for axis in (axes.xaxis, axes.yaxis):
        assert axis.get_offset_text().get_text() == ""
        texts = [label.get_text() for label in axis.get_ticklabels()]
        assert len(set(texts)) == len(texts) > 3
    assert ">96.20%<" in svg and ">96.30%<" in svg
