"""``hwnas study compare``: search methods against random search and against each other,
on architectures whose true accuracies are known.

Every method searches with every seed under one budget, as ``hwnas search`` would, except
that it does not compare itself with random samples. The architecture that a search
ranks first is then looked up in the *truth*: a file of the accuracies of
standalone-trained architectures (study/truth.py). Its true rank is its rank among all
architectures of the truth that meet the budget; n is their number.

**The budget** is that of the search: within ``search.tolerance`` of the target, and
within ``search.limits``. Without ``search.table`` it is a budget of MACs. With B =
``study.compare.max_macs``, the target is B / (1 + tolerance). Searches then propose only
architectures from B (1 - tolerance) / (1 + tolerance) to B. The lower end is there
because architectures far below a budget are bad on average, and a random search among
them would be too easy to beat.

**The cost** of a search is counted in multiply-accumulates (search/cost_counter.py): it
covers training the super-net, evaluating architectures, and the final ranking. It is
expressed in standalone training runs, that is, ``standalone_epochs`` x
``standalone_images`` images, forward and backward (3 MACs for each MAC), of an
architecture with the mean MACs of those in the budget. CPU seconds are also measured,
but no result depends on them.

**Random search** comes in three kinds:

1. One random architecture in the budget (k = 1). It has rank r or better with
   probability r / n.
2. The best of k random architectures, each trained standalone, at the cost of the
   method: k = cost / standalone training, rounded up in favour of random search, so at
   least 1. The selection sees one training run of each architecture (each repeat of the
   truth in turn). The result is the selected architecture's mean accuracy over all
   repeats, as for every other method. Its distribution is computed exactly; with a
   single repeat, P(rank r or better) = 1 - (1 - r / n)^k.
3. Random architectures ranked by a super-net: the strategy ``random``, a method like any
   other. Its settings decide whether it has the same cost as the rest.

**Probabilities** that one method beats another are estimated over all pairs of their
seeds: the fraction in which its architecture has the higher true accuracy, where a tie
counts one half. Intervals are percentiles of a bootstrap over seeds, and p-values are
exact (study/metrics.py). With five seeds against five, the smallest possible p-value is
0.008, and an interval over five seeds is narrower than it ought to be. Many pairs are
compared, and no p-value is corrected for multiple comparisons.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from hwnas.config import Experiment, MethodConfig, StudyConfig, with_new_keys
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.document import explain, merged, user_path, write_atomic
from hwnas.errors import ConfigError, HwnasError
from hwnas.runs import StageContext
from hwnas.search import searching
from hwnas.search.cost_counter import GRADIENT
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.result import SearchResult
from hwnas.search.settings import search_context, search_finder
from hwnas.search.stage import outputs
from hwnas.search.strategy import SearchContext
from hwnas.study import metrics
from hwnas.study.documents import (
    CompareStudy,
    IntervalEstimate,
    MethodResult,
    PairwiseResult,
    RandomSearch,
    SearchOutcome,
)
from hwnas.study.truth import Truth, configured_truth
from hwnas.task import task_of

RESULT = "compare.json"

SEARCH_FILES = ("arch.json", "search.json", "seconds.json")
"""The files that a search of a study keeps. The weights are deleted: the study compares
architectures only.
"""

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Reported quantiles of the true rank that random search reaches."""

COVERAGE_SAMPLES = 256
"""Number of random architectures in the budget that are looked up in the truth before
anything is trained. A truth that lacks many is thus found out at once, instead of after
the first search.
"""


@dataclass(frozen=True)
class ComparisonPool:
    """The architectures that methods are compared on: those of the truth that meet the
    budget.

    ``names``, ``mean_accuracy_N`` (in 0..1, float [n]), ``accuracy_NR`` (of each repeat,
    float [n, repeats]) and ``macs_N`` (float [n]) are in the same order. ``truth`` is the
    whole file, ``context`` that of the searches, which defines the budget.
    """

    context: SearchContext
    table: LatencyTable | None
    truth: Truth
    names: tuple[str, ...]
    mean_accuracy_N: np.ndarray
    accuracy_NR: np.ndarray
    macs_N: np.ndarray

    def rank(self, accuracy: float) -> int:
        """The true rank: the number of architectures that are at least as accurate. Tied
        architectures all get the last of their ranks.
        """
        return int((self.mean_accuracy_N >= accuracy).sum())

    @cached_property
    def _position_by_network(self) -> dict[bytes, int]:
        picks = dict(zip(self.truth.names, self.truth.picks, strict=True))
        return {_network_key(self.context, picks[name]): i for i, name in enumerate(self.names)}

    def position(self, picks: Picks) -> int | None:
        """The index of an architecture in ``names``; None if the truth does not contain
        it or it does not meet the budget.
        """
        return self._position_by_network.get(_network_key(self.context, picks))


