"""The studies in order: which trainings one needs, what they read, and when they may be skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwnas import __version__
from hwnas.config import Experiment
from hwnas.core.table import LatencyTable
from hwnas.data import fingerprint
from hwnas.document import content_sha256, file_sha256
from hwnas.engine import flush_denormals
from hwnas.pipeline import Pipeline
from hwnas.runs import StageContext, locked, prepare, set_aside
from hwnas.search.stage import limit_hashes, search_context
from hwnas.search.supernets import SUPERNET_FILE
from hwnas.study import compare, rank, shrink, shrink_eval, supernets, trainings
from hwnas.study.trainings import Training
from hwnas.study.truth import configured_truth

EXECUTION_KEYS = ("processes", "ray_address", "ray_gpus")
"""Keys of ``study`` that decide where and when trainings run, and no number."""


@dataclass(frozen=True)
class StudyStage:
    """A part of a study: a folder of its own, the files in it, and the function that makes them."""

    name: str
    outputs: list[str]
    made_from: Mapping[str, str]
    run: Callable[[StageContext], object]

    def inputs(self) -> dict[str, str]:
        """The hashes of all that it depends on, by name."""
        return dict(self.made_from)


@dataclass(frozen=True)
class _Trainings:
    """The trainings of a study, in what they share: the ``function`` that does one,
    ``module:name``, the table, and threads of each.
    """

    pipeline: Pipeline
    function: str
    table: LatencyTable | None
    threads: int | None

    def of(self, experiment: Experiment, name: str, outputs: Sequence[str]) -> Training:
        """One of them, with what it is made from."""
        pipeline = self.pipeline
        inputs = {
            "hwnas": content_sha256(__version__),
            "space.json": pipeline.space.sha256,
            **_table(self.table),
            "search": content_sha256(experiment.search.model_dump(mode="json")),
            "seed": str(experiment.seed),
            "threads": str(self.threads),
            **limit_hashes(experiment.search),
            **_data(experiment),
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
        """Do those that are not current; why some failed, by name."""
        pipeline = self.pipeline
        left = [
            training
            for training in wanted
            if pipeline.begins(training.name, training.inputs, fresh)
        ]
        return trainings.run(left, pipeline.experiment.study, self.threads, pipeline.progress)


def study_rank(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Train the super-nets of a ranking study, each a stage of its own, and then rank.
    A training that fails leaves the others.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    supernets.check(experiment, space)
    truth, config = rank.load_truth(experiment, space), experiment.study
    found = [supernets.earlier(each) for each in config.supernets]
    seeds = () if found else config.seeds or (experiment.seed,)
    table = (
        None if experiment.search.table is None else LatencyTable.load(pipeline.folder.table_path)
    )
    every = _Trainings(
        pipeline, "hwnas.study.supernets:train", table, trainings.threads_of(config, len(seeds))
    )
    wanted = {}
    for seed in seeds:
        each = supernets.training(experiment, seed)
        search_context(each, space, table)  # refuses what cannot be trained before anything is
        wanted[seed] = every.of(each, f"supernet-{seed}", supernets.outputs(each))
    prepare(root)
    with locked(root):
        if fresh and (root / "scores").exists():
            set_aside(root / "scores")
        failed = every.run(wanted.values(), fresh)
        for seed, training in wanted.items():
            if training.name not in failed:
                base = (
                    training.folder / supernets.BASE_FILE
                    if supernets.BASE_FILE in training.outputs
                    else None
                )
                found.append(
                    supernets.Trained(
                        seed, training.folder / SUPERNET_FILE, experiment.search.strategy.name, base
                    )
                )
        reasons = {
            str(seed): failed[each.name] for seed, each in wanted.items() if each.name in failed
        }
        inputs = {"space.json": space.sha256, "truth": truth.sha256, **_data(experiment)}
        inputs |= {
            "study": _numbers(experiment, "compare"),
            "search": content_sha256(experiment.search.model_dump(mode="json")),
        }
        inputs |= {
            f"super-net {position}": file_sha256(each.path) for position, each in enumerate(found)
        }
        inputs |= {f"super-net of seed {seed}": "failed" for seed in reasons}
        pipeline.perform(
            StudyStage(
                "rank",
                [rank.RESULT],
                inputs,
                lambda ctx: rank.run(ctx, space, truth, found, reasons),
            ),
            fresh,
        )


def study_compare(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Search with every method and seed, each a stage of its own, and then compare. A
    search that fails leaves the others.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    arena, config = compare.arena(experiment, space), experiment.study
    pairs = [(method, seed) for seed in config.seeds for method in config.compare.methods]
    every = _Trainings(
        pipeline,
        "hwnas.study.compare:search",
        arena.table,
        trainings.threads_of(config, len(pairs)),
    )
    wanted = {}
    for method, seed in pairs:
        each = compare.searching(experiment, method, seed)
        wanted[method.name, seed] = every.of(each, f"{method.name}-{seed}", compare.SEARCHED)
    prepare(root)
    with locked(root):
        failed = every.run(wanted.values(), fresh)
        done = {
            key: training.folder for key, training in wanted.items() if training.name not in failed
        }
        reasons = {
            key: failed[training.name]
            for key, training in wanted.items()
            if training.name in failed
        }
        inputs = {
            "space.json": space.sha256,
            "truth": arena.truth.sha256,
            **_table(arena.table),
            **limit_hashes(experiment.search),
        }
        inputs |= {
            "study": _numbers(experiment),
            "search": content_sha256(experiment.search.model_dump(mode="json")),
        }
        inputs |= {
            f"{folder.name}/{name}": file_sha256(folder / name)
            for folder in done.values()
            for name in compare.SEARCHED
        }
        inputs |= {f"{method}-{seed}": "failed" for method, seed in reasons}
        current = StudyStage(
            "compare",
            [compare.RESULT],
            inputs,
            lambda ctx: compare.run(ctx, space, arena, done, reasons),
        )
        pipeline.perform(current, fresh)


def study_shrink(pipeline: Pipeline, *, fresh: bool = False) -> None:
    """Shrink the space by every metric, each a stage of its own after the training that
    they share, and compare.
    """
    flush_denormals()
    experiment, space, root = pipeline.experiment, pipeline.space, pipeline.root
    shrink.check(experiment, space)
    config = experiment.shrink
    truth = (
        configured_truth(experiment.study, space) if experiment.study.truth is not None else None
    )
    common = {"space.json": space.sha256, "seed": str(experiment.seed)}
    schedule = content_sha256(config.model_dump(mode="json", exclude={"metrics"}))
    prepare(root)
    with locked(root):
        first = None
        if any(shrink.metric(name).trains for name in config.metrics):
            inputs = {
                **common,
                "first training": shrink.first_sha256(experiment),
                **_data(experiment),
            }
            outputs = shrink.outputs_of_first(config)
            pipeline.perform(
                StudyStage(
                    "shrink-first", outputs, inputs, lambda ctx: shrink.train_first(ctx, space)
                ),
                fresh,
            )
            first = root / "shrink-first"
        for name in config.metrics:
            pipeline.perform(
                _shrinking(pipeline, name, first, {**common, "shrink": schedule}), fresh
            )
        paths = {
            f"{name}/{shrink.PATH}": file_sha256(root / f"shrink-{name}" / shrink.PATH)
            for name in config.metrics
        }
        last = {
            **common,
            **paths,
            "truth": "none" if truth is None else truth.sha256,
            "shrink": schedule,
        }
        last |= {"columns": ", ".join(experiment.study.accuracies)}
        compared = StudyStage(
            "shrink", [shrink_eval.RESULT], last, lambda ctx: shrink_eval.compare(ctx, space, truth)
        )
        pipeline.perform(compared, fresh)


def _shrinking(
    pipeline: Pipeline, name: str, first: Path | None, common: Mapping[str, str]
) -> StudyStage:
    """The shrinking of the space by a metric."""
    experiment, inputs = pipeline.experiment, dict(common)
    begin = first if shrink.metric(name).trains else None
    if begin is not None:
        search = content_sha256(experiment.search.model_dump(mode="json"))
        inputs |= {
            "first super-net": file_sha256(begin / SUPERNET_FILE),
            "search": search,
            **_data(experiment),
        }
    return StudyStage(
        f"shrink-{name}",
        [shrink.SPACE, shrink.PATH],
        inputs,
        lambda ctx: shrink.run(ctx, pipeline.space, name, begin),
    )


def _table(table: LatencyTable | None) -> dict[str, str]:
    """The table as an input; none where costs are counted."""
    return {} if table is None else {"table": table.sha256}


def _data(experiment: Experiment) -> dict[str, str]:
    return {
        "data": content_sha256(experiment.data.model_dump(mode="json")),
        "images": fingerprint(experiment.data),
    }


def _numbers(experiment: Experiment, *others: str) -> str:
    """The hash of what decides a study's numbers."""
    content = experiment.study.model_dump(mode="json")
    return content_sha256(
        {key: value for key, value in content.items() if key not in (*EXECUTION_KEYS, *others)}
    )
