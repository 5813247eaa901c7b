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
    state_of,
)
from hwnas.runs import stage as recorded_stage
from hwnas.stages import STAGES, RunFolder, Stage, stage_class

if TYPE_CHECKING:  # this module imports all stages
    from hwnas.estimate.plan import Estimates


class Work(Protocol):
    """A unit of work in a run folder that can be skipped, resumed or started again: a
    stage, or a part of a study.
    """

    @property
    def name(self) -> str:
        """The name of its folder in the run folder."""

    @property
    def outputs(self) -> list[str]:
        """The files that it writes there."""

    def inputs(self) -> dict[str, str]:
        """The hashes of everything that it depends on. Raises HwnasError if it cannot
        run.
        """

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
        """Run all needed stages, except those that are up to date. Mistakes in the
        configuration or the data raise HwnasError before the first stage starts.
        """
        preflight.check(self.experiment, self.space, self.needed)
        for name in self.needed:
            self._run_stage(name, fresh)

    def run_stage(self, name: str, *, fresh: bool = False) -> None:
        """Run one stage: skip it if it is up to date, resume it if it was interrupted,
        and start it again if its inputs have changed.

        Before a search, the settings of the training after it are checked as well.
        """
        preflight.check(self.experiment, self.space, stage_class(name).checked)
        self._run_stage(name, fresh)

    def _run_stage(self, name: str, fresh: bool) -> None:
        from hwnas.engine import flush_denormals

        # denormal floats make a CPU many times slower, in training and in timing
        flush_denormals()
        prepare(self.root)
        with locked(self.root):
            self.perform(self.stage(name), fresh)

    def perform(self, work: Work, fresh: bool) -> None:
        """Do a unit of work unless it is up to date. The run folder must be locked."""
        inputs = self._inputs(work)
        if not self.prepare_work(work.name, inputs, fresh):
            return

        folder = self.root / work.name
        started = time.monotonic()
        with recorded_stage(folder, work.name, inputs, work.outputs):
            work.run(StageContext(self.experiment, self.root, folder, self.progress))
        self.progress.info(f"{work.name}: done in {time.monotonic() - started:.0f} s")

    def prepare_work(self, name: str, inputs: Mapping[str, str], fresh: bool) -> bool:
        """Get the folder of a stage ready; False if the stage is up to date. Results from
        other inputs are moved aside, as are all results if ``fresh``.
        """
        folder = self.root / name
        # --fresh treats whatever is there as stale
        state = "stale" if fresh and folder.exists() else state_of(folder, inputs)
        if state == "done":
            self.progress.info(f"{name}: up to date, skipped")
            return False

        if state == "stale":
            reason = "starting again"
            if not fresh:
                reason = "inputs changed"
                changed = ", ".join(changed_inputs(folder, inputs)) or "its output files"
                self.progress.debug(f"{name}: changed since the last run: {changed}")
            moved_to = set_aside(folder)
            self.progress.info(f"{name}: {reason}; the earlier results are now in {moved_to.name}")
        elif state == "resume":
            self.progress.info(f"{name}: resumes")
        # Only saved now that the stage will run: a configuration that was refused must not
        # replace the one that the existing results were made with.
        save_config(self.root, self.experiment)
        folder.mkdir(exist_ok=True)
        return True

    def plan(self, *, timed: bool = False) -> str:
        """Describe what ``run`` would do. Writes nothing into the run folder.

        This reads the configuration and the space, device and networks that it names, but
        no images. (If ``data.classes`` is not set, the constructor has already read images
        or labels to count the classes.) With ``timed``, a few steps of every stage run in
        a temporary folder to estimate how long each stage takes; this also reads the
        images, the table and the results in the run folder.
        """
        lines = [f"experiment {self.experiment.name} in {self.root}", self._data_line()]
        estimates = self._estimates() if timed else None
        for name in self.needed:
            lines.append(f"{name:9} {self.stage(name).summary()}")
            if estimates is not None and name in estimates.stages:
                lines.append(f"{'':9} {estimates.stages[name]}")
        if estimates is not None:
            lines.append(f"{'total':9} {estimates.summary}")
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
        """Estimate how long each stage takes that is not up to date."""
        from hwnas.estimate.plan import Estimates
        from hwnas.networks import architecture

        self.progress.info("timing a few steps of every stage")
        current = self._up_to_date()
        table = None
        # the table in the run folder is only used if the run would not replace it
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
        """The stages that a run would skip, up to the first that it would not."""
        current: list[str] = []
        for name in self.needed:
            folder = self.root / name
            if not folder.is_dir():
                break
            try:
                state = state_of(folder, self._inputs(self.stage(name)))
            except HwnasError:
                break  # an input is missing or invalid, so the stage is not up to date
            if state != "done":
                break
            current.append(name)
        return current

    def _inputs(self, work: Work) -> dict[str, str]:
        return {"hwnas": content_sha256(__version__), **work.inputs()}
