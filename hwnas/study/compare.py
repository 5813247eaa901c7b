"""``hwnas study compare``: search methods against random search, and against each
other, where the true accuracies are known.

Every method searches with every seed under one budget, each search as ``hwnas search``
would run it. The architecture that it puts first is looked up in a file of accuracies
of architectures trained alone (study/truth.py), and gets its true rank among all of
that file that meet the budget.

**The budget** is the search's: within ``search.tolerance`` of the target, and within
``search.limits``. Without ``search.table`` it is one of MACs: with B =
``study.compare.max_macs`` the target is B / (1 + tolerance), so that nothing above B is
proposed, and nothing below B (1 - tolerance) / (1 + tolerance): architectures far below
a budget are bad in the mean, and random search among them would be beaten too easily.

**The cost** of a search is counted in multiply-accumulates (search/cost_counter.py): training
the super-net, evaluating architectures, and the last ranking. The unit is a stand-alone
training: ``standalone_epochs`` x ``standalone_images`` images, forward and backward (3
MACs for each MAC), through the mean architecture in the budget. CPU seconds are
measured beside it, and decide nothing.

**Random search** comes in three kinds:

1. one random architecture in the budget (k = 1): of rank r of n or better with probability r / n;
2. k random architectures, each trained alone, the best taken, at the method's cost: k =
   cost / stand-alone training, rounded up, so at least one, in favour of random search.
   It takes the best by one training (each repeat of the file in turn) and is then
   evaluated by the mean of all, as everybody is. Exact: with a single repeat, rank r or
   better has probability 1 - (1 - r / n)^k;
3. random architectures ranked by a super-net at equal cost: the strategy ``random``, a
   method like any other.

**Probabilities** that one beats another are over pairs of seeds, ties a half, by true
accuracy; the intervals are percentiles of a bootstrap over seeds, and p-values are
exact (study/metrics.py). With five seeds against five the smallest p-value is 0.008,
and an interval over five seeds is narrower than it ought to be. Many pairs are
compared, and no p-value is corrected for that.
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

from hwnas.config import Experiment, MethodConfig, StudyConfig
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.document import explain, merged, write_atomic
from hwnas.errors import ConfigError, HwnasError
from hwnas.runs import StageContext
from hwnas.search import stage as search_stage
from hwnas.search.cost_counter import GRADIENT
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.result import SearchResult
from hwnas.search.stage import search_context, search_finder
from hwnas.search.strategy import SearchContext
from hwnas.study import metrics
from hwnas.study.documents import (
    CompareStudy,
    Estimate,
    MethodResult,
    PairwiseResult,
    RandomSearch,
    SearchOutcome,
)
from hwnas.study.truth import Truth, configured_truth
from hwnas.task import task_of

RESULT = "compare.json"
SEARCHED = ("arch.json", "search.json", "seconds.json")
"""What a search of a study leaves. The weights go: what is compared are architectures."""

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the rank that random search finds."""

PROBED = 256
"""Random architectures in the budget that must be in the truth before anything is trained."""


@dataclass(frozen=True)
class ComparisonPool:
    """Where methods meet: the architectures of the truth in the budget, with their
    accuracies, float [n] and [n, repeats].
    """

    search: SearchContext
    table: LatencyTable | None
    truth: Truth
    names: tuple[str, ...]
    mean_N: np.ndarray
    accuracy_NR: np.ndarray
    macs_N: np.ndarray

    def rank(self, accuracy: float) -> int:
        """How many are at least as good."""
        return int((self.mean_N >= accuracy).sum())

    @cached_property
    def _known(self) -> dict[bytes, int]:
        picks = dict(zip(self.truth.names, self.truth.picks, strict=True))
        return {_identity(self.search, picks[name]): i for i, name in enumerate(self.names)}

    def position(self, picks: Picks) -> int | None:
        """Where an architecture is; None where the truth lacks it, or it is not in the budget."""
        return self._known.get(_identity(self.search, picks))


def _identity(search: SearchContext, picks: Picks) -> bytes:
    return search.space.canonical(search.space.index(picks)).tobytes()


