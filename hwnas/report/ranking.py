"""The figures and the table of a ranking study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from hwnas.report.charts import HALF
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import METRICS, Estimate, RankStudy, ScoreResult, Spread

LABELS = {
    "accuracy": "recalibrated accuracy",
    "loss": "recalibrated loss",
    "unrecalibrated": "accuracy without recalibration",
    "angle": "angle, radians",
    "macs": "MACs, millions",
    "params": "parameters, millions",
    "grad_norm": "gradient norm at initialisation",
    "snip": "SNIP at initialisation",
    "synflow": "SynFlow at initialisation (log)",
}
"""What a score is called beside an axis."""

PERCENTAGES = ("accuracy", "unrecalibrated")
MILLIONS = ("macs", "params")


@dataclass(frozen=True)
class ScoreRow:
    """A score of the table: its metrics as texts, each with its interval, or its spread
    over super-nets.
    """

    name: str
    cells: tuple[tuple[str, str], ...]


def score_rows(study: RankStudy) -> list[ScoreRow]:
    """The scores, the best tau first."""
    order = sorted(study.scores, key=lambda result: -_tau(result))
    return [
        ScoreRow(result.name, tuple(_cell(result, metric) for metric in METRICS))
        for result in order
    ]


def scatters(study: RankStudy) -> list[tuple[str, Markup]]:
    """Every score against the accuracy of training alone: (title, SVG), the best tau
    first; combinations of scores are left out.
    """
    single = [result for result in study.scores if result.name in LABELS]
    found = []
    for result in sorted(single, key=lambda result: -_tau(result)):
        label = LABELS[result.name]
        scale = 1.0
        if result.name in PERCENTAGES:
            scale = 100.0
        elif result.name in MILLIONS:
            scale = 1e-6
        title = label.partition(",")[0]
        with canvas(HALF, 300) as figure:
            axes = figure.subplots()
            x = np.array([scale * point.scores[result.name] for point in study.points])
            y = np.array([100 * point.truth for point in study.points])
            shown = _near(x) & _near(y)
            axes.scatter(
                x[shown],
                y[shown],
                s=16,
                color=LIGHT["blue"],
                edgecolors=LIGHT["paper"],
                lw=0.4,
                zorder=3,
            )
            axes.margins(0.06)
            if not shown.all():
                axes.set_title(
                    f"{(~shown).sum()} of {len(shown)} lie outside", fontsize="small", loc="right"
                )
            axes.set_xlabel(label + (", %" if result.name in PERCENTAGES else ""))
            axes.set_ylabel("accuracy trained alone, %")
            tau = (
                "undefined"
                if result.spread["kendall"].mean is None
                else f"{result.spread['kendall'].mean:.3f}"
            )
            description = (
                f"Scatter plot of accuracy trained alone over {label} of {len(x)} architectures:"
                f" Kendall tau {tau}."
            )
            found.append(
                (
                    f"{title[0].upper()}{title[1:]}: τ {_signed(result.spread['kendall'].mean)}",
                    inline_svg(figure, f"rank-{result.name}", description),
                )
            )
    return found


def _near(values_N: np.ndarray) -> np.ndarray:
    """Which of them a figure shows: bool [N]. A few networks that are no better than
    chance would leave no room for all others.
    """
    low, high = np.quantile(values_N, [0.1, 0.9])
    room = 2 * (high - low)
    near: np.ndarray = (values_N >= low - room) & (values_N <= high + room)
    return near


def _tau(result: ScoreResult) -> float:
    mean = result.spread["kendall"].mean
    return -2.0 if mean is None else mean


def _cell(result: ScoreResult, metric: str) -> tuple[str, str]:
    """A metric, and below it the spread over super-nets, or the interval where there is
    one super-net.
    """
    spread = result.spread.get(metric, Spread(mean=None, std=None))
    if spread.std is not None:
        return _shown(metric, spread.mean), f"± {_shown(metric, spread.std)}"
    only = next(
        (
            each[metric]
            for each in result.supernets
            if metric in each and each[metric].value is not None
        ),
        Estimate(value=None),
    )
    if only.low is None or only.high is None:
        return _shown(metric, only.value), ""
    return _shown(metric, only.value), f"{_shown(metric, only.low)} to {_shown(metric, only.high)}"


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    if metric == "regret":
        return f"{100 * value:.2f}"
    return f"{value:.0%}" if metric in ("precision", "random_reaches") else _signed(value)


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}".replace("-", "−")
