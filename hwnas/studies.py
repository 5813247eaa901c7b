"""The three studies: the trainings that each needs, the inputs of its stages, and when
a stage may be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwnas import __version__
from hwnas.config import Experiment
from hwnas.config.decisive import settings_sha256
from hwnas.core.table import LatencyTable
from hwnas.document import content_sha256, file_sha256
from hwnas.engine import flush_denormals
from hwnas.pipeline import Pipeline
from hwnas.runs import StageContext, locked, prepare, set_aside
from hwnas.search.settings import limit_hashes, search_context, weight_hashes
from hwnas.search.supernet_file import SUPERNET_FILE
from hwnas.study import compare, rank, shrink, shrink_eval, supernets, trainings
from hwnas.study.trainings import Training
from hwnas.study.truth import configured_truth


@dataclass(frozen=True)
class StudyStage:
    """A stage of a study: its folder name, its output files, the hashes of its inputs,
    and the function that writes its files.
    """

    name: str
    outputs: list[str]
    made_from: Mapping[str, str]
    run: Callable[[StageContext], object]

    def inputs(self) -> dict[str, str]:
        """The hashes of everything that the stage depends on, by name."""
        return dict(self.made_from)

    def check_ready(self) -> None:
        """A study reads nothing that it has not read for its inputs."""


@dataclass(frozen=True)
class _Trainings:
    """What the trainings of a study share: the ``function`` that performs one
    (``module:function``), the latency table, and the number of threads of each.
    """

    pipeline: Pipeline
    function: str
    table: LatencyTable | None
    threads: int | None

    def training(self, experiment: Experiment, name: str, outputs: Sequence[str]) -> Training:
        """The training of ``experiment``, with the hashes of its inputs."""
        pipeline = self.pipeline
        inputs = {
            "hwnas": content_sha256(__version__),
            "space.json": pipeline.space.sha256,
            **_table_hashes(self.table),
            "search": settings_sha256(experiment, "search"),
            "seed": str(experiment.seed),
            "threads": str(self.threads),
            **limit_hashes(experiment.search),
            **weight_hashes(experiment.search),
            **pipeline.folder.hashes_of_data("train"),
        }
        if supernets.BASE_FILE in outputs:
            inputs["base"] = str(experiment.study.base_epochs)
        return Training(
            name,
            self.function,
            experiment,
            pipeline.space,
            self.table,
            pipeline.root,
            inputs,
            outputs,
        )

    def run(self, wanted: Iterable[Training], fresh: bool) -> dict[str, str]:
        """Perform the trainings whose outputs are not up to date. Returns the reasons of
        failed trainings by name.
        """
        pipeline = self.pipeline
        pending = []
        for training in wanted:
            if pipeline.prepare_work(training.name, training.inputs, fresh):
                pending.append(training)
        return trainings.run(pending, pipeline.experiment.study, self.threads, pipeline.progress)


def study_rank(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Rank architectures by super-nets, each trained in a stage of its own. A training
    that fails does not stop the others. ``fresh`` repeats all stages.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    config = experiment.study
    supernets.check(experiment, space)
    truth = rank.load_truth(experiment, space)
    trained = [supernets.earlier(folder) for folder in config.supernets]
    # Super-nets of earlier runs replace the trainings of this study.
    seeds = () if trained else config.seeds or (experiment.seed,)
    table = None
    if experiment.search.table is not None:
        table = LatencyTable.load(pipeline.folder.table_path)
    study_trainings = _Trainings(
        pipeline, "hwnas.study.supernets:train", table, trainings.threads_of(config, len(seeds))
    )
    wanted = {}
    for seed in seeds:
        configured = supernets.training(experiment, seed)
        # Raises an error for settings that cannot be trained before any training starts.
        search_context(configured, space, table)
        wanted[seed] = study_trainings.training(
            configured, f"supernet-{seed}", supernets.outputs(configured)
        )

    prepare(root)
    with locked(root):
        # The scores are outside of the stage's folder, which the pipeline sets aside.
        if fresh and (root / "scores").exists():
            set_aside(root / "scores")
        failed = study_trainings.run(wanted.values(), fresh)
        reasons = {}
        for seed, training in wanted.items():
            if training.name in failed:
                reasons[str(seed)] = failed[training.name]
            else:
                trained.append(_trained(training, seed))
        inputs = {
            "space.json": space.sha256,
            "truth": truth.sha256,
            **pipeline.folder.hashes_of_data("train"),
            "study": settings_sha256(experiment, "study", "compare"),
            "search": settings_sha256(experiment, "search"),
        }
        for position, supernet in enumerate(trained):
            inputs[f"super-net {position}"] = file_sha256(supernet.path)
        # A later success of a failed training must outdate the ranking.
        for failed_seed in reasons:
            inputs[f"super-net of seed {failed_seed}"] = "failed"
        stage = StudyStage(
            "rank",
            [rank.RESULT],
            inputs,
            lambda ctx: rank.run(ctx, space, truth, trained, reasons),
        )
        pipeline.perform(stage, fresh)


def _trained(training: Training, seed: int) -> supernets.TrainedSupernet:
    """The super-net that a training has written."""
    base = None
    if supernets.BASE_FILE in training.outputs:
        base = training.folder / supernets.BASE_FILE
    strategy = training.experiment.search.strategy.name
    return supernets.TrainedSupernet(seed, training.folder / SUPERNET_FILE, strategy, base)


def study_compare(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Compare search methods. Every method searches with every seed, each in a stage of
    its own. A search that fails does not stop the others. ``fresh`` repeats all stages.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    config = experiment.study
    pool = compare.comparison_pool(experiment, space)
    pairs = [(method, seed) for seed in config.seeds for method in config.compare.methods]
    study_trainings = _Trainings(
        pipeline,
        "hwnas.study.compare:run_search",
        pool.table,
        trainings.threads_of(config, len(pairs)),
    )
    wanted = {}
    for method, seed in pairs:
        configured = compare.method_experiment(experiment, method, seed)
        wanted[method.name, seed] = study_trainings.training(
            configured, f"{method.name}-{seed}", compare.SEARCH_FILES
        )

    prepare(root)
    with locked(root):
        failed = study_trainings.run(wanted.values(), fresh)
        searches = {}
        reasons = {}
        for key, training in wanted.items():
            if training.name in failed:
                reasons[key] = failed[training.name]
            else:
                searches[key] = training.folder
        inputs = {
            "space.json": space.sha256,
            "truth": pool.truth.sha256,
            **_table_hashes(pool.table),
            **limit_hashes(experiment.search),
            "study": settings_sha256(experiment, "study"),
            "search": settings_sha256(experiment, "search"),
        }
        for folder in searches.values():
            for name in compare.SEARCH_FILES:
                inputs[f"{folder.name}/{name}"] = file_sha256(folder / name)
        for method_name, seed in reasons:
            inputs[f"{method_name}-{seed}"] = "failed"
        stage = StudyStage(
            "compare",
            [compare.RESULT],
            inputs,
            lambda ctx: compare.run(ctx, space, pool, searches, reasons),
        )
        pipeline.perform(stage, fresh)


def study_shrink(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Shrink the space by every metric, each in a stage of its own after the training that
    they share, and compare the results. ``fresh`` repeats all stages.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    shrink.check(experiment, space)
    config = experiment.shrink
    truth = None
    if experiment.study.truth is not None:
        truth = configured_truth(experiment.study, space)
    common = {"space.json": space.sha256, "seed": str(experiment.seed)}
    # Without the list of metrics, so that adding one does not repeat the others.
    schedule = content_sha256(config.model_dump(mode="json", exclude={"metrics"}))

    prepare(root)
    with locked(root):
        first = None
        if any(shrink.metric(name).trains for name in config.metrics):
            first = root / "shrink-first"
            inputs = {
                **common,
                "first training": shrink.first_sha256(experiment),
                **pipeline.folder.hashes_of_data("train"),
            }
            training = StudyStage(
                "shrink-first",
                shrink.outputs_of_first(config),
                inputs,
                lambda ctx: shrink.train_first(ctx, space),
            )
            pipeline.perform(training, fresh)
        for name in config.metrics:
            shrinking = _shrinking(pipeline, name, first, {**common, "shrink": schedule})
            pipeline.perform(shrinking, fresh)

        inputs = {
            **common,
            "truth": "none" if truth is None else truth.sha256,
            "shrink": schedule,
            "columns": ", ".join(experiment.study.accuracies),
        }
        for name in config.metrics:
            path = root / f"shrink-{name}" / shrink.PATH
            inputs[f"{name}/{shrink.PATH}"] = file_sha256(path)
        comparison = StudyStage(
            "shrink",
            [shrink_eval.RESULT],
            inputs,
            lambda ctx: shrink_eval.compare(ctx, space, truth),
        )
        pipeline.perform(comparison, fresh)


def _shrinking(
    pipeline: Pipeline, name: str, first: Path | None, common: Mapping[str, str]
) -> StudyStage:
    """The stage that shrinks the space by a metric. ``first`` is the folder of the first
    super-net.
    """
    experiment = pipeline.experiment
    inputs = dict(common)
    supernet_folder = first if shrink.metric(name).trains else None
    if supernet_folder is not None:
        inputs |= {
            "first super-net": file_sha256(supernet_folder / SUPERNET_FILE),
            "search": settings_sha256(experiment, "search"),
            **pipeline.folder.hashes_of_data("train"),
        }
    return StudyStage(
        f"shrink-{name}",
        [shrink.SPACE, shrink.PATH],
        inputs,
        lambda ctx: shrink.run(ctx, pipeline.space, name, supernet_folder),
    )


def _table_hashes(table: LatencyTable | None) -> dict[str, str]:
    """The hash of the table; empty if costs are counted and there is no table."""
    return {} if table is None else {"table": table.sha256}
