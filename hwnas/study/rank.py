"""``hwnas study rank``: score architectures of known accuracy by super-nets, and measure
how far the two rankings agree.

The scores are kept in one file for each combination of super-net, images and settings,
outside of the folder of the stage. A killed study therefore resumes, and a study with
more architectures or scores computes only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hwnas import __version__
from hwnas.config import Experiment, ScoreName, StudyConfig
from hwnas.config.decisive import decisive
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.core.statistics import spearman
from hwnas.data.fingerprint import fingerprint
from hwnas.document import content_sha256, file_sha256
from hwnas.engine import best_device
from hwnas.errors import ConfigError, HwnasError
from hwnas.nn.supernet import load_supernet
from hwnas.runs import JsonLines, StageContext, is_number
from hwnas.search.angle import initial_supernet
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.study import metrics
from hwnas.study.documents import (
    METRICS,
    Gap,
    IntervalEstimate,
    MeanStd,
    Point,
    RankStudy,
    ScoreResult,
    SupernetResult,
)
from hwnas.study.scores import LOWER_IS_BETTER, Scorer
from hwnas.study.supernets import TrainedSupernet, base_epochs
from hwnas.study.truth import Truth, configured_truth

RESULT = "study.json"

Rows = dict[str, dict[str, float]]
"""Architecture -> score name -> value."""


def load_truth(experiment: Experiment, space: SearchSpace) -> Truth:
    """The ground truth of an experiment. Raises ConfigError if it is missing or has too
    few architectures, or TableError with the line of an error in it.
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
    supernets: Sequence[TrainedSupernet],
    failed_trainings: Mapping[str, str],
) -> None:
    """Score the architectures by every super-net and write ``study.json``.

    ``failed_trainings`` maps each seed without a super-net to the reason. Raises
    HwnasError if there is no super-net at all.
    """
    experiment = ctx.experiment
    config = experiment.study
    if not supernets:
        raise HwnasError(
            "no super-net was trained, so there is nothing to study:"
            f" {'; '.join(failed_trainings.values())}"
        )
    chosen = truth.sample(config.architectures)
    results = []
    tables = []
    for trained in supernets:
        scores, failed = _scores(ctx, space, truth, chosen, trained)
        tables.append(scores)
        results.append(_supernet_result(truth, trained, scores, failed))
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
        scores=_score_results(config, truth, tables, ctx),
        points=_points(truth, chosen, tables),
    )
    study.save(ctx.folder / RESULT)
    for line in lines(study):
        ctx.progress.info(line)


def _scores(
    ctx: StageContext,
    space: SearchSpace,
    truth: Truth,
    chosen: np.ndarray,
    trained: TrainedSupernet,
) -> tuple[Rows, dict[str, str]]:
    """The scores of the ``chosen`` architectures by a super-net, and the reasons why some
    have none. Scores that the file of the super-net already holds are not recomputed.
    """
    experiment = _at_resolution(ctx.experiment, space)
    names = experiment.study.scores
    file = JsonLines(ctx.root / "scores" / f"{_scores_sha256(experiment, trained)[:16]}.jsonl")
    known: Rows = {}
    for row in file.read():
        architecture, scores = row.get("architecture"), row.get("scores")
        if isinstance(architecture, str) and isinstance(scores, dict):
            finite = {name: score for name, score in scores.items() if is_number(score)}
            known.setdefault(architecture, {}).update(finite)

    def missing_scores(architecture: str) -> list[ScoreName]:
        return [name for name in names if name not in known.get(architecture, {})]

    wanted = [int(i) for i in chosen]
    pending = [i for i in wanted if missing_scores(truth.names[i])]
    # Neighbours in this order share their first blocks, which then run only once
    # (study/prefixes.py).
    pending.sort(key=lambda i: _blocks(space, truth.picks[i]))
    scorer: Scorer | None = None
    failed: dict[str, str] = {}
    title = f"scoring architectures (seed {trained.seed})"
    with (
        ctx.progress.task(title, len(wanted), len(wanted) - len(pending)) as task,
        file.appending() as append,
    ):
        for i in pending:
            # Loaded only if a score is missing: that takes seconds.
            scorer = scorer or _scorer(experiment, space, trained)
            name = truth.names[i]
            try:
                scores = scorer.score(truth.picks[i], missing_scores(name))
            except ArithmeticError as error:
                failed[name] = str(error).partition("\n")[0]
                ctx.progress.warning(f"architecture {name} has no score: {failed[name]}")
            else:
                append({"architecture": name, "scores": scores})
                known.setdefault(name, {}).update(scores)
            note = "  ".join(f"{key} {value:.4g}" for key, value in known.get(name, {}).items())
            task.advance(note=note)

    rows: Rows = {}
    for i in wanted:
        name = truth.names[i]
        if name not in failed:
            rows[name] = {str(score): known[name][score] for score in names}
    return rows, failed