def methods_of(experiment: Experiment) -> tuple[MethodConfig, ...]:
    """The methods to compare. Raises ConfigError where the configuration leaves open
    what to compare, and by what.
    """
    config = experiment.study
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} has no study: the accuracies that are known are those of"
            " classifiers."
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
    if experiment.search.weights is not None or experiment.search.backbone is not None:
        raise ConfigError(
            "search.weights and search.backbone give a search a start, and a comparison begins from"
            " nothing: remove them."
        )
    has_costs = experiment.search.table is not None or not experiment.search.by_table
    if not has_costs and config.compare.max_macs is None:
        raise ConfigError(
            "study.compare.max_macs is not set: give the budget in multiply-accumulates, or"
            " search.table and its target, or search.budget."
        )
    if experiment.search.table is not None and config.compare.max_macs is not None:
        raise ConfigError(
            "study.compare.max_macs is the budget without search.table: remove it, or limit MACs by"
            " search.limits."
        )
    return config.compare.methods


def searching(experiment: Experiment, method: MethodConfig, seed: int) -> Experiment:
    """The experiment of a method's search with a seed. Raises ConfigError where the
    method's own keys do not fit.
    """
    search = experiment.search.model_dump(mode="json", by_alias=True)
    search = merged(search, method.search, replace=("finder", "optimizer"))
    search |= {"strategy": method.strategy.model_dump(mode="json"), "random_samples": 0}
    most = experiment.study.compare.max_macs
    if most is not None:
        target = most / (1 + experiment.search.tolerance)
        search |= {
            "budget": {"kind": "macs", "max_macs": target},
            "target_ms": None,
            "target_range": None,
        }
    content = experiment.model_dump(mode="json", by_alias=True) | {"search": search, "seed": seed}
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"study.compare.methods, {method.name!r}: {explain(error, Experiment)}"
        ) from error


def arena(experiment: Experiment, space: SearchSpace) -> ComparisonPool:
    """The budget and what the truth has in it, checked, and every method's settings
    with it, before anything is trained.

    Raises ConfigError, TargetError or TableError in one sentence.
    """
    methods = methods_of(experiment)
    truth = configured_truth(experiment.study, space)
    table = (
        None
        if experiment.search.table is None
        else LatencyTable.load(Path(experiment.search.table).expanduser())
    )
    index_NC = np.array([space.index(picks) for picks in truth.picks])
    macs_N = np.array([space.decode(picks).macs for picks in truth.picks])
    contexts = []
    most, least = (
        experiment.study.compare.max_macs or 0,
        (experiment.study.compare.max_macs or 0) * _least(experiment),
    )
    if most and not ((macs_N <= most) & (macs_N >= least)).any():
        raise ConfigError(
            f"study.compare.max_macs = {most}: no architecture of {experiment.study.truth} has"
            f" {least:.0f} to {most} MACs; they have {macs_N.min()} to {macs_N.max()}: choose"
            " another, or raise search.tolerance."
        )
    for method in methods:
        each = searching(experiment, method, experiment.study.seeds[0])
        contexts.append(search_context(each, space, table))
        search_finder(each.search)
    search = contexts[0]
    inside_N = is_feasible(search, index_NC)
    if not inside_N.any():
        raise ConfigError(
            f"no architecture of {experiment.study.truth} is within {_budget(experiment, search)}:"
            " change the budget."
        )
    kept = np.flatnonzero(inside_N)
    found = ComparisonPool(
        search,
        table,
        truth,
        tuple(truth.names[i] for i in kept),
        truth.mean[kept],
        truth.accuracy_NR[kept],
        macs_N[kept].astype(float),
    )
    for picks in sample_feasible(search, PROBED, np.random.default_rng(0)):
        _position(experiment.study, found, picks, "a random search")
    return found


def _least(experiment: Experiment) -> float:
    return (1 - experiment.search.tolerance) / (1 + experiment.search.tolerance)


def _budget(experiment: Experiment, search: SearchContext) -> str:
    """The budget in words."""
    most = experiment.study.compare.max_macs
    limits = (
        "".join(f", {each.title} <= {each.most:g}" for each in search.limits.compiled)
        if search.limits is not None
        else ""
    )
    if most is None:
        return f"{100 * search.tolerance:.3g} % of {search.cost_model.unit.shown(search.target)}{limits}"
    return f"{most * _least(experiment) / 1e6:.4g} to {most / 1e6:.4g} M MACs{limits}"