def _network_key(context: SearchContext, picks: Picks) -> bytes:
    """A key that is equal for picks that build the same network."""
    return context.space.canonical(context.space.index(picks)).tobytes()


def methods_of(experiment: Experiment) -> tuple[MethodConfig, ...]:
    """The methods to compare. Raises ConfigError if the configuration does not define
    the methods, the seeds or the budget.
    """
    config = experiment.study
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} cannot be studied: true accuracies are known for"
            " classifiers only."
        )
    if not config.compare.methods:
        raise ConfigError(
            "study.compare.methods is empty: name strategies, for instance methods = ['spos',"
            " 'random']."
        )
    if not config.seeds:
        raise ConfigError(
            "study.seeds is empty: give the seeds of every method, for instance seeds = [0, 1, 2,"
            " 3, 4]."
        )
    # The cost of a search would not include that of the weights it starts from.
    search = experiment.search
    if search.weights is not None or search.backbone is not None or search.pretrained is not None:
        raise ConfigError(
            "search.weights, search.backbone and search.pretrained start from trained weights, but"
            " a comparison starts from scratch: remove them."
        )
    has_budget = experiment.search.table is not None or not experiment.search.by_table
    if not has_budget and config.compare.max_macs is None:
        raise ConfigError(
            "study.compare.max_macs is not set: give the budget in multiply-accumulates, or"
            " search.table and its target, or search.budget."
        )
    if experiment.search.table is not None and config.compare.max_macs is not None:
        raise ConfigError(
            "study.compare.max_macs is a budget for studies without search.table: remove it, or"
            " limit MACs by search.limits."
        )
    return config.compare.methods


def method_experiment(experiment: Experiment, method: MethodConfig, seed: int) -> Experiment:
    """The experiment of a method's search with ``seed``. Raises ConfigError if the
    method's own keys are invalid.
    """
    settings = experiment.search.model_dump(mode="json", by_alias=True)
    source = f"study.compare.methods, {method.name!r}"
    method_settings = with_new_keys({"search": method.search}, source)["search"]
    settings = merged(settings, method_settings, replace=("finder", "optimizer"))
    # The study computes random search exactly, so no search has to sample it.
    settings |= {"strategy": method.strategy.model_dump(mode="json"), "random_samples": 0}
    max_macs = experiment.study.compare.max_macs
    if max_macs is not None:
        # The search accepts up to target * (1 + tolerance), which is then max_macs.
        target = max_macs / (1 + experiment.search.tolerance)
        settings |= {
            "budget": {"kind": "macs", "max_macs": target},
            "target_ms": None,
            "target_range": None,
        }
    content = experiment.model_dump(mode="json", by_alias=True)
    content |= {"search": settings, "seed": seed}
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Experiment)}") from error


def comparison_pool(experiment: Experiment, space: SearchSpace) -> ComparisonPool:
    """The architectures of the truth that meet the budget. Also checks the settings of
    every method, so that errors appear before anything is trained.

    Raises ConfigError, TargetError or TableError with a one-sentence message.
    """
    methods = methods_of(experiment)
    truth = configured_truth(experiment.study, space)
    table = None
    if experiment.search.table is not None:
        table = LatencyTable.load(user_path(experiment.search.table, "search.table"))
    index_NC = np.array([space.index(picks) for picks in truth.picks])
    macs_N = np.array([space.decode(picks).macs for picks in truth.picks])
    _check_max_macs(experiment, macs_N)

    contexts = []
    for method in methods:
        # The seeds of a method share all settings, so checking one of them is enough.
        first = method_experiment(experiment, method, experiment.study.seeds[0])
        contexts.append(search_context(first, space, table))
        # raises if the finder's settings are invalid; the result is not needed
        search_finder(first.search)

    # Methods cannot change the budget, so the context of any of them defines it.
    context = contexts[0]
    feasible_N = is_feasible(context, index_NC)
    if not feasible_N.any():
        raise ConfigError(
            f"no architecture of {experiment.study.truth} is within"
            f" {_budget_text(experiment, context)}: change the budget."
        )

    kept = np.flatnonzero(feasible_N)
    pool = ComparisonPool(
        context,
        table,
        truth,
        tuple(truth.names[i] for i in kept),
        truth.mean[kept],
        truth.accuracy_NR[kept],
        macs_N[kept].astype(float),
    )
    for picks in sample_feasible(context, COVERAGE_SAMPLES, np.random.default_rng(0)):
        _known_position(experiment.study, pool, picks, "a random search")
    return pool


