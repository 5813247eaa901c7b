"""The figure and the table of shrinking a space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from hwnas.core.describe import format_count
from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import Remaining, ShrinkCurve, ShrinkPath, ShrinkStudy
from hwnas.study.shrink_eval import shown

LOOKS = (("blue", "o"), ("orange", "s"), ("green", "^"), ("red", "D"), ("ink", "v"))
"""Colour and marker of each metric in turn."""


@dataclass(frozen=True)
class ShrinkRow:
    """A way to shrink, as texts: the sizes of the space, mean accuracy before and after
    every drop, what is left in the end.

    ``dropped``: how many of the scored operators left at every drop. ``rises``: whether
    the mean accuracy rose at every drop. ``kendall``: how the scores ranked operators,
    drop by drop.
    """

    name: str
    dropped: str
    sizes: str
    means: str
    rises: str
    best_tenth: str
    best: str
    kendall: str


def rows(study: ShrinkStudy) -> list[ShrinkRow]:
    """The metrics in their order, then chance and the oracle."""
    curves = {curve.name: curve for curve in study.curves}
    found = [_row(path, curves.get(path.metric)) for path in study.paths]
    if study.chance is not None:
        means = [mean for mean, _, _ in study.chance.mean]
        _, low, high = study.chance.mean[-1]
        span = f"{_percent(means[-1])} ({_percent(low)} to {_percent(high)})"
        tenth = _percent(study.chance.best_tenth[-1][0])
        found.append(
            ShrinkRow(
                "chance",
                "–",
                "–",
                _arrows([*map(_percent, means[:-1]), span]),
                "–",
                tenth,
                "–",
                "–",
            )
        )
    if study.oracle is not None:
        left = study.oracle.remaining
        found.append(
            ShrinkRow(
                study.oracle.name,
                "–",
                _arrows(f"{each.networks:,}" for each in left),
                _arrows(_percent(each.mean) for each in left),
                _rises(left),
                _percent(left[-1].best_tenth),
                _percent(left[-1].best),
                "–",
            )
        )
    return found


def _row(path: ShrinkPath, curve: ShrinkCurve | None) -> ShrinkRow:
    sizes = _arrows(
        format_count(size)
        for size in (
            *(step.size for step in path.steps[:1]),
            *(step.size_after for step in path.steps),
        )
    )
    dropped = ", ".join(
        f"{len(step.dropped)}/{sum(map(len, step.scores.values()))}" for step in path.steps
    )
    if curve is None:
        return ShrinkRow(shown(path.metric), dropped, sizes, "–", "–", "–", "–", "–")
    left = curve.remaining
    taus = ", ".join(
        "–" if tau is None else f"{tau:+.2f}".replace("-", "−") for tau in curve.operator_kendall
    )
    means = _arrows(_percent(each.mean) for each in left)
    return ShrinkRow(
        shown(path.metric),
        dropped,
        sizes,
        means,
        _rises(left),
        _percent(left[-1].best_tenth),
        _percent(left[-1].best),
        taus,
    )


def _rises(left: tuple[Remaining, ...]) -> str:
    means = [each.mean for each in left]
    pairs = list(pairwise(means))
    up = sum(a is not None and b is not None and b > a for a, b in pairs)
    return "yes" if up == len(pairs) else f"{up} of {len(pairs)}"


def _arrows(parts: Iterable[str]) -> str:
    return " → ".join(parts)


def course(study: ShrinkStudy) -> Markup | None:
    """Mean true accuracy of the networks left, and what is left of the best tenth, by
    drops. None without a ground truth.
    """
    if not study.curves:
        return None
    with canvas(FULL, 320) as figure:
        left_axes, right_axes = figure.subplots(1, 2)
        for axes, field, label in (
            (left_axes, "mean", "mean true accuracy of the networks left, %"),
            (right_axes, "best_tenth", "left of the best tenth, %"),
        ):
            if study.chance is not None:
                bands = getattr(study.chance, field)
                _, low, high = (
                    [100 * value for value in column] for column in zip(*bands, strict=True)
                )
                axes.fill_between(
                    range(len(bands)),
                    low,
                    high,
                    color=LIGHT["line"],
                    lw=0,
                    label="chance, 5 to 95 %",
                )
            drawn = [
                (curve, *LOOKS[number % len(LOOKS)], "-")
                for number, curve in enumerate(study.curves)
            ]
            drawn += [(study.oracle, "muted", "", ":")] if study.oracle is not None else []
            for curve, colour, marker, line in drawn:
                values = [getattr(each, field) for each in curve.remaining]
                points = [
                    (stage, 100 * value) for stage, value in enumerate(values) if value is not None
                ]
                axes.plot(
                    *zip(*points, strict=True),
                    color=LIGHT[colour],
                    marker=marker,
                    ls=line,
                    lw=1.6,
                    ms=5,
                    label=shown(curve.name),
                )
            axes.set_xlabel("drops")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*left_axes.get_legend_handles_labels(), loc="outside upper left", ncols=7)
        ends = ", ".join(
            f"{shown(curve.name)} {_percent(curve.remaining[-1].mean)}" for curve in study.curves
        )
        return inline_svg(
            figure,
            "shrinking",
            f"Mean true accuracy of the networks left after each drop; in the end: {ends}.",
        )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