def _position(config: StudyConfig, found: ComparisonPool, picks: Picks, who: str) -> int:
    position = found.position(picks)
    if position is None:
        named = json.dumps(picks)
        raise ConfigError(
            f"study.truth = {config.truth!r} has no accuracy of {named}, which {who} proposes: a"
            " comparison needs every architecture in the budget; complete the file, or choose"
            " another budget."
        )
    return position


def search(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """A search of the study, in its folder: ``SEARCHED`` remains."""
    started = time.process_time()
    # it was killed while weights were removed
    found = all((ctx.folder / name).exists() for name in ("arch.json", "search.json"))
    interrupted = found or any(ctx.folder.glob("*.pt"))
    if not found:
        search_stage.run(ctx, space, table)
    seconds = None if interrupted else round(time.process_time() - started, 1)
    write_atomic(ctx.folder / "seconds.json", json.dumps({"cpu_seconds": seconds}).encode())
    for name in search_stage.outputs(ctx.experiment.search):
        if name not in SEARCHED:
            (ctx.folder / name).unlink(missing_ok=True)


Searches = Mapping[tuple[str, int], Path]
"""(method, seed) -> the folder of a search that is done."""


def run(
    ctx: StageContext,
    space: SearchSpace,
    found: ComparisonPool,
    searches: Searches,
    failed: Mapping[tuple[str, int], str],
) -> None:
    """Look up what the searches found, and write ``compare.json``."""
    config = ctx.experiment.study
    if not searches:
        raise HwnasError(
            "every search failed, so there is nothing to compare:"
            f" {'; '.join(dict.fromkeys(failed.values()))}"
        )
    standalone = (
        config.compare.standalone_epochs
        * config.compare.standalone_images
        * GRADIENT
        * float(found.macs_N.mean())
    )
    results = []
    for method in config.compare.methods:
        rows = [
            _found(config, found, method.name, seed, searches[method.name, seed])
            for seed in config.seeds
            if (method.name, seed) in searches
        ]
        why = {
            str(seed): failed[method.name, seed]
            for seed in config.seeds
            if (method.name, seed) in failed
        }
        results.append(_method(config, found, method, rows, why, standalone))
    best = int(found.mean_N.argmax())
    study = CompareStudy(
        space=space.name,
        space_sha256=space.sha256,
        truth=found.truth.info(str(config.truth)),
        budget=_budget(ctx.experiment, found.search),
        target_ms=found.search.target if found.search.cost_model.unit.name == "ms" else None,
        tolerance=found.search.tolerance,
        architectures=len(found.names),
        best=found.names[best],
        best_accuracy=float(found.mean_N[best]),
        standalone_epochs=config.compare.standalone_epochs,
        standalone_images=config.compare.standalone_images,
        standalone_macs=standalone,
        bootstrap=config.bootstrap,
        confidence=config.confidence,
        seeds=config.seeds,
        methods=tuple(results),
        random=random_search(found, 1),
        pairwise=tuple(
            _pairwise(config, a, b)
            for a, b in combinations([each for each in results if each.found], 2)
        ),
    )
    study.save(ctx.folder / RESULT)
    for line in lines(study):
        ctx.progress.info(line)


def _found(
    config: StudyConfig, found: ComparisonPool, method: str, seed: int, folder: Path
) -> SearchOutcome:
    result = SearchResult.load(folder / "search.json")
    chosen = result.candidates[0]
    position = _position(config, found, chosen.picks, f"{method} (seed {seed})")
    accuracy = float(found.mean_N[position])
    assert result.cost is not None
    return SearchOutcome(
        seed=seed,
        name=found.names[position],
        picks=chosen.picks,
        macs=int(found.macs_N[position]),
        accuracy=accuracy,
        rank=found.rank(accuracy),
        regret=float(found.mean_N.max()) - accuracy,
        supernet_quality=chosen.quality,
        cost=result.cost,
        cpu_seconds=json.loads((folder / "seconds.json").read_text())["cpu_seconds"],
    )


def _method(
    config: StudyConfig,
    found: ComparisonPool,
    method: MethodConfig,
    rows: Sequence[SearchOutcome],
    failed: Mapping[str, str],
    standalone: float,
) -> MethodResult:
    if not rows:
        return MethodResult(
            name=method.name, strategy=method.strategy.name, found=(), failed=dict(failed)
        )
    cost = float(np.mean([row.cost.macs for row in rows])) / standalone
    trainings = max(1, math.ceil(cost))
    return MethodResult(
        name=method.name,
        strategy=method.strategy.name,
        found=tuple(rows),
        failed=dict(failed),
        rank=float(np.median([row.rank for row in rows])),
        accuracy=float(np.median([row.accuracy for row in rows])),
        regret=float(np.median([row.regret for row in rows])),
        cost=cost,
        equal=random_search(found, trainings),
        p_better_than_one=_beats_random(config, found, rows, 1),
        p_better_than_random=_beats_random(config, found, rows, trainings),
    )


def chosen_by_random(found: ComparisonPool, trainings: int) -> np.ndarray:
    """The probability [n] of each architecture to be what random search by so many
    trainings ends with; see the module.
    """
    mean: np.ndarray = np.mean(
        [metrics.best_of_random(choice, trainings) for choice in found.accuracy_NR.T], axis=0
    )
    return mean


def random_search(found: ComparisonPool, trainings: int) -> RandomSearch:
    """Random search exactly."""
    probability_N = chosen_by_random(found, trainings)
    rank_N = np.array([found.rank(accuracy) for accuracy in found.mean_N])
    order = np.argsort(rank_N, kind="stable")
    at_Q = np.searchsorted(np.cumsum(probability_N[order]), np.array(QUANTILES) - 1e-12)
    ranks = rank_N[order][np.minimum(at_Q, len(order) - 1)].tolist()
    return RandomSearch(
        trainings=trainings,
        rank=float(probability_N @ rank_N),
        accuracy=float(probability_N @ found.mean_N),
        ranks=tuple(ranks),
    )


def _beats_random(
    config: StudyConfig, found: ComparisonPool, rows: Sequence[SearchOutcome], trainings: int
) -> Estimate:
    """The probability to beat random search, which is exact, so only the method's seeds
    are drawn anew for the interval.
    """
    probability_N = chosen_by_random(found, trainings)
    won_MN = metrics.wins(np.array([row.accuracy for row in rows]), found.mean_N)
    return _estimate(config, (won_MN @ probability_N)[:, None])


def _estimate(config: StudyConfig, won: np.ndarray) -> Estimate:
    low, high = metrics.bootstrap_wins(
        won, np.random.default_rng(0), config.bootstrap, config.confidence
    )
    return Estimate(value=float(won.mean()), low=low, high=high)


def _pairwise(config: StudyConfig, first: MethodResult, second: MethodResult) -> PairwiseResult:
    a, b = (np.array([row.accuracy for row in each.found]) for each in (first, second))
    return PairwiseResult(
        first=first.name,
        second=second.name,
        beats=_estimate(config, metrics.wins(a, b)),
        p_value=metrics.mann_whitney(a, b),
    )


def lines(study: CompareStudy) -> list[str]:
    """The result in words."""
    n = study.architectures
    found = [
        f"{n} of {study.truth.networks} architectures are in the budget of {study.budget}; the"
        f" best, {study.best}, has {study.best_accuracy:.2%}; a random one"
        f" {study.random.accuracy:.2%} in the mean"
    ]
    for method in sorted(
        study.methods, key=lambda method: math.inf if method.rank is None else method.rank
    ):
        if (
            method.rank is not None
            and method.accuracy is not None
            and method.equal is not None
            and method.cost is not None
        ):
            ranks = ", ".join(str(row.rank) for row in method.found)
            found.append(
                f"{method.name}: median true rank {method.rank:g} of {n} (by seed: {ranks}),"
                f" {method.accuracy:.2%}; beats a random architecture"
                f" {_chance(method.p_better_than_one, study.confidence)}, and random search by"
                f" {method.equal.trainings} training{'s' if method.equal.trainings > 1 else ''}"
                f" (its cost: {method.cost:.3g}) {_chance(method.p_better_than_random)}"
            )
        found += [
            f"{method.name} has no result for seed {seed}: {why}"
            for seed, why in method.failed.items()
        ]
    for pair in study.pairwise:
        found.append(
            f"{pair.first} beats {pair.second} {_chance(pair.beats)}, p = {pair.p_value:.3g}"
        )
    return found


def _chance(estimate: Estimate, confidence: float | None = None) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "with unknown probability"
    title = "" if confidence is None else f"{confidence:.0%}: "
    return (
        f"with probability {estimate.value:.2f} ({title}{estimate.low:.2f} to {estimate.high:.2f})"
    )