def _check_max_macs(experiment: Experiment, macs_N: np.ndarray) -> None:
    """Raise ConfigError if no architecture of the truth is within the budget of MACs.

    This comes before the check of budgets in general, because its message can say which
    MACs the architectures have.
    """
    most = experiment.study.compare.max_macs
    if not most:
        return
    least = most * _low_fraction(experiment)
    if not ((macs_N <= most) & (macs_N >= least)).any():
        raise ConfigError(
            f"study.compare.max_macs = {most}: no architecture of {experiment.study.truth} has"
            f" {least:.0f} to {most} MACs; they have {macs_N.min()} to {macs_N.max()}: choose"
            " another, or raise search.tolerance."
        )


def _low_fraction(experiment: Experiment) -> float:
    """The lower end of a budget of MACs, as a fraction of its upper end."""
    return (1 - experiment.search.tolerance) / (1 + experiment.search.tolerance)


def _budget_text(experiment: Experiment, context: SearchContext) -> str:
    """The budget in words."""
    limits = ""
    if context.limits is not None:
        limits = "".join(f", {limit.title} <= {limit.most:g}" for limit in context.limits.compiled)
    most = experiment.study.compare.max_macs
    if most is None:
        target = context.cost_model.unit.shown(context.target)
        return f"{100 * context.tolerance:.3g} % of {target}{limits}"
    return f"{most * _low_fraction(experiment) / 1e6:.4g} to {most / 1e6:.4g} M MACs{limits}"


def _known_position(config: StudyConfig, pool: ComparisonPool, picks: Picks, who: str) -> int:
    """The index of an architecture in the pool. Raises ConfigError if it is unknown."""
    position = pool.position(picks)
    if position is None:
        raise ConfigError(
            f"study.truth = {config.truth!r} has no accuracy for {json.dumps(picks)}, which {who}"
            " proposes: a comparison needs every architecture in the budget; complete the file, or"
            " choose another budget."
        )
    return position


