"""What a shrinking has left, by the accuracies of networks that were trained alone; and
what chance, and an oracle, would leave.

``chance`` drops random operators by the same rule, ``oracle`` those whose networks,
among those left, have the lowest mean accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile

import numpy as np

from hwnas.config import ShrinkConfig
from hwnas.core.describe import format_count
from hwnas.core.space import SearchSpace
from hwnas.runs import StageContext
from hwnas.search.shrinking import (
    Operator,
    Scores,
    operators,
    remove_operators,
    select_drops,
    shrinkable,
)
from hwnas.study.documents import (
    Chance,
    Remaining,
    ShrinkCurve,
    ShrinkPath,
    ShrinkStep,
    ShrinkStudy,
)
from hwnas.study.metrics import best_tenth, kendall
from hwnas.study.truth import Truth

RESULT = "shrink.json"

REPEATS = 200
"""Random shrinkings (ours)."""


class Known:
    """The networks whose accuracy is known, by operator: ``accuracy_N`` in 0..1, and
    which of them contain an operator.
    """

    def __init__(self, space: SearchSpace, truth: Truth) -> None:
        self.accuracy_N = truth.mean
        self.top_N = np.zeros(len(truth.names), dtype=bool)
        self.top_N[best_tenth(truth.mean)] = True
        columns = {
            choice.key: [
                str(picks[choice.key]) if space.kept(choice.key, picks) else None
                for picks in truth.picks
            ]
            for choice in shrinkable(space)
        }
        self._holds = {
            (key, option): np.array([each == option for each in columns[key]])
            for key, option in operators(space)
        }

    def left(self, dropped: Sequence[Operator]) -> np.ndarray:
        """Which networks contain none of the dropped operators: bool [N]."""
        gone = [self._holds[operator] for operator in dropped]
        return ~np.any(gone, axis=0) if gone else np.ones(len(self.accuracy_N), dtype=bool)

    def means(self, wanted: Sequence[Operator], left_N: np.ndarray) -> Scores:
        """Mean accuracy of the networks left that contain each of ``wanted``; those
        that are in none are left out.
        """
        found = {operator: left_N & self._holds[operator] for operator in wanted}
        return {
            operator: float(self.accuracy_N[each_N].mean())
            for operator, each_N in found.items()
            if each_N.any()
        }

    def remaining(self, left_N: np.ndarray) -> Remaining:
        """The numbers of the networks that are left."""
        accuracy_n = self.accuracy_N[left_N]
        if not len(accuracy_n):
            return Remaining(networks=0)
        tenth = float((left_N & self.top_N).sum() / self.top_N.sum())
        return Remaining(
            networks=len(accuracy_n),
            mean=float(accuracy_n.mean()),
            best=float(accuracy_n.max()),
            worst=float(accuracy_n.min()),
            best_tenth=tenth,
        )


def compare(ctx: StageContext, space: SearchSpace, truth: Truth | None) -> None:
    """Write ``shrink.json``: the paths of all metrics, and what they are worth where
    accuracies are known.
    """
    experiment = ctx.experiment
    paths = tuple(
        ShrinkPath.load(ctx.path(f"shrink-{name}", "path.json"))
        for name in experiment.shrink.metrics
    )
    study = ShrinkStudy(
        space=space.name, space_sha256=space.sha256, seed=experiment.seed, paths=paths
    )
    if truth is not None:
        known = Known(space, truth)
        update = {
            "truth": truth.info(str(experiment.study.truth)),
            "curves": tuple(curve(known, path.metric, path.steps) for path in paths),
            "oracle": oracle(known, space, experiment.shrink),
            "chance": chance(known, space, experiment.shrink, experiment.seed),
        }
        study = study.model_copy(update=update)
    study.save(ctx.folder / RESULT)
    for line in lines(study):
        ctx.progress.info(line)


def curve(known: Known, name: str, steps: Sequence[ShrinkStep]) -> ShrinkCurve:
    """What the stages of a shrinking have left."""
    dropped: list[Operator] = []
    remaining, taus = [known.remaining(known.left(()))], []
    for step in steps:
        scores = {
            (key, option): score
            for key, options in step.scores.items()
            for option, score in options.items()
        }
        truth = known.means(list(scores), known.left(dropped))
        both = [operator for operator in scores if operator in truth]
        tau = kendall(
            np.array([scores[operator] for operator in both]),
            np.array([truth[operator] for operator in both]),
        )
        taus.append(tau if math.isfinite(tau) else None)
        dropped += step.dropped
        remaining.append(known.remaining(known.left(dropped)))
    return ShrinkCurve(name=name, remaining=tuple(remaining), operator_kendall=tuple(taus))


def oracle(known: Known, space: SearchSpace, config: ShrinkConfig) -> ShrinkCurve:
    """Shrinking by the truth itself."""
    remaining = _simulated(known, space, config, lambda wanted, left_N: known.means(wanted, left_N))
    return ShrinkCurve(name="oracle", remaining=tuple(remaining))


def chance(known: Known, space: SearchSpace, config: ShrinkConfig, seed: int) -> Chance:
    """Random shrinking, ``REPEATS`` times, as long as any of them has known networks left.

    A run that reached its end earlier counts with what it had left.
    """
    runs = []
    for repeat in range(REPEATS):
        score = partial(_random_scores, np.random.default_rng([seed, repeat, 4]))
        runs.append(_simulated(known, space, config, score))
    stages = max(map(len, runs))
    padded = [run + [run[-1]] * (stages - len(run)) for run in runs]
    means = [
        [run[stage].mean for run in padded if run[stage].mean is not None]
        for stage in range(stages)
    ]
    means = list(takewhile(bool, means))
    tenths = [[run[stage].best_tenth or 0.0 for run in padded] for stage in range(len(means))]
    return Chance(
        repeats=REPEATS, mean=tuple(map(_band, means)), best_tenth=tuple(map(_band, tenths))
    )


def _band(values: Sequence[float | None]) -> tuple[float, float, float]:
    array = np.array(values, dtype=float)
    low, high = np.quantile(array, [0.05, 0.95])
    return float(array.mean()), float(low), float(high)


def _random_scores(
    rng: np.random.Generator, wanted: list[Operator], left_N: np.ndarray
) -> dict[Operator, float]:
    del left_N
    return {each: float(rng.random()) for each in wanted}


def _simulated(
    known: Known,
    space: SearchSpace,
    config: ShrinkConfig,
    score: Callable[[list[Operator], np.ndarray], Mapping[Operator, float]],
) -> list[Remaining]:
    """A shrinking whose scores need no super-net."""
    dropped: list[Operator] = []
    found = [known.remaining(known.left(()))]
    present = space
    while present.size > config.until and shrinkable(present):
        gone = select_drops(present, score(operators(present), known.left(dropped)), config)
        if not gone:
            break
        dropped += gone
        present = remove_operators(present, gone, space.name)
        found.append(known.remaining(known.left(dropped)))
    return found


def shown(name: str) -> str:
    """What a curve is called beside ``chance``: the metric random is one draw, not the
    mean of many.
    """
    return "random (one run)" if name == "random" else name


def lines(study: ShrinkStudy) -> list[str]:
    """The result in words."""
    found = []
    for path in study.paths:
        sizes = [step.size for step in path.steps[:1]] + [step.size_after for step in path.steps]
        found.append(f"{shown(path.metric)}: {' -> '.join(map(format_count, sizes))} architectures")
    for each in (*study.curves, *([study.oracle] if study.oracle is not None else [])):
        means = " -> ".join(_percent(left.mean) for left in each.remaining)
        last = each.remaining[-1]
        found.append(
            f"{shown(each.name)}: mean true accuracy {means}; {_percent(last.best_tenth)} of the"
            f" best tenth left, the best {_percent(last.best)}"
        )
    if study.chance is not None:
        mean, low, high = study.chance.mean[-1]
        found.append(
            f"chance ({study.chance.repeats} random shrinkings):"
            f" {_percent(study.chance.mean[0][0])} -> {_percent(mean)} (90 %: {_percent(low)} to"
            f" {_percent(high)}); {_percent(study.chance.best_tenth[-1][0])} of the best tenth left"
        )
    return found


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
