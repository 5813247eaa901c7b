"""How good the networks are that a shrinking leaves, by their accuracies when trained
standalone, compared with chance and with an oracle.

``chance`` drops random operators by the same rule. ``oracle`` drops the operators whose
networks, among those that are left, have the lowest mean accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
"""Number of random shrinkings that ``chance`` averages over (our choice)."""


class Known:
    """The networks of known accuracy: ``accuracy_N`` in 0..1, ``top_N`` (bool [N], the
    best tenth), and which of them contain each operator.
    """

    def __init__(self, space: SearchSpace, truth: Truth) -> None:
        self.accuracy_N = truth.mean
        self.top_N = np.zeros(len(truth.names), dtype=bool)
        self.top_N[best_tenth(truth.mean)] = True
        columns = {choice.key: _options(space, truth, choice.key) for choice in shrinkable(space)}
        self._contains = {}
        for key, option in operators(space):
            self._contains[key, option] = np.array([value == option for value in columns[key]])

    def left(self, dropped: Sequence[Operator]) -> np.ndarray:
        """Which networks contain none of the dropped operators: bool [N]."""
        if not dropped:
            return np.ones(len(self.accuracy_N), dtype=bool)
        gone_N: np.ndarray = np.any([self._contains[operator] for operator in dropped], axis=0)
        return ~gone_N

    def means(self, wanted: Sequence[Operator], left_N: np.ndarray) -> Scores:
        """The mean accuracy of the remaining networks that contain each operator of
        ``wanted``. Operators that no remaining network contains are omitted.
        """
        means: Scores = {}
        for operator in wanted:
            with_operator_N = left_N & self._contains[operator]
            if with_operator_N.any():
                means[operator] = float(self.accuracy_N[with_operator_N].mean())
        return means

    def remaining(self, left_N: np.ndarray) -> Remaining:
        """Statistics of the remaining networks (``left_N``: bool [N])."""
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


def _options(space: SearchSpace, truth: Truth, key: str) -> list[str | None]:
    """The option of every network at a choice; None if the network does not use it."""
    options: list[str | None] = []
    for picks in truth.picks:
        options.append(str(picks[key]) if space.is_kept(key, picks) else None)
    return options


def compare(ctx: StageContext, space: SearchSpace, truth: Truth | None) -> None:
    """Write ``shrink.json``: the paths of all metrics and, if ``truth`` is given, the
    true accuracies of the networks that they leave.
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
    """What each round of a shrinking has left, starting with the full space."""
    dropped: list[Operator] = []
    remaining = [known.remaining(known.left(()))]
    taus = []
    for step in steps:
        scores: Scores = {}
        for key, options in step.scores.items():
            for option, score in options.items():
                scores[key, option] = score
        truth = known.means(list(scores), known.left(dropped))
        scored = []
        true = []
        for operator, score in scores.items():
            if operator in truth:
                scored.append(score)
                true.append(truth[operator])
        tau = kendall(np.array(scored), np.array(true))
        taus.append(tau if math.isfinite(tau) else None)
        dropped += step.dropped
        remaining.append(known.remaining(known.left(dropped)))
    return ShrinkCurve(name=name, remaining=tuple(remaining), operator_kendall=tuple(taus))


def oracle(known: Known, space: SearchSpace, config: ShrinkConfig) -> ShrinkCurve:
    """Shrinking by the true mean accuracy of each operator's networks."""
    remaining = _simulated(known, space, config, lambda wanted, left_N: known.means(wanted, left_N))
    return ShrinkCurve(name="oracle", remaining=tuple(remaining))


def chance(known: Known, space: SearchSpace, config: ShrinkConfig, seed: int) -> Chance:
    """Random shrinking, ``REPEATS`` times, until none of the runs has known networks left.

    A run that ended earlier counts with its last round from then on.
    """
    runs = []
    for repeat in range(REPEATS):
        score = partial(_random_scores, np.random.default_rng([seed, repeat, 4]))
        runs.append(_simulated(known, space, config, score))
    rounds = max(map(len, runs))
    padded = [run + [run[-1]] * (rounds - len(run)) for run in runs]

    mean_bands = []
    tenth_bands = []
    for i in range(rounds):
        at_round = [run[i] for run in padded]
        means = [remaining.mean for remaining in at_round if remaining.mean is not None]
        if not means:
            break
        mean_bands.append(_band(means))
        tenth_bands.append(_band([remaining.best_tenth or 0.0 for remaining in at_round]))
    return Chance(repeats=REPEATS, mean=tuple(mean_bands), best_tenth=tuple(tenth_bands))


def _band(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and the 5 % and 95 % quantiles."""
    array = np.array(values, dtype=float)
    low, high = np.quantile(array, [0.05, 0.95])
    return float(array.mean()), float(low), float(high)


def _random_scores(
    rng: np.random.Generator, wanted: list[Operator], left_N: np.ndarray
) -> dict[Operator, float]:
    del left_N  # the signature of a score; random scores do not look at the networks
    return {operator: float(rng.random()) for operator in wanted}


def _simulated(
    known: Known,
    space: SearchSpace,
    config: ShrinkConfig,
    score: Callable[[list[Operator], np.ndarray], Mapping[Operator, float]],
) -> list[Remaining]:
    """The rounds of a shrinking by ``score`` (operators, remaining networks) -> scores,
    which needs no super-net.
    """
    dropped: list[Operator] = []
    rounds = [known.remaining(known.left(()))]
    present = space
    while present.size > config.until and shrinkable(present):
        scores = score(operators(present), known.left(dropped))
        drops = select_drops(present, scores, config)
        if not drops:
            break
        dropped += drops
        present = remove_operators(present, drops, space.name)
        rounds.append(known.remaining(known.left(dropped)))
    return rounds


def shown(name: str) -> str:
    """The label of a curve. It keeps the metric ``random``, which is a single run, apart
    from ``chance``, which is a mean of many.
    """
    return "random (one run)" if name == "random" else name


def lines(study: ShrinkStudy) -> list[str]:
    """The result in words."""
    report = []
    for path in study.paths:
        sizes = [step.size for step in path.steps[:1]]
        sizes += [step.size_after for step in path.steps]
        report.append(
            f"{shown(path.metric)}: {' -> '.join(map(format_count, sizes))} architectures"
        )
    curves = list(study.curves)
    if study.oracle is not None:
        curves.append(study.oracle)
    for each in curves:
        means = " -> ".join(_percent(remaining.mean) for remaining in each.remaining)
        last = each.remaining[-1]
        report.append(
            f"{shown(each.name)}: mean true accuracy {means}; {_percent(last.best_tenth)} of the"
            f" best tenth left, the best {_percent(last.best)}"
        )
    if study.chance is not None:
        mean, low, high = study.chance.mean[-1]
        report.append(
            f"chance ({study.chance.repeats} random shrinkings):"
            f" {_percent(study.chance.mean[0][0])} -> {_percent(mean)} (90 %: {_percent(low)} to"
            f" {_percent(high)}); {_percent(study.chance.best_tenth[-1][0])} of the best tenth left"
        )
    return report


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