def run_search(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """Run one search of the study in its folder. Only ``SEARCH_FILES`` are kept."""
    started = time.process_time()
    # If both files exist, an earlier process finished the search and was killed before it
    # had written seconds.json and deleted the weights. The search need not run again.
    searched = all((ctx.folder / name).exists() for name in ("arch.json", "search.json"))
    interrupted = searched or any(ctx.folder.glob("*.pt"))
    if not searched:
        searching.run(ctx, space, table)
    # This process has timed only the last part of a resumed search, so no time is reported.
    seconds = None if interrupted else round(time.process_time() - started, 1)
    write_atomic(ctx.folder / "seconds.json", json.dumps({"cpu_seconds": seconds}).encode())
    for name in outputs(ctx.experiment.search):
        if name not in SEARCH_FILES:
            (ctx.folder / name).unlink(missing_ok=True)


Searches = Mapping[tuple[str, int], Path]
"""(method, seed) -> the folder of a finished search."""


def run(
    ctx: StageContext,
    space: SearchSpace,
    pool: ComparisonPool,
    searches: Searches,
    failed: Mapping[tuple[str, int], str],
) -> None:
    """Look up the results of the searches in the pool and write ``compare.json``.

    ``failed`` maps (method, seed) to the reason why that search has no result. Raises
    HwnasError if every search failed.
    """
    config = ctx.experiment.study
    if not searches:
        raise HwnasError(
            "every search failed, so there is nothing to compare:"
            f" {'; '.join(dict.fromkeys(failed.values()))}"
        )
    # GRADIENT: MACs of forward and backward, per MAC of the network
    standalone_macs = (
        config.compare.standalone_epochs
        * config.compare.standalone_images
        * GRADIENT
        * float(pool.macs_N.mean())
    )

    results = []
    for method in config.compare.methods:
        outcomes = []
        reasons = {}
        for seed in config.seeds:
            key = (method.name, seed)
            if key in searches:
                outcomes.append(_outcome(config, pool, method.name, seed, searches[key]))
            if key in failed:
                reasons[str(seed)] = failed[key]
        results.append(_method_result(config, pool, method, outcomes, reasons, standalone_macs))
    with_outcomes = [result for result in results if result.found]
    pairwise = [_pairwise_result(config, a, b) for a, b in combinations(with_outcomes, 2)]

    best = int(pool.mean_accuracy_N.argmax())
    in_ms = pool.context.cost_model.unit.name == "ms"
    study = CompareStudy(
        space=space.name,
        space_sha256=space.sha256,
        truth=pool.truth.info(str(config.truth)),
        budget=_budget_text(ctx.experiment, pool.context),
        target_ms=pool.context.target if in_ms else None,
        tolerance=pool.context.tolerance,
        architectures=len(pool.names),
        best=pool.names[best],
        best_accuracy=float(pool.mean_accuracy_N[best]),
        standalone_epochs=config.compare.standalone_epochs,
        standalone_images=config.compare.standalone_images,
        standalone_macs=standalone_macs,
        bootstrap=config.bootstrap,
        confidence=config.confidence,
        seeds=config.seeds,
        methods=tuple(results),
        random=random_search(pool, 1),
        pairwise=tuple(pairwise),
    )
    study.save(ctx.folder / RESULT)
    for line in report_lines(study):
        ctx.progress.info(line)


def _outcome(
    config: StudyConfig, pool: ComparisonPool, method: str, seed: int, folder: Path
) -> SearchOutcome:
    """The first-ranked architecture of the search in ``folder``, and its true rank."""
    result = SearchResult.load(folder / "search.json")
    chosen = result.candidates[0]
    position = _known_position(config, pool, chosen.picks, f"{method} (seed {seed})")
    accuracy = float(pool.mean_accuracy_N[position])
    assert result.cost is not None
    return SearchOutcome(
        seed=seed,
        name=pool.names[position],
        picks=chosen.picks,
        macs=int(pool.macs_N[position]),
        accuracy=accuracy,
        rank=pool.rank(accuracy),
        regret=float(pool.mean_accuracy_N.max()) - accuracy,
        supernet_quality=chosen.quality,
        cost=result.cost,
        cpu_seconds=json.loads((folder / "seconds.json").read_text())["cpu_seconds"],
    )


def _method_result(
    config: StudyConfig,
    pool: ComparisonPool,
    method: MethodConfig,
    outcomes: Sequence[SearchOutcome],
    failed: Mapping[str, str],
    standalone_macs: float,
) -> MethodResult:
    if not outcomes:
        return MethodResult(
            name=method.name, strategy=method.strategy.name, found=(), failed=dict(failed)
        )
    cost = float(np.mean([outcome.cost.macs for outcome in outcomes])) / standalone_macs
    # Rounded up, so that random search never has a smaller budget than the method.
    trainings = max(1, math.ceil(cost))
    return MethodResult(
        name=method.name,
        strategy=method.strategy.name,
        found=tuple(outcomes),
        failed=dict(failed),
        rank=float(np.median([outcome.rank for outcome in outcomes])),
        accuracy=float(np.median(_accuracies(outcomes))),
        regret=float(np.median([outcome.regret for outcome in outcomes])),
        cost=cost,
        equal=random_search(pool, trainings),
        p_better_than_one=_beats_random(config, pool, outcomes, 1),
        p_better_than_random=_beats_random(config, pool, outcomes, trainings),
    )


def chosen_by_random(pool: ComparisonPool, trainings: int) -> np.ndarray:
    """The probability that a random search of ``trainings`` standalone training runs
    selects each architecture: float [n]; see the module docstring.
    """
    by_repeat = [metrics.best_of_random(accuracy, trainings) for accuracy in pool.accuracy_NR.T]
    mean: np.ndarray = np.mean(by_repeat, axis=0)
    return mean


def random_search(pool: ComparisonPool, trainings: int) -> RandomSearch:
    """The exact result of a random search of ``trainings`` standalone training runs."""
    probability_N = chosen_by_random(pool, trainings)
    rank_N = np.array([pool.rank(accuracy) for accuracy in pool.mean_accuracy_N])
    order = np.argsort(rank_N, kind="stable")
    # Rounding can leave the cumulative sum just below a quantile that it should reach
    # exactly; without the 1e-12, the result would then be the next rank.
    position_Q = np.searchsorted(np.cumsum(probability_N[order]), np.array(QUANTILES) - 1e-12)
    ranks = rank_N[order][np.minimum(position_Q, len(order) - 1)].tolist()
    return RandomSearch(
        trainings=trainings,
        rank=float(probability_N @ rank_N),
        accuracy=float(probability_N @ pool.mean_accuracy_N),
        ranks=tuple(ranks),
    )


def _beats_random(
    config: StudyConfig, pool: ComparisonPool, outcomes: Sequence[SearchOutcome], trainings: int
) -> IntervalEstimate:
    """The probability of beating random search. The result of random search is exact, so
    the bootstrap resamples only the method's seeds.
    """
    probability_N = chosen_by_random(pool, trainings)
    wins_MN = metrics.wins(_accuracies(outcomes), pool.mean_accuracy_N)
    return _win_estimate(config, (wins_MN @ probability_N)[:, None])


def _accuracies(outcomes: Sequence[SearchOutcome]) -> np.ndarray:
    return np.array([outcome.accuracy for outcome in outcomes])


def _win_estimate(config: StudyConfig, wins: np.ndarray) -> IntervalEstimate:
    """The mean of ``wins`` [M, N] with its bootstrap interval."""
    low, high = metrics.bootstrap_wins(
        wins, np.random.default_rng(0), config.bootstrap, config.confidence
    )
    return IntervalEstimate(value=float(wins.mean()), low=low, high=high)


def _pairwise_result(
    config: StudyConfig, first: MethodResult, second: MethodResult
) -> PairwiseResult:
    first_M = _accuracies(first.found)
    second_N = _accuracies(second.found)
    return PairwiseResult(
        first=first.name,
        second=second.name,
        beats=_win_estimate(config, metrics.wins(first_M, second_N)),
        p_value=metrics.mann_whitney(first_M, second_N),
    )


def report_lines(study: CompareStudy) -> list[str]:
    """The result in words, best method first."""
    n = study.architectures
    report = [
        f"{n} of {study.truth.networks} architectures are in the budget of {study.budget}; the"
        f" best, {study.best}, has {study.best_accuracy:.2%}; a random one"
        f" {study.random.accuracy:.2%} on average"
    ]
    for method in sorted(study.methods, key=_median_rank):
        # None for a method whose searches all failed
        if (
            method.rank is not None
            and method.accuracy is not None
            and method.equal is not None
            and method.cost is not None
        ):
            ranks = ", ".join(str(outcome.rank) for outcome in method.found)
            plural = "s" if method.equal.trainings > 1 else ""
            report.append(
                f"{method.name}: median true rank {method.rank:g} of {n} (by seed: {ranks}),"
                f" {method.accuracy:.2%}; beats a random architecture"
                f" {_chance(method.p_better_than_one, study.confidence)}, and random search by"
                f" {method.equal.trainings} training run{plural}"
                f" (its cost: {method.cost:.3g}) {_chance(method.p_better_than_random)}"
            )
        for seed, reason in method.failed.items():
            report.append(f"{method.name} has no result for seed {seed}: {reason}")
    for pair in study.pairwise:
        report.append(
            f"{pair.first} beats {pair.second} {_chance(pair.beats)}, p = {pair.p_value:.3g}"
        )
    return report


def _median_rank(method: MethodResult) -> float:
    """The sort key of a method: its median rank; methods without a result come last."""
    if method.rank is None:
        return math.inf
    return method.rank


def _chance(estimate: IntervalEstimate, confidence: float | None = None) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "with unknown probability"
    prefix = "" if confidence is None else f"{confidence:.0%}: "
    return (
        f"with probability {estimate.value:.2f} ({prefix}{estimate.low:.2f} to {estimate.high:.2f})"
    )
