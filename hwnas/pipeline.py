"""The pipeline: a loop over the stages, and when one may be skipped."""

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

if TYPE_CHECKING:  # it imports all stages
    from hwnas.estimate.plan import Estimates


class Work(Protocol):
    """What a run folder skips, resumes or starts anew: a stage, or a part of a study."""

    @property
    def name(self) -> str:
        """The sub-folder."""

    @property
    def outputs(self) -> list[str]:
        """The files that it leaves there."""

    def inputs(self) -> dict[str, str]:
        """The hashes of all that it depends on. Raises HwnasError where it cannot be done."""

    def run(self, ctx: StageContext, /) -> object:
        """Do it, or resume it."""


class Pipeline:
    """An experiment and its run folder.

    Example:
        >>> Pipeline(load_experiment("configs/quickstart.toml"), Path("runs/quickstart"), Progress()).run()   # doctest: +SKIP
    """

    def __init__(self, experiment: Experiment, root: Path, progress: Progress) -> None:
        self.experiment, self.root, self.progress = with_counted_classes(experiment), root, progress
        self.space = experiment_space(self.experiment)
        check_names(self.experiment, self.space)
        self.folder = RunFolder(self.experiment, self.space, root)

    @property
    def needed(self) -> tuple[str, ...]:
        """The stages this experiment goes through."""
        return tuple(name for name in STAGES if stage_class(name).is_needed(self.experiment))

    def stage(self, name: str) -> Stage:
        """A stage by name."""
        return stage_class(name)(self.folder)

    def run(self, *, fresh: bool = False) -> None:
        """All needed stages, skipping what is current. What the user forgot is asked
        for before the first one.
        """
        preflight.check(self.experiment, self.space, self.needed)
        for name in self.needed:
            self._run_stage(name, fresh)

    def run_stage(self, name: str, *, fresh: bool = False) -> None:
        """One stage: skipped where it is current, resumed where it was interrupted,
        started anew where its inputs changed.

        What the training after a search could not work with is refused before the search.
        """
        preflight.check(self.experiment, self.space, stage_class(name).checked)
        self._run_stage(name, fresh)

    def _run_stage(self, name: str, fresh: bool) -> None:
        from hwnas.engine import flush_denormals

        flush_denormals()
        prepare(self.root)
        with locked(self.root):
            self.perform(self.stage(name), fresh)

    def perform(self, current: Work, fresh: bool) -> None:
        """A stage of a locked run folder, unless it is current."""
        inputs = self._inputs(current)
        if not self.begins(current.name, inputs, fresh):
            return
        folder, started = self.root / current.name, time.monotonic()
        with stage(folder, current.name, inputs, current.outputs):
            current.run(StageContext(self.experiment, self.root, folder, self.progress))
        self.progress.info(f"{current.name}: done in {time.monotonic() - started:.0f} s")

    def begins(self, name: str, inputs: Mapping[str, str], fresh: bool) -> bool:
        """Whether a stage has something to do. Its folder is then there, and what it
        held of other inputs is set aside.
        """
        folder = self.root / name
        state = "stale" if fresh and folder.exists() else state_of(folder, inputs)
        if state == "done":
            self.progress.info(f"{name}: current, skipped")
            return False
        if state == "stale":
            if not fresh:
                self.progress.debug(
                    f"{name}: changed since:"
                    f" {', '.join(changed_inputs(folder, inputs)) or 'its output files'}"
                )
            why = "starting anew" if fresh else "inputs changed"
            self.progress.info(
                f"{name}: {why}; the earlier results move to {set_aside(folder).name}"
            )
        elif state == "resume":
            self.progress.info(f"{name}: resumes")
        # not earlier: a refused configuration must not replace that of the results
        save_config(self.root, self.experiment)
        folder.mkdir(exist_ok=True)
        return True

    def plan(self, *, timed: bool = False) -> str:
        """What ``run`` would do, in words. Nothing is written into the run folder.

        Read are the configuration and what it names beside the images: a space, a
        device, networks. The images or their labels were read before, where
        ``data.classes`` was not given and had to be counted. With ``timed``, a few
        steps of every stage are done in a temporary folder, and each stage is said to
        take how long; for that, the images, the table and what the run folder already
        holds are read, too.
        """
        data = self.experiment.data
        where = f" in {data.path}" if data.path else ""
        classes = f"{data.classes} class{'es' if data.classes != 1 else ''}"
        missing = data.path is not None and not Path(data.path).expanduser().exists()
        there = "; that path does not exist yet" if missing else ""
        source = (
            f"data: {data.name}{where}, {classes}, {data.channels} x {data.resolution} px{there}"
        )
        lines = [f"experiment {self.experiment.name} in {self.root}", source]
        found = self._estimates() if timed else None
        for name in self.needed:
            lines.append(f"{name:9} {self.stage(name).summary()}")
            if found is not None and name in found.stages:
                lines.append(f"{'':9} {found.stages[name]}")
        if found is not None:
            lines.append(f"{'in all':9} {found.summary}")
        return "\n".join(lines)

    def _estimates(self) -> Estimates:
        """How long the stages take that are not up to date."""
        from hwnas.estimate.plan import Estimates
        from hwnas.networks import architecture

        self.progress.info("timing a few steps of every stage")
        current, table_path = self._up_to_date(), self.folder.table_path
        profiled = self.experiment.search.table is not None or "profile" in current
        searched = self.folder.path("search", "arch.json")
        known = "search" in current or self.experiment.train.arch is not None
        return Estimates(
            self.experiment,
            self.space,
            self.needed,
            current=current,
            table=LatencyTable.load(table_path) if profiled and table_path.is_file() else None,
            arch=architecture(self.experiment, self.space, searched) if known else None,
        )

    def _up_to_date(self) -> list[str]:
        """The first stages, as far as a run would skip them."""
        found: list[str] = []
        for name in self.needed:
            folder = self.root / name
            if not folder.is_dir():
                break
            try:
                state = state_of(folder, self._inputs(self.stage(name)))
            except HwnasError:  # an input is missing, or is refused: there is something to do
                break
            if state != "done":
                break
            found.append(name)
        return found

    def _inputs(self, of: Work) -> dict[str, str]:
        return {"hwnas": content_sha256(__version__), **of.inputs()}