def _scores_sha256(experiment: Experiment, trained: TrainedSupernet) -> str:
    """The hash of everything that the scores of an architecture depend on."""
    search = experiment.search
    inputs = {
        "hwnas": __version__,
        "supernet": file_sha256(trained.path),
        "seed": trained.seed,
        "images": fingerprint(experiment.data, "train"),
        "data": decisive(experiment, "data"),
        "recalibration": search.recalibration_images,
        "evaluation": search.evaluation_images,
        "batch": search.batch_size,
    }
    if trained.base is not None:
        inputs["base"] = file_sha256(trained.base)
    return content_sha256(inputs)


def _at_resolution(experiment: Experiment, space: SearchSpace) -> Experiment:
    return experiment.model_copy(update={"data": experiment.data.at(space.resolution)})


def _blocks(space: SearchSpace, picks: Picks) -> tuple[tuple[int, int], list[str]]:
    """The resolution and the keys of the blocks of an architecture: a sort key."""
    arch = space.decode(picks)
    return arch.size_HW, [op.key for op in arch.ops()]


def _scorer(experiment: Experiment, space: SearchSpace, trained: TrainedSupernet) -> Scorer:
    supernet = load_supernet(trained.path, space)
    if not experiment.search.recalibration_images and not supernet.config.bn_track:
        raise ConfigError(
            f"the super-net in {trained.path.parent} tracks no BN statistics: set"
            " search.recalibration_images to 2 or more."
        )
    evaluator = SupernetEvaluator(supernet.to(best_device()), experiment)
    base = None
    if trained.base is not None:
        base = load_supernet(trained.base, space).to(best_device())
    return Scorer(evaluator, supernet, initial_supernet(supernet, trained.seed), base)


def _supernet_result(
    truth: Truth, trained: TrainedSupernet, rows: Rows, failed: dict[str, str]
) -> SupernetResult:
    gap = None
    if rows and all("accuracy" in row for row in rows.values()):
        accuracies = dict(zip(truth.names, truth.mean, strict=True))
        gap = Gap(
            supernet=float(np.mean([row["accuracy"] for row in rows.values()])),
            standalone=float(np.mean([accuracies[name] for name in rows])),
        )
    return SupernetResult(
        seed=trained.seed,
        strategy=trained.strategy,
        sha256=file_sha256(trained.path),
        scored=len(rows),
        failed=failed,
        gap=gap,
    )


def _score_results(
    config: StudyConfig, truth: Truth, tables: Sequence[Rows], ctx: StageContext
) -> tuple[ScoreResult, ...]:
    """The metrics of every score and combination of scores, for each super-net and over
    all.
    """
    accuracies = dict(zip(truth.names, truth.mean, strict=True))
    combinations: list[tuple[ScoreName, ...]] = [(name,) for name in config.scores]
    combinations += config.combinations
    results = []
    with ctx.progress.task("bootstrap intervals", len(combinations) * len(tables)) as task:
        for names in combinations:
            per_supernet = []
            for rows in tables:
                truth_N = np.array([accuracies[name] for name in rows])
                columns = [_column(rows, name) for name in names]
                score_N = columns[0] if len(columns) == 1 else metrics.rank_sum(columns)
                macs_N = _column(rows, "macs") if "macs" in config.scores else None
                per_supernet.append(estimates(config, score_N, truth_N, macs_N))
                task.advance()
            over_supernets = {}
            for metric in METRICS:
                values = [result[metric].value for result in per_supernet]
                over_supernets[metric] = _mean_and_std(values)
            results.append(
                ScoreResult(
                    name="+".join(names),
                    supernets=tuple(per_supernet),
                    over_supernets=over_supernets,
                )
            )
    return tuple(results)


def _column(rows: Rows, name: ScoreName) -> np.ndarray:
    """A score of all architectures, higher is better: float [N]."""
    column_N = np.array([row[name] for row in rows.values()])
    if name in LOWER_IS_BETTER:
        return -column_N
    return column_N


