"""The contents of a run folder, read once: the documents, the curves, and how far each
stage has got.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hwnas.config import Experiment
from hwnas.core.arch import Architecture, Position
from hwnas.core.cost import UNITS, Unit, latency_ms, missing_ops
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.document import Document, file_sha256
from hwnas.export.bundle import Bundle
from hwnas.runs import MANIFEST, JsonLines, StageContext, StageManifest, is_number
from hwnas.search.result import SearchResult
from hwnas.stages import STAGES, stage_class
from hwnas.study.documents import CompareStudy, RankStudy, ShrinkStudy
from hwnas.task import Task, task_of
from hwnas.tasks.pictures import Pictures
from hwnas.train.result import TrainResult
from hwnas.unreadable import Unreadable
from hwnas.verdict import Verdict

STUDIES = {"rank": "study.json", "compare": "compare.json", "shrink": "shrink.json"}
"""Study -> its document."""

LARGEST_SHOWN = 1e30
"""Values of a log above this are left out. No training gets there, and the axis of a
chart cannot show them beside others.
"""

Rows = list[dict[str, Any]]
D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class StageState:
    """How far a stage has got. ``step`` is the number of steps that an interrupted
    stage has logged.
    """

    name: str
    finished: bool
    seconds: float | None
    step: int | None


@dataclass(frozen=True)
class RunDocuments:
    """Everything the report shows. Documents of stages that have not run are None, and
    their curves are empty.

    ``folder`` is the run folder as given on the command line. Of an absolute path it is
    the last part, because reports are passed on to others.
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
    unreadable: dict[str, str] = field(default_factory=dict)
    """Images that the run leaves out, and the reasons; see ``hwnas/unreadable.py``."""

    @property
    def only_study(self) -> bool:
        """Whether the folder only contains studies, which do not produce a network."""
        return self.study_verb is not None and not self.stages

    @property
    def study_verb(self) -> str | None:
        """The command that made the study in this folder; the first one of several."""
        if self.study is not None:
            return "study rank"
        if self.comparison is not None:
            return "study compare"
        if self.shrinking is not None:
            return "study shrink"
        return None

    @property
    def task(self) -> Task:
        """The task of the network."""
        return task_of(self.experiment)

    @property
    def unit(self) -> Unit:
        """The unit of the budget."""
        if self.search is not None:
            return UNITS[self.search.unit]
        return UNITS[self.experiment.search.main_budget.UNIT]

    @property
    def target(self) -> float | None:
        """The budget that was searched for, else the configured one."""
        if self.search is not None:
            return self.search.target
        return self.experiment.search.main_budget.most

    @property
    def target_ms(self) -> float | None:
        """The budget if it is a latency."""
        return self.target if self.unit.name == "ms" else None

    @property
    def counted_cost(self) -> float | None:
        """The cost of the found network if the budget is counted, as MACs or parameters
        are.
        """
        if self.search is None or self.unit.name == "ms":
            return None
        return self.search.candidates[0].predicted

    @property
    def predicted_ms(self) -> float | None:
        """The calibrated latency of the architecture. If the table does not cover it,
        what the search predicted.
        """
        arch = self.arch
        table = self.table
        if arch is not None and table is not None and not missing_ops(arch.ops(), table):
            return latency_ms(arch, table)
        if self.search is not None and self.search.unit == "ms":
            return self.search.candidates[0].predicted
        return None

    def positions(self) -> tuple[Position, ...]:
        """The architecture's blocks, from input to output, with the skipped slots of
        its space if its picks are known.
        """
        return () if self.arch is None else self.space.positions(self.arch)


def sources() -> list[tuple[str, str]]:
    """(stage or study, file): what the report reads if it exists."""
    files = []
    for name in STAGES:
        files += [(name, file) for file in stage_class(name).reported]
    return files + list(STUDIES.items())


