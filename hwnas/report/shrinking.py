"""The figure and the table of shrinking a space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hwnas.core.describe import format_count
from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import Chance, Remaining, ShrinkCurve, ShrinkPath, ShrinkStudy
from hwnas.study.shrink_eval import shown

LOOKS = (("blue", "o"), ("orange", "s"), ("green", "^"), ("red", "D"), ("ink", "v"))
"""Colour and marker of each score's curve, in turn."""


@dataclass(frozen=True)
class ShrinkRow:
    """A row of the table, as texts: the sizes of the space, the mean accuracy before
    and after every drop, and what remains in the end.

    ``dropped`` is how many of the scored operators were dropped each time. ``rises``
    says whether the mean accuracy rose with every drop. ``kendall`` is how well the
    scores ranked the operators, drop by drop.
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
    """The scores in their order, then chance and the oracle."""
    curves = {curve.name: curve for curve in study.curves}
    table = [_row(path, curves.get(path.metric)) for path in study.paths]
    if study.chance is not None:
        table.append(_chance_row(study.chance))
    if study.oracle is not None:
        table.append(_oracle_row(study.oracle))
    return table


def _chance_row(chance: Chance) -> ShrinkRow:
    means = [_percent(mean) for mean, _, _ in chance.mean]
    _, low, high = chance.mean[-1]
    last = f"{means[-1]} ({_percent(low)} to {_percent(high)})"
    best_tenth, _, _ = chance.best_tenth[-1]
    return ShrinkRow(
        name="chance",
        dropped="–",
        sizes="–",
        means=_arrows([*means[:-1], last]),
        rises="–",
        best_tenth=_percent(best_tenth),
        best="–",
        kendall="–",
    )


def _oracle_row(oracle: ShrinkCurve) -> ShrinkRow:
    remaining = oracle.remaining
    return ShrinkRow(
        name=oracle.name,
        dropped="–",
        sizes=_arrows(f"{stage.networks:,}" for stage in remaining),
        means=_arrows(_percent(stage.mean) for stage in remaining),
        rises=_rises(remaining),
        best_tenth=_percent(remaining[-1].best_tenth),
        best=_percent(remaining[-1].best),
        kendall="–",
    )


def _row(path: ShrinkPath, curve: ShrinkCurve | None) -> ShrinkRow:
    sizes = [step.size for step in path.steps[:1]]
    sizes += [step.size_after for step in path.steps]
    dropped = []
    for step in path.steps:
        scored = sum(map(len, step.scores.values()))
        dropped.append(f"{len(step.dropped)}/{scored}")
    row = ShrinkRow(
        name=shown(path.metric),
        dropped=", ".join(dropped),
        sizes=_arrows(map(format_count, sizes)),
        means="–",
        rises="–",
        best_tenth="–",
        best="–",
        kendall="–",
    )
    if curve is None:  # no accuracies of trained networks are known for this space
        return row

    remaining = curve.remaining
    return replace(
        row,
        means=_arrows(_percent(stage.mean) for stage in remaining),
        rises=_rises(remaining),
        best_tenth=_percent(remaining[-1].best_tenth),
        best=_percent(remaining[-1].best),
        kendall=", ".join(map(_tau, curve.operator_kendall)),
    )


def _tau(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.2f}".replace("-", "−")


def _rises(remaining: tuple[Remaining, ...]) -> str:
    pairs = list(pairwise(stage.mean for stage in remaining))
    rises = 0
    for before, after in pairs:
        rises += before is not None and after is not None and after > before
    return "yes" if rises == len(pairs) else f"{rises} of {len(pairs)}"


def _arrows(parts: Iterable[str]) -> str:
    return " → ".join(parts)


def plot_curves(study: ShrinkStudy) -> Markup | None:
    """Mean true accuracy of the remaining networks, and how much of the best tenth
    remains, over the drops. None without a ground truth.
    """
    if not study.curves:
        return None
    with canvas(FULL, 320) as figure:
        left_axes, right_axes = figure.subplots(1, 2)
        _draw(left_axes, study, "mean")
        left_axes.set_ylabel("mean true accuracy of the networks left, %")
        _draw(right_axes, study, "best_tenth")
        right_axes.set_ylabel("left of the best tenth, %")
        figure.legend(*left_axes.get_legend_handles_labels(), loc="outside upper left", ncols=7)
        ends = []
        for curve in study.curves:
            ends.append(f"{shown(curve.name)} {_percent(curve.remaining[-1].mean)}")
        return inline_svg(
            figure,
            "shrinking",
            f"Mean true accuracy of the networks left after each drop; in the end:"
            f" {', '.join(ends)}.",
        )


def _draw(axes: Axes, study: ShrinkStudy, field: str) -> None:
    """A field of ``Remaining`` over the drops: every score, chance and the oracle."""
    if study.chance is not None:
        bands = getattr(study.chance, field)
        low = [100 * band_low for _, band_low, _ in bands]
        high = [100 * band_high for _, _, band_high in bands]
        axes.fill_between(
            range(len(bands)), low, high, color=LIGHT["line"], lw=0, label="chance, 5 to 95 %"
        )
    lines = []
    for number, curve in enumerate(study.curves):
        colour, marker = LOOKS[number % len(LOOKS)]
        lines.append((curve, colour, marker, "-"))
    if study.oracle is not None:
        lines.append((study.oracle, "muted", "", ":"))
    for curve, colour, marker, style in lines:
        values = [getattr(stage, field) for stage in curve.remaining]
        drops = [drop for drop, value in enumerate(values) if value is not None]
        if not drops:  # the legend would list a curve that is not there
            continue
        axes.plot(
            drops,
            [100 * values[drop] for drop in drops],
            color=LIGHT[colour],
            marker=marker,
            ls=style,
            lw=1.6,
            ms=5,
            label=shown(curve.name),
        )
    axes.set_xlabel("drops")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