def estimates(
    config: StudyConfig, score_N: np.ndarray, truth_N: np.ndarray, macs_N: np.ndarray | None = None
) -> dict[str, IntervalEstimate]:
    """Every metric of a score [N] (higher is better) with its interval.

    Without ``macs_N`` [N] there is no baseline, and ``over_macs`` is undefined.
    """
    k = min(config.top_k, len(truth_N))
    functions: dict[str, metrics.RankMetric] = {
        "kendall": metrics.kendall,
        "over_macs": _kendall_difference,
        "sparse_kendall": lambda score, truth: metrics.sparse_kendall(
            score, truth, config.threshold
        ),
        "kendall_top": metrics.kendall_top,
        "spearman": spearman,
        "regret": lambda score, truth: metrics.regret(score, truth, k),
        "precision": lambda score, truth: metrics.precision(score, truth, k),
        "random_reaches": lambda score, truth: metrics.random_reaches(score, truth, k),
    }
    results = {}
    for name in METRICS:
        scores = score_N
        defined = len(truth_N) > 0
        if name == "over_macs":
            # Score and MACs as two columns, so that a resample draws both alike.
            if macs_N is None:
                defined = False
            else:
                scores = np.stack([score_N, macs_N], axis=1)
        value = functions[name](scores, truth_N) if defined else math.nan
        if not math.isfinite(value):
            results[name] = IntervalEstimate(value=None)
            continue
        # The same seed every time: all scores and metrics see the same resamples.
        rng = np.random.default_rng(0)
        interval = metrics.bootstrap(
            functions[name], scores, truth_N, rng, config.bootstrap, config.confidence
        )
        low, high = interval or (None, None)
        results[name] = IntervalEstimate(value=value, low=low, high=high)
    return results


def _kendall_difference(scores_N2: np.ndarray, truth_N: np.ndarray) -> float:
    """Tau of the first column of scores minus tau of the second."""
    return metrics.kendall(scores_N2[:, 0], truth_N) - metrics.kendall(scores_N2[:, 1], truth_N)


def _mean_and_std(values: Sequence[float | None]) -> MeanStd:
    defined = [value for value in values if value is not None]
    if not defined:
        return MeanStd(mean=None)
    std = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return MeanStd(mean=float(np.mean(defined)), std=std)


def _points(truth: Truth, chosen: np.ndarray, tables: Sequence[Rows]) -> tuple[Point, ...]:
    """The architectures that at least one super-net scored."""
    points = []
    for i in chosen:
        name = truth.names[i]
        rows = [table[name] for table in tables if name in table]
        if rows:
            means = {}
            for score in rows[0]:
                means[score] = float(np.mean([row[score] for row in rows]))
            points.append(Point(name=name, truth=float(truth.mean[i]), scores=means))
    return tuple(points)


def lines(study: RankStudy) -> list[str]:
    """The result in words."""
    report = []
    if study.truth.kendall is not None:
        top = ""
        if study.truth.kendall_top is not None:
            top = f", {study.truth.kendall_top:.3f} in the best tenth"
        report.append(
            f"tau between repeated training runs of the {study.truth.networks} networks:"
            f" {study.truth.kendall:.3f}{top}"
        )
    for result in study.scores:
        report.append(_score_line(result, study.confidence))
    for supernet in study.supernets:
        if supernet.gap is not None:
            gap = supernet.gap
            report.append(
                f"seed {supernet.seed}: accuracy {gap.supernet:.1%} by the super-net,"
                f" {gap.standalone:.1%} standalone, a gap of {gap.difference:.1%}"
            )
        if supernet.failed:
            report.append(
                f"seed {supernet.seed}: {len(supernet.failed)} architectures have no score;"
                " study.json has the reasons"
            )
    for seed, reason in study.failed_trainings.items():
        report.append(f"seed {seed} has no super-net: {reason}")
    return report


def _score_line(result: ScoreResult, confidence: float) -> str:
    """Tau of a score by the first super-net that defines it, and over all super-nets."""
    tau = _first_defined(result, "kendall")
    value = "undefined" if tau.value is None else f"{tau.value:.3f}"
    interval = ""
    if tau.low is not None:
        interval = f" ({confidence:.0%}: {tau.low:.3f} to {tau.high:.3f})"
    gain = _first_defined(result, "over_macs")
    over_macs = ""
    if gain.low is not None and result.name != "macs":
        over_macs = f", over MACs {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    all_nets = result.over_supernets["kendall"]
    over_all = ""
    if all_nets.std is not None:
        over_all = (
            f"; over {len(result.supernets)} super-nets {all_nets.mean:.3f} ± {all_nets.std:.3f}"
        )
    return f"{result.name}: tau {value}{interval}{over_macs}{over_all}"


def _first_defined(result: ScoreResult, metric: str) -> IntervalEstimate:
    for by_metric in result.supernets:
        if by_metric[metric].value is not None:
            return by_metric[metric]
    return IntervalEstimate(value=None)