def read(ctx: StageContext, space: SearchSpace, table_path: Path) -> RunDocuments:
    """Read the run folder of ``ctx``. Raises DocumentError if a document is corrupt."""
    bundle = _load(Bundle, ctx.path("export", "bundle.json"))
    paths = {f"{stage}/{name}": ctx.path(stage, name) for stage, name in sources()}
    if ctx.experiment.search.table is not None:
        # a table profiled earlier in this folder is not the one that was used
        paths.pop("profile/table.json", None)
        paths = {str(table_path): table_path, **paths}
    search_rows = _read_curves(ctx.path("search", "metrics.jsonl"))
    train_rows = _read_curves(ctx.path("train", "metrics.jsonl"))
    logged_rows = {"search": search_rows, "train": train_rows}
    stages = [_state(ctx, name, logged_rows.get(name, [])) for name in _needed(ctx)]
    return RunDocuments(
        experiment=ctx.experiment,
        folder=ctx.root.name if ctx.root.is_absolute() else ctx.root.as_posix(),
        space=space,
        table=_load(LatencyTable, table_path),
        search=_load(SearchResult, ctx.path("search", "search.json")),
        search_rows=search_rows,
        arch=_architecture(ctx, bundle),
        train=_load(TrainResult, ctx.path("train", "train.json")),
        train_rows=train_rows,
        validation_rows=_read_curves(ctx.path("train", "validation.jsonl"), "images"),
        pictures=_load(Pictures, ctx.path("train", "pictures.json")),
        bundle=bundle,
        verdict=_load(Verdict, ctx.path("validate", "verdict.json")),
        study=_load(RankStudy, ctx.path("rank", STUDIES["rank"])),
        comparison=_load(CompareStudy, ctx.path("compare", STUDIES["compare"])),
        shrinking=_load(ShrinkStudy, ctx.path("shrink", STUDIES["shrink"])),
        stages=tuple(stages),
        hashes={name: file_sha256(path) for name, path in paths.items() if path.is_file()},
        unreadable=Unreadable.of_run(ctx.root).images,
    )


def _read_curves(path: Path, *needed: str) -> Rows:
    """The rows of a log that have a step and what else is ``needed``, with those values
    that a chart can show.
    """
    rows = []
    for row in JsonLines(path).each(numbers=("step", *needed)):
        shown = {}
        for name, value in row.items():
            # is_number first: only numbers can be compared with the limit
            if is_number(value) and abs(value) <= LARGEST_SHOWN:
                # interned, because every row brings strings of its own for its keys
                shown[sys.intern(name)] = value
        if {"step", *needed} <= shown.keys():
            rows.append(shown)
    return rows


def _architecture(ctx: StageContext, bundle: Bundle | None) -> Architecture | None:
    """The architecture of the run, from the latest stage that writes one: training adds
    the detector to it, and only a bundle knows one that ``train.arch`` names.
    """
    trained = _load(Architecture, ctx.path("train", "arch.json"))
    if trained is not None:
        return trained
    if ctx.experiment.train.arch is None:
        searched = _load(Architecture, ctx.path("search", "arch.json"))
        if searched is not None:
            return searched
    return bundle.architecture if bundle is not None else None


def _load(document: type[D], path: Path) -> D | None:
    return document.load(path) if path.is_file() else None


def _needed(ctx: StageContext) -> list[str]:
    """The stages that the report shows: those that the experiment goes through, and
    others that have run anyway.
    """
    shown = {}
    for name in STAGES:
        stage = stage_class(name)
        if stage.reported:
            shown[name] = stage
    has_study = any(ctx.path(name, MANIFEST).is_file() for name in STUDIES)
    has_stage = any(ctx.path(name, MANIFEST).is_file() for name in shown)
    if has_study and not has_stage:
        return []  # a study by itself does not produce a network

    needed = []
    for name, stage in shown.items():
        if stage.is_needed(ctx.experiment) or _has_finished(ctx, name):
            needed.append(name)
    return needed


def _has_finished(ctx: StageContext, name: str) -> bool:
    return ctx.path(name, stage_class(name).reported[0]).is_file()


def _state(ctx: StageContext, name: str, rows: Rows) -> StageState:
    manifest = _load(StageManifest, ctx.path(name, MANIFEST))
    seconds = None
    if manifest is not None and manifest.state == "done":
        seconds = manifest.seconds
    finished = _has_finished(ctx, name)
    step = int(rows[-1]["step"]) + 1 if rows and not finished else None
    return StageState(name, finished, seconds, step)
