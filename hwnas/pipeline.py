"""The pipeline: runs the stages in order and skips those that are up to date."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hwnas import __version__, preflight
from hwnas.config import Experiment
from hwnas.core.table import LatencyTable
from hwnas.document import content_sha256
from hwnas.errors import HwnasError
from hwnas.experiments import check_names, experiment_space, with_counted_classes
from hwnas.progress import Progress
from hwnas.runs import (
    StageContext,
    changed_inputs,
    locked,
    prepare,
    save_config,
    set_aside,
    stage,
    state_of,
)
from hwnas.stages import STAGES, RunFolder, Stage, stage_class

if TYPE_CHECKING:  # this module imports all stages
    from hwnas.estimate.plan import Estimates


class Work(Protocol):
    """What a run folder skips, resumes or starts again: a stage, or a part of a study."""

    @property
    def name(self) -> str:
        """The name of its sub-folder."""

    @property
    def outputs(self) -> list[str]:
        """The files that it writes there."""

    def inputs(self) -> dict[str, str]:
        """The hashes of everything it depends on. Raises HwnasError if it cannot run."""

    def run(self, ctx: StageContext, /) -> object:
        """Do the work, or resume it."""


class Pipeline:
    """An experiment and its run folder.

    Example:
        >>> Pipeline(load_experiment("configs/quickstart.toml"), Path("runs/quickstart"), Progress()).run()   # doctest: +SKIP
    """

    def __init__(self, experiment: Experiment, root: Path, progress: Progress) -> None:
        self.experiment = with_counted_classes(experiment)
        self.root = root
        self.progress = progress
        self.space = experiment_space(self.experiment)
        check_names(self.experiment, self.space)
        self.folder = RunFolder(self.experiment, self.space, root)

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of the stages that this experiment goes through."""
        return tuple(name for name in STAGES if stage_class(name).is_needed(self.experiment))

    def stage(self, name: str) -> Stage:
        """A stage by name."""
        return stage_class(name)(self.folder)

    def run(self, *, fresh: bool = False) -> None:
        """Run all needed stages and skip those that are up to date. Mistakes in the
        configuration and the data are reported before the first stage.
        """
        preflight.check(self.experiment, self.space, self.needed)
        for name in self.needed:
            self._run_stage(name, fresh)

    def run_stage(self, name: str, *, fresh: bool = False) -> None:
        """Run one stage: skip it if it is up to date, resume it if it was interrupted,
        and start it again if its inputs have changed.

        Before a search, the settings of the training that follows it are checked as
        well.
        """
        preflight.check(self.experiment, self.space, stage_class(name).checked)
        self._run_stage(name, fresh)

    def _run_stage(self, name: str, fresh: bool) -> None:
        from hwnas.engine import flush_denormals

        # denormal floats slow a CPU down by a factor, in training and in timing
        flush_denormals()
        prepare(self.root)
        with locked(self.root):
            self.perform(self.stage(name), fresh)

    def perform(self, work: Work, fresh: bool) -> None:
        """Run a stage of a locked run folder, unless it is up to date."""
        inputs = self._inputs(work)
        if not self.begins(work.name, inputs, fresh):
            return
        folder = self.root / work.name
        started = time.monotonic()
        with stage(folder, work.name, inputs, work.outputs):
            work.run(StageContext(self.experiment, self.root, folder, self.progress))
        self.progress.info(f"{work.name}: done in {time.monotonic() - started:.0f} s")

    def begins(self, name: str, inputs: Mapping[str, str], fresh: bool) -> bool:
        """Whether a stage has something to do. If so, its folder exists afterwards, and
        results from other inputs have been moved aside.
        """
        folder = self.root / name
        state = "stale" if fresh and folder.exists() else state_of(folder, inputs)
        if state == "done":
            self.progress.info(f"{name}: current, skipped")
            return False

        if state == "stale":
            why = "starting again"
            if not fresh:
                why = "inputs changed"
                changed = ", ".join(changed_inputs(folder, inputs)) or "its output files"
                self.progress.debug(f"{name}: changed since the last run: {changed}")
            moved_to = set_aside(folder)
            self.progress.info(f"{name}: {why}; the earlier results move to {moved_to.name}")
        elif state == "resume":
            self.progress.info(f"{name}: resumes")
        # Not earlier: a configuration that is refused must not replace the one that the
        # results were made with.
        save_config(self.root, self.experiment)
        folder.mkdir(exist_ok=True)
        return True

    def plan(self, *, timed: bool = False) -> str:
        """What ``run`` would do, in words. Nothing is written into the run folder.

        Reads the configuration and what it names, except the images: a space, a device,
        networks. (Images or labels have already been read if ``data.classes`` was not
        given and had to be counted.) With ``timed``, a few steps of every stage run in a
        temporary folder to estimate how long each stage takes; this also reads the
        images, the table and the results in the run folder.
        """
        lines = [f"experiment {self.experiment.name} in {self.root}", self._data_line()]
        estimates = self._estimates() if timed else None
        for name in self.needed:
            lines.append(f"{name:9} {self.stage(name).summary()}")
            if estimates is not None and name in estimates.stages:
                lines.append(f"{'':9} {estimates.stages[name]}")
        if estimates is not None:
            lines.append(f"{'in all':9} {estimates.summary}")
        return "\n".join(lines)

    def _data_line(self) -> str:
        data = self.experiment.data
        folder = f" in {data.path}" if data.path else ""
        plural = "es" if data.classes != 1 else ""
        line = (
            f"data: {data.name}{folder}, {data.classes} class{plural}, {data.channels} x"
            f" {data.resolution} px"
        )
        if data.path is not None and not Path(data.path).expanduser().exists():
            line += "; that path does not exist yet"
        return line

    def _estimates(self) -> Estimates:
        """Estimates of how long the stages take that are not up to date."""
        from hwnas.estimate.plan import Estimates
        from hwnas.networks import architecture

        self.progress.info("timing a few steps of every stage")
        current = self._up_to_date()
        table = None
        # a table in the run folder may be about to be replaced
        if self.experiment.search.table is not None or "profile" in current:
            table_path = self.folder.table_path
            table = LatencyTable.load(table_path) if table_path.is_file() else None
        arch = None
        if "search" in current or self.experiment.train.arch is not None:
            searched = self.folder.path("search", "arch.json")
            arch = architecture(self.experiment, self.space, searched)
        return Estimates(
            self.experiment, self.space, self.needed, current=current, table=table, arch=arch
        )

    def _up_to_date(self) -> list[str]:
        """The first stages, as far as a run would skip them."""
        current: list[str] = []
        for name in self.needed:
            folder = self.root / name
            if not folder.is_dir():
                break
            try:
                state = state_of(folder, self._inputs(self.stage(name)))
            except HwnasError:
                break  # an input is missing or refused, so the stage is not up to date
            if state != "done":
                break
            current.append(name)
        return current

    def _inputs(self, work: Work) -> dict[str, str]:
        return {"hwnas": content_sha256(__version__), **work.inputs()}
