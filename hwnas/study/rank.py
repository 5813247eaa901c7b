"""``hwnas study rank``: architectures of known accuracy, scored by super-nets; how far
the two orders agree.

The scores of every architecture are kept in a file of their super-net, images and
settings, outside of the stage's folder: a study that was killed goes on, and one of
more architectures or scores computes what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hwnas import __version__
from hwnas.config import Experiment, ScoreName, StudyConfig
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.core.statistics import spearman
from hwnas.data import fingerprint
from hwnas.document import content_sha256, file_sha256
from hwnas.engine import best_device
from hwnas.errors import ConfigError, HwnasError
from hwnas.nn.supernet import load_supernet
from hwnas.runs import JsonLines, StageContext
from hwnas.search.angle import initial_supernet
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.study import metrics
from hwnas.study.documents import (
    METRICS,
    Estimate,
    Gap,
    Point,
    RankStudy,
    ScoreResult,
    Spread,
    SupernetResult,
)
from hwnas.study.scores import LOWER_IS_BETTER, Scorer
from hwnas.study.supernets import Trained, base_epochs
from hwnas.study.truth import Truth, configured_truth

RESULT = "study.json"

Rows = dict[str, dict[str, float]]
"""Architecture -> its scores by name."""


def load_truth(experiment: Experiment, space: SearchSpace) -> Truth:
    """The ground truth of an experiment, checked to be enough. Raises ConfigError, or
    TableError naming the line.
    """
    config = experiment.study
    truth = configured_truth(config, space)
    if len(truth.names) < config.architectures:
        raise ConfigError(
            f"study.architectures = {config.architectures}, but {config.truth} has"
            f" {len(truth.names)}: lower it."
        )
    return truth


def run(
    ctx: StageContext,
    space: SearchSpace,
    truth: Truth,
    supernets: Sequence[Trained],
    failed_trainings: Mapping[str, str],
) -> None:
    """Score the architectures by every super-net, and write ``study.json``."""
    experiment = ctx.experiment.model_copy(
        update={"data": ctx.experiment.data.at(space.resolution)}
    )
    config = experiment.study
    if not supernets:
        raise HwnasError(
            "no super-net was trained, so there is nothing to study:"
            f" {'; '.join(failed_trainings.values())}"
        )
    chosen = truth.sample(config.architectures)
    results, tables = [], []
    for trained in supernets:
        scored, failed = _scored(ctx, experiment, space, truth, chosen, trained)
        tables.append(scored)
        results.append(_supernet(truth, trained, scored, failed))
    study = RankStudy(
        space=space.name,
        space_sha256=space.sha256,
        truth=truth.info(str(config.truth)),
        architectures=len(chosen),
        threshold=config.threshold,
        top_k=config.top_k,
        bootstrap=config.bootstrap,
        confidence=config.confidence,
        base_epochs=base_epochs(experiment),
        recalibration_images=experiment.search.recalibration_images,
        evaluation_images=experiment.search.evaluation_images,
        supernets=tuple(results),
        failed_trainings=dict(failed_trainings),
        scores=_results(config, truth, tables, ctx),
        points=_points(truth, chosen, tables),
    )
    study.save(ctx.folder / RESULT)
    for line in lines(study):
        ctx.progress.info(line)


def _scored(
    ctx: StageContext,
    experiment: Experiment,
    space: SearchSpace,
    truth: Truth,
    chosen: np.ndarray,
    trained: Trained,
) -> tuple[Rows, dict[str, str]]:
    """Scores by a super-net, and why some architectures have none. What a file already
    holds is not computed again.
    """
    names, search = experiment.study.scores, experiment.search
    decides = {
        "hwnas": __version__,
        "supernet": file_sha256(trained.path),
        "seed": trained.seed,
        "images": fingerprint(experiment.data),
        "data": experiment.data.model_dump(mode="json"),
        "recalibration": search.recalibration_images,
        "evaluation": search.evaluation_images,
        "batch": search.batch_size,
    } | ({} if trained.base is None else {"base": file_sha256(trained.base)})
    file = JsonLines(ctx.root / "scores" / f"{content_sha256(decides)[:16]}.jsonl")
    known: Rows = {}
    for row in file.read():
        known.setdefault(row["architecture"], {}).update(row["scores"])
    scorer: Scorer | None = None
    failed: dict[str, str] = {}
    wanted = [int(i) for i in chosen]
    left = [i for i in wanted if any(name not in known.get(truth.names[i], {}) for name in names)]
    # neighbours have their first blocks in common (study/prefixes.py)
    left.sort(key=lambda i: _blocks(space, truth.picks[i]))
    title = f"scoring architectures (seed {trained.seed})"
    with (
        ctx.progress.task(title, len(wanted), len(wanted) - len(left)) as task,
        file.appending() as append,
    ):
        for i in left:
            scorer = scorer or _scorer(experiment, space, trained)
            name, missing = (
                truth.names[i],
                [each for each in names if each not in known.get(truth.names[i], {})],
            )
            try:
                found = scorer.score(truth.picks[i], missing)
            except ArithmeticError as error:
                failed[name] = str(error).partition("\n")[0]
                ctx.progress.warning(f"architecture {name} has no score: {failed[name]}")
            else:
                append({"architecture": name, "scores": found})
                known.setdefault(name, {}).update(found)
            task.advance(
                note="  ".join(f"{key} {value:.4g}" for key, value in known.get(name, {}).items())
            )
    rows: Rows = {
        truth.names[i]: {str(each): known[truth.names[i]][each] for each in names}
        for i in wanted
        if truth.names[i] not in failed
    }
    return rows, failed


def _blocks(space: SearchSpace, picks: Picks) -> tuple[int, list[str]]:
    """Resolution and blocks of an architecture."""
    arch = space.decode(picks)
    return arch.resolution, [op.key for op in arch.ops()]


def _scorer(experiment: Experiment, space: SearchSpace, trained: Trained) -> Scorer:
    supernet = load_supernet(trained.path, space)
    if not experiment.search.recalibration_images and not supernet.config.bn_track:
        raise ConfigError(
            f"the super-net in {trained.path.parent} tracks no BN statistics: set"
            " search.recalibration_images to 2 or more."
        )
    evaluator = SupernetEvaluator(supernet.to(best_device()), experiment)
    base = None if trained.base is None else load_supernet(trained.base, space).to(best_device())
    return Scorer(evaluator, supernet, initial_supernet(supernet, trained.seed), base)


def _supernet(
    truth: Truth, trained: Trained, scored: Rows, failed: dict[str, str]
) -> SupernetResult:
    gap = None
    if scored and all("accuracy" in row for row in scored.values()):
        alone = dict(zip(truth.names, truth.mean, strict=True))
        gap = Gap(
            supernet=float(np.mean([row["accuracy"] for row in scored.values()])),
            alone=float(np.mean([alone[name] for name in scored])),
        )
    return SupernetResult(
        seed=trained.seed,
        strategy=trained.strategy,
        sha256=file_sha256(trained.path),
        scored=len(scored),
        failed=failed,
        gap=gap,
    )


def _results(
    config: StudyConfig, truth: Truth, tables: Sequence[Rows], ctx: StageContext
) -> tuple[ScoreResult, ...]:
    """Metrics of every score and combination, by super-net and over all."""
    alone = dict(zip(truth.names, truth.mean, strict=True))
    parts: list[tuple[ScoreName, ...]] = [
        *((name,) for name in config.scores),
        *config.combinations,
    ]
    results = []
    with ctx.progress.task("bootstrap intervals", len(parts) * len(tables)) as task:
        for names in parts:
            per_supernet = []
            for rows in tables:
                truth_N = np.array([alone[name] for name in rows])
                columns = [
                    np.array([row[name] for row in rows.values()])
                    * (-1 if name in LOWER_IS_BETTER else 1)
                    for name in names
                ]
                score_N = columns[0] if len(columns) == 1 else metrics.rank_sum(columns)
                macs_N = (
                    np.array([row["macs"] for row in rows.values()])
                    if "macs" in config.scores
                    else None
                )
                per_supernet.append(estimates(config, score_N, truth_N, macs_N))
                task.advance()
            spread = {
                metric: _spread([each[metric].value for each in per_supernet]) for metric in METRICS
            }
            results.append(
                ScoreResult(name="+".join(names), supernets=tuple(per_supernet), spread=spread)
            )
    return tuple(results)


def estimates(
    config: StudyConfig, score_N: np.ndarray, truth_N: np.ndarray, macs_N: np.ndarray | None = None
) -> dict[str, Estimate]:
    """Every metric of a score (higher is better) with its interval; the same resamples
    for every score.

    Without ``macs_N`` there is nothing to be better than, and ``over_macs`` has no value.
    """
    k = min(config.top_k, len(truth_N))
    functions: dict[str, metrics.RankMetric] = {
        "kendall": metrics.kendall,
        "over_macs": lambda both, truth: (
            metrics.kendall(both[:, 0], truth) - metrics.kendall(both[:, 1], truth)
        ),
        "sparse_kendall": lambda score, truth: metrics.sparse_kendall(
            score, truth, config.threshold
        ),
        "kendall_top": metrics.kendall_top,
        "spearman": spearman,
        "regret": lambda score, truth: metrics.regret(score, truth, k),
        "precision": lambda score, truth: metrics.precision(score, truth, k),
        "random_reaches": lambda score, truth: metrics.random_reaches(score, truth, k),
    }
    found = {}
    for name in METRICS:
        paired = name == "over_macs"
        scores = np.stack([score_N, macs_N], axis=1) if paired and macs_N is not None else score_N
        defined = len(truth_N) and not (paired and macs_N is None)
        value = functions[name](scores, truth_N) if defined else float("nan")
        if not math.isfinite(value):
            found[name] = Estimate(value=None)
            continue
        rng = np.random.default_rng(0)
        interval = metrics.bootstrap(
            functions[name], scores, truth_N, rng, config.bootstrap, config.confidence
        )
        low, high = interval or (None, None)
        found[name] = Estimate(value=value, low=low, high=high)
    return found


def _spread(values: Sequence[float | None]) -> Spread:
    defined = [value for value in values if value is not None]
    std = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return Spread(mean=float(np.mean(defined)) if defined else None, std=std)


def _points(truth: Truth, chosen: np.ndarray, tables: Sequence[Rows]) -> tuple[Point, ...]:
    points = []
    for i in chosen:
        rows = [table[truth.names[i]] for table in tables if truth.names[i] in table]
        if rows:
            means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            points.append(Point(name=truth.names[i], truth=float(truth.mean[i]), scores=means))
    return tuple(points)


def lines(study: RankStudy) -> list[str]:
    """The result in words."""
    found = []
    if study.truth.kendall is not None:
        top = (
            ""
            if study.truth.kendall_top is None
            else f", {study.truth.kendall_top:.3f} in the best tenth"
        )
        found.append(
            f"tau between repeated trainings of the {study.truth.networks} networks:"
            f" {study.truth.kendall:.3f}{top}"
        )
    for result in study.scores:
        spread = result.spread["kendall"]
        first = next(
            (each["kendall"] for each in result.supernets if each["kendall"].value is not None),
            Estimate(value=None),
        )
        interval = (
            ""
            if first.low is None
            else f" ({study.confidence:.0%}: {first.low:.3f} to {first.high:.3f})"
        )
        over = (
            ""
            if spread.std is None
            else f"; over {len(result.supernets)} super-nets {spread.mean:.3f} ± {spread.std:.3f}"
        )
        value = "undefined" if first.value is None else f"{first.value:.3f}"
        better = next(
            (each["over_macs"] for each in result.supernets if each["over_macs"].value is not None),
            Estimate(value=None),
        )
        than_macs = (
            ""
            if better.low is None or result.name == "macs"
            else f", over MACs {better.value:+.3f} ({better.low:+.3f} to {better.high:+.3f})"
        )
        found.append(f"{result.name}: tau {value}{interval}{than_macs}{over}")
    for supernet in study.supernets:
        if supernet.gap is not None:
            gap = supernet.gap
            found.append(
                f"seed {supernet.seed}: accuracy {gap.supernet:.1%} by the super-net,"
                f" {gap.alone:.1%} alone, a gap of {gap.difference:.1%}"
            )
        if supernet.failed:
            found.append(
                f"seed {supernet.seed}: {len(supernet.failed)} architectures have no score;"
                " study.json says why"
            )
    return found + [
        f"seed {seed} has no super-net: {why}" for seed, why in study.failed_trainings.items()
    ]
