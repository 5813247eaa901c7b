"""The figures and the table of a ranking study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from hwnas.report.charts import HALF
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import METRICS, IntervalEstimate, MeanStd, RankStudy, ScoreResult

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
"""Score -> its axis label."""

PERCENTAGES = ("accuracy", "unrecalibrated")
MILLIONS = ("macs", "params")


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores: the formatted metrics, each with its interval, or
    with its spread over super-nets.
    """

    name: str
    cells: tuple[tuple[str, str], ...]


def score_rows(study: RankStudy) -> list[ScoreRow]:
    """The scores, the best tau first."""
    rows = []
    for result in sorted(study.scores, key=lambda result: -_tau(result)):
        rows.append(ScoreRow(result.name, tuple(_cell(result, metric) for metric in METRICS)))
    return rows


def scatters(study: RankStudy) -> list[tuple[str, Markup]]:
    """Every score against the accuracy of standalone training: (title, SVG), the best
    tau first; combinations of scores are left out.
    """
    # a combination is a sum of ranks, which has no unit to draw
    single = [result for result in study.scores if result.name in LABELS]
    figures = []
    for result in sorted(single, key=lambda result: -_tau(result)):
        name = LABELS[result.name].partition(",")[0]
        tau = _signed(result.over_supernets["kendall"].mean)
        title = f"{name[0].upper()}{name[1:]}: τ {tau}"
        figures.append((title, _scatter(study, result)))
    return figures


def _scatter(study: RankStudy, result: ScoreResult) -> Markup:
    label = LABELS[result.name]
    axis_label = label
    scale = 1.0
    if result.name in PERCENTAGES:
        axis_label = f"{label}, %"
        scale = 100.0
    elif result.name in MILLIONS:
        scale = 1e-6
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
        axes.set_xlabel(axis_label)
        axes.set_ylabel("accuracy trained standalone, %")
        mean_tau = result.over_supernets["kendall"].mean
        tau = "undefined" if mean_tau is None else f"{mean_tau:.3f}"
        description = (
            f"Scatter plot of accuracy trained standalone over {label} of {len(x)} architectures:"
            f" Kendall tau {tau}."
        )
        return inline_svg(figure, f"rank-{result.name}", description)


def _near(values_N: np.ndarray) -> np.ndarray:
    """The values that a figure shows: bool [N]. A few networks no better than chance
    would leave no room for all the others.
    """
    # quantiles do not depend on the outliers themselves; the margin is our choice
    low, high = np.quantile(values_N, [0.1, 0.9])
    margin = 2 * (high - low)
    near: np.ndarray = (values_N >= low - margin) & (values_N <= high + margin)
    return near


def _tau(result: ScoreResult) -> float:
    """Kendall's tau, for sorting: undefined ones are the worst."""
    mean = result.over_supernets["kendall"].mean
    return -2.0 if mean is None else mean


def _cell(result: ScoreResult, metric: str) -> tuple[str, str]:
    """A metric, and on the second line its standard deviation over super-nets, or its
    interval if there is one super-net.
    """
    all_nets = result.over_supernets.get(metric, MeanStd(mean=None, std=None))
    if all_nets.std is not None:
        return _shown(metric, all_nets.mean), f"± {_shown(metric, all_nets.std)}"

    # a metric may be undefined for a super-net: take the first that has it
    estimate = IntervalEstimate(value=None)
    for supernet in result.supernets:
        if metric in supernet and supernet[metric].value is not None:
            estimate = supernet[metric]
            break
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{_shown(metric, estimate.low)} to {_shown(metric, estimate.high)}"
    return _shown(metric, estimate.value), interval


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    if metric == "regret":
        return f"{100 * value:.2f}"
    if metric in ("precision", "random_reaches"):
        return f"{value:.0%}"
    return _signed(value)


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}".replace("-", "−")
