"""The figure and the tables of a comparison of search methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import CompareStudy, IntervalEstimate, MethodResult, RandomSearch


@dataclass(frozen=True)
class MethodRow:
    """A row of the table of methods: the name, the seeds without a result and why, and
    the cells, each with a second line.
    """

    name: str
    failed: dict[str, str]
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PairwiseRow:
    """A method and its probability of beating each other method, with the p-value on
    the second line; the cell for itself is empty.
    """

    name: str
    cells: tuple[tuple[str, str], ...]


def ordered(study: CompareStudy) -> list[MethodResult]:
    """The methods by median rank, the best first; those without any result last."""

    def rank_of(method: MethodResult) -> float:
        return math.inf if method.rank is None else method.rank

    return sorted(study.methods, key=rank_of)


def method_rows(study: CompareStudy) -> list[MethodRow]:
    """The methods in order."""
    rows = []
    for method in ordered(study):
        rows.append(MethodRow(method.name, method.failed, _cells(study, method)))
    return rows


def _cells(study: CompareStudy, method: MethodResult) -> tuple[tuple[str, str], ...]:
    if (
        method.rank is None
        or method.accuracy is None
        or method.regret is None
        or method.cost is None
        or method.equal is None
    ):
        # one dash per column of the table
        return tuple([("–", "")] * 7)
    accuracies = [row.accuracy for row in method.found]
    seconds = [row.cpu_seconds for row in method.found if row.cpu_seconds is not None]
    mean_seconds = f"{sum(seconds) / len(seconds):.0f} s" if seconds else ""
    probability, interval = _chance(method.p_better_than_random)
    return (
        (f"{method.rank:g}", " ".join(str(row.rank) for row in method.found)),
        (f"{method.rank / study.architectures:.1%}", ""),
        (f"{method.accuracy:.2%}", f"{min(accuracies):.2%} to {max(accuracies):.2%}"),
        (f"{100 * method.regret:.2f}", ""),
        (f"{method.cost:.3g}", mean_seconds),
        _chance(method.p_better_than_one),
        (probability, f"of {method.equal.trainings}, {interval}"),
    )


def pairwise_rows(study: CompareStudy) -> list[PairwiseRow]:
    """Every method against every other, in order."""
    names = [method.name for method in ordered(study) if method.found]
    cells = {}
    for pair in study.pairwise:
        p = f"p = {pair.p_value:.3g}"
        assert pair.beats.value is not None
        cells[pair.first, pair.second] = f"{pair.beats.value:.2f}", p
        # the study has every pair once; ties count half, so the reverse is 1 - p
        cells[pair.second, pair.first] = f"{1 - pair.beats.value:.2f}", p
    rows = []
    for name in names:
        row = tuple(cells.get((name, other), ("", "")) for other in names)
        rows.append(PairwiseRow(name, row))
    return rows


def ranks(study: CompareStudy) -> Markup | None:
    """True ranks by method: a dot for every seed, the median, and in the background
    what random search finds at equal cost.
    """
    methods = [method for method in ordered(study) if method.found and method.equal is not None]
    if not methods:
        return None
    # 42 pixels per row, and one more row for a single random architecture
    with canvas(FULL, 96 + 42 * (len(methods) + 1)) as figure:
        axes = figure.subplots()
        _random(study, study.random, len(methods), axes)
        for row, method in enumerate(methods):
            assert method.equal is not None and method.rank is not None
            _random(study, method.equal, row, axes)
            is_first = row == 0  # one entry in the legend, not one per method
            shares = [seed_result.rank / study.architectures for seed_result in method.found]
            median = method.rank / study.architectures
            axes.scatter(
                shares,
                [row] * len(shares),
                s=44,
                color=LIGHT["blue"],
                edgecolors=LIGHT["paper"],
                lw=0.8,
                zorder=4,
                label="a seed" if is_first else None,
            )
            axes.plot(
                [median] * 2,
                [row - 0.3, row + 0.3],
                color=LIGHT["orange"],
                lw=2.4,
                zorder=3,
                label="median" if is_first else None,
            )
        names = [method.name for method in methods]
        axes.set_yticks(range(len(methods) + 1), [*names, "one random"])
        axes.set_ylim(len(methods) + 0.6, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(
            f"true rank among the {study.architectures:,} architectures in the budget: 0 is the"
            " best, 1 the worst"
        )
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=4)
        medians = "; ".join(f"{method.name}: median rank {method.rank:g}" for method in methods)
        return inline_svg(
            figure,
            "comparing",
            f"Strip plot of true ranks among {study.architectures} architectures by method,"
            f" {len(study.seeds)} seeds. {medians}; a random one:"
            f" mean rank {study.random.rank:.0f}.",
        )


def _random(study: CompareStudy, random: RandomSearch, row: int, axes: Axes) -> None:
    """The box of random search: the middle half dark, 10 to 90 % pale, the median as a
    line.
    """
    # the 10, 25, 50, 75 and 90 % quantiles
    low, lower, median, upper, high = (rank / study.architectures for rank in random.ranks)
    is_first = row == 0
    axes.barh(
        row,
        high - low,
        left=low,
        height=0.62,
        color=LIGHT["wash"],
        zorder=1,
        label="random at its cost, 10–90 %" if is_first else None,
    )
    axes.barh(
        row,
        upper - lower,
        left=lower,
        height=0.62,
        color=LIGHT["line"],
        zorder=1,
        label="25–75 %" if is_first else None,
    )
    axes.plot([median] * 2, [row - 0.31, row + 0.31], color=LIGHT["shade"], lw=1.4, zorder=2)


def _chance(estimate: IntervalEstimate) -> tuple[str, str]:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "–", ""
    return f"{estimate.value:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}"
