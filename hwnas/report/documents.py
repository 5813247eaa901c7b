"""What a run folder holds, read once: the documents, the curves, and how far each stage
has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hwnas.config import Experiment
from hwnas.core.arch import Architecture, Placed
from hwnas.core.cost import UNITS, Unit, latency_ms, missing_ops
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.document import Document, file_sha256
from hwnas.export.bundle import Bundle
from hwnas.runs import MANIFEST, JsonLines, StageContext, StageManifest
from hwnas.search.result import SearchResult
from hwnas.stages import STAGES, stage_class
from hwnas.study.documents import CompareStudy, RankStudy, ShrinkStudy
from hwnas.task import Task, task_of
from hwnas.tasks.pictures import Pictures
from hwnas.train.result import TrainResult
from hwnas.verdict import Verdict

STUDIES = {"rank": "study.json", "compare": "compare.json", "shrink": "shrink.json"}
"""Study -> its document."""

Rows = list[dict[str, Any]]
D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class StageState:
    """How far a stage has come. ``step`` is the number of logged steps of one that was
    interrupted.
    """

    name: str
    finished: bool
    seconds: float | None
    step: int | None


@dataclass(frozen=True)
class RunDocuments:
    """Everything the report shows. Documents of stages that have not run are None,
    curves then empty.

    ``folder`` is the run folder as the command line takes it; of an absolute path the
    last part, for reports get passed on.
    """

    experiment: Experiment
    folder: str
    space: SearchSpace
    table: LatencyTable | None
    search: SearchResult | None
    search_rows: Rows
    arch: Architecture | None
    train: TrainResult | None
    train_rows: Rows
    validation_rows: Rows
    pictures: Pictures | None
    bundle: Bundle | None
    verdict: Verdict | None
    study: RankStudy | None
    comparison: CompareStudy | None
    shrinking: ShrinkStudy | None
    stages: tuple[StageState, ...]
    hashes: dict[str, str]

    @property
    def only_study(self) -> bool:
        """Whether the folder is of studies, in which no network is made."""
        return self.study_verb is not None and not self.stages

    @property
    def study_verb(self) -> str | None:
        """The command that made the folder's study, the first where there are several."""
        made = {
            "study rank": self.study,
            "study compare": self.comparison,
            "study shrink": self.shrinking,
        }
        return next((verb for verb, document in made.items() if document is not None), None)

    @property
    def task(self) -> Task:
        """What the network is for."""
        return task_of(self.experiment)

    @property
    def unit(self) -> Unit:
        """What the budget is in."""
        return UNITS[
            self.search.unit if self.search is not None else self.experiment.search.main_budget.UNIT
        ]

    @property
    def target(self) -> float | None:
        """The budget: the searched one, else the configured one."""
        return (
            self.search.target
            if self.search is not None
            else self.experiment.search.main_budget.most
        )

    @property
    def target_ms(self) -> float | None:
        """The budget where it is one of latency."""
        return self.target if self.unit.name == "ms" else None

    @property
    def counted(self) -> float | None:
        """What the searched network has of a budget that is counted."""
        return (
            self.search.candidates[0].predicted
            if self.search is not None and self.unit.name != "ms"
            else None
        )

    @property
    def predicted_ms(self) -> float | None:
        """The calibrated latency of the architecture, where the table covers it."""
        if self.arch is None or self.table is None or missing_ops(self.arch.ops(), self.table):
            return (
                self.search.candidates[0].predicted
                if self.search is not None and self.search.unit == "ms"
                else None
            )
        return latency_ms(self.arch, self.table)

    def places(self) -> tuple[Placed, ...]:
        """The architecture's blocks, input to output, with the skipped slots of its
        space where its picks are known.
        """
        return () if self.arch is None else self.space.placed(self.arch)


def sources() -> list[tuple[str, str]]:
    """(stage or study, file): what the report reads, whichever exist."""
    of_stages = [(name, file) for name in STAGES for file in stage_class(name).reported]
    return of_stages + list(STUDIES.items())


def read(ctx: StageContext, space: SearchSpace, table_path: Path) -> RunDocuments:
    """Read the run folder of ``ctx``. Raises DocumentError where a document is corrupt."""
    search = _load(SearchResult, ctx.path("search", "search.json"))
    bundle = _load(Bundle, ctx.path("export", "bundle.json"))
    searched = (
        _load(Architecture, ctx.path("search", "arch.json"))
        if ctx.experiment.train.arch is None
        else None
    )
    trained = _load(Architecture, ctx.path("train", "arch.json"))
    found = {f"{stage}/{name}": ctx.path(stage, name) for stage, name in sources()}
    if ctx.experiment.search.table is not None:
        found = {str(table_path): table_path} | {
            name: path for name, path in found.items() if name != "profile/table.json"
        }
    search_rows = JsonLines(ctx.path("search", "metrics.jsonl")).read()
    train_rows = JsonLines(ctx.path("train", "metrics.jsonl")).read()
    return RunDocuments(
        experiment=ctx.experiment,
        folder=ctx.root.name if ctx.root.is_absolute() else ctx.root.as_posix(),
        space=space,
        table=_load(LatencyTable, table_path),
        search=search,
        search_rows=search_rows,
        arch=trained or searched or (bundle.architecture if bundle is not None else None),
        train=_load(TrainResult, ctx.path("train", "train.json")),
        train_rows=train_rows,
        validation_rows=JsonLines(ctx.path("train", "validation.jsonl")).read(),
        pictures=_load(Pictures, ctx.path("train", "pictures.json")),
        bundle=bundle,
        verdict=_load(Verdict, ctx.path("validate", "verdict.json")),
        study=_load(RankStudy, ctx.path("rank", STUDIES["rank"])),
        comparison=_load(CompareStudy, ctx.path("compare", STUDIES["compare"])),
        shrinking=_load(ShrinkStudy, ctx.path("shrink", STUDIES["shrink"])),
        stages=tuple(
            _state(ctx, name, {"search": search_rows, "train": train_rows}.get(name, []))
            for name in _needed(ctx)
        ),
        hashes={name: file_sha256(path) for name, path in found.items() if path.is_file()},
    )


def _load(document: type[D], path: Path) -> D | None:
    return document.load(path) if path.is_file() else None


def _needed(ctx: StageContext) -> list[str]:
    """The stages that the report shows: those that the experiment goes through, and
    those that were done all the same.
    """
    classes = {name: stage_class(name) for name in STAGES}
    shown = {name: stage for name, stage in classes.items() if stage.reported}
    studied = any(ctx.path(name, MANIFEST).is_file() for name in STUDIES)
    if studied and not any(ctx.path(name, MANIFEST).is_file() for name in shown):
        return []  # a study, which makes no network
    return [
        name
        for name, stage in shown.items()
        if stage.is_needed(ctx.experiment) or _has_finished(ctx, name)
    ]


def _has_finished(ctx: StageContext, name: str) -> bool:
    return ctx.path(name, stage_class(name).reported[0]).is_file()


def _state(ctx: StageContext, name: str, rows: Rows) -> StageState:
    manifest = _load(StageManifest, ctx.path(name, MANIFEST))
    finished = _has_finished(ctx, name)
    step = int(rows[-1]["step"]) + 1 if rows and not finished else None
    return StageState(
        name,
        finished,
        manifest.seconds if manifest is not None and manifest.state == "done" else None,
        step,
    )
