"""The figure and the tables of a comparison of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.study.documents import CompareStudy, Estimate, MethodResult, RandomSearch


@dataclass(frozen=True)
class MethodRow:
    """A method of the table: its name, what it lacks results of, and its cells, each
    with a line below.
    """

    name: str
    failed: dict[str, str]
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PairwiseRow:
    """A method, and its probability to beat each other one, with the p-value below; an
    empty cell for itself.
    """

    name: str
    cells: tuple[tuple[str, str], ...]


def ordered(study: CompareStudy) -> list[MethodResult]:
    """The methods, the best median rank first; those without any result last."""
    return sorted(
        study.methods, key=lambda method: math.inf if method.rank is None else method.rank
    )


def method_rows(study: CompareStudy) -> list[MethodRow]:
    """The methods in order."""
    return [
        MethodRow(method.name, method.failed, _cells(study, method)) for method in ordered(study)
    ]


def _cells(study: CompareStudy, method: MethodResult) -> tuple[tuple[str, str], ...]:
    if (
        method.rank is None
        or method.accuracy is None
        or method.regret is None
        or method.cost is None
        or method.equal is None
    ):
        return tuple([("–", "")] * 7)
    seconds = [row.cpu_seconds for row in method.found if row.cpu_seconds is not None]
    return (
        (f"{method.rank:g}", " ".join(str(row.rank) for row in method.found)),
        (f"{method.rank / study.architectures:.1%}", ""),
        (
            f"{method.accuracy:.2%}",
            (
                f"{min(row.accuracy for row in method.found):.2%} to"
                f" {max(row.accuracy for row in method.found):.2%}"
            ),
        ),
        (f"{100 * method.regret:.2f}", ""),
        (f"{method.cost:.3g}", f"{sum(seconds) / len(seconds):.0f} s" if seconds else ""),
        _chance(method.p_better_than_one),
        (
            _chance(method.p_better_than_random)[0],
            f"of {method.equal.trainings}, {_chance(method.p_better_than_random)[1]}",
        ),
    )


def pairwise_rows(study: CompareStudy) -> list[PairwiseRow]:
    """Every method against every other, in order."""
    names = [method.name for method in ordered(study) if method.found]
    cells = {}
    for pair in study.pairwise:
        p = f"p = {pair.p_value:.3g}"
        assert pair.beats.value is not None
        cells[pair.first, pair.second] = f"{pair.beats.value:.2f}", p
        cells[pair.second, pair.first] = f"{1 - pair.beats.value:.2f}", p
    return [
        PairwiseRow(name, tuple(cells.get((name, other), ("", "")) for other in names))
        for name in names
    ]


def ranks(study: CompareStudy) -> Markup | None:
    """True ranks by method: a dot for every seed, the median, and behind them what
    random search at equal cost finds.
    """
    methods = [method for method in ordered(study) if method.found and method.equal is not None]
    if not methods:
        return None
    with canvas(FULL, 96 + 42 * (len(methods) + 1)) as figure:
        axes = figure.subplots()
        _random(study, study.random, len(methods), axes)
        for row, method in enumerate(methods):
            assert method.equal is not None and method.rank is not None
            _random(study, method.equal, row, axes)
            first = row == 0
            share = [each.rank / study.architectures for each in method.found]
            middle = method.rank / study.architectures
            axes.scatter(
                share,
                [row] * len(share),
                s=44,
                color=LIGHT["blue"],
                edgecolors=LIGHT["paper"],
                lw=0.8,
                zorder=4,
                label="a seed" if first else None,
            )
            axes.plot(
                [middle] * 2,
                [row - 0.3, row + 0.3],
                color=LIGHT["orange"],
                lw=2.4,
                zorder=3,
                label="median" if first else None,
            )
        axes.set_yticks(
            range(len(methods) + 1), [*(method.name for method in methods), "one random"]
        )
        axes.set_ylim(len(methods) + 0.6, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(
            f"true rank among the {study.architectures:,} architectures in the budget: 0 is the"
            " best, 1 the worst"
        )
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=4)
        found = "; ".join(f"{method.name}: median rank {method.rank:g}" for method in methods)
        return inline_svg(
            figure,
            "comparing",
            f"Strip plot of true ranks among {study.architectures} architectures by method,"
            f" {len(study.seeds)} seeds. {found}; a random one: mean rank {study.random.rank:.0f}.",
        )


def _random(study: CompareStudy, random: RandomSearch, row: int, axes: Axes) -> None:
    """The box of random search: the middle half dark, 10 to 90 % pale, the median a line."""
    low, quarter, middle, three, high = (rank / study.architectures for rank in random.ranks)
    first = row == 0
    axes.barh(
        row,
        high - low,
        left=low,
        height=0.62,
        color=LIGHT["wash"],
        zorder=1,
        label="random at its cost, 10–90 %" if first else None,
    )
    axes.barh(
        row,
        three - quarter,
        left=quarter,
        height=0.62,
        color=LIGHT["line"],
        zorder=1,
        label="25–75 %" if first else None,
    )
    axes.plot([middle] * 2, [row - 0.31, row + 0.31], color=LIGHT["shade"], lw=1.4, zorder=2)


def _chance(estimate: Estimate) -> tuple[str, str]:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "–", ""
    return f"{estimate.value:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}"
