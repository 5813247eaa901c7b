"""The pipeline: runs the stages in order and skips those that are up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hwnas import __version__, preflight
from hwnas.config import Experiment
from hwnas.core.table import LatencyTable
from hwnas.document import content_sha256, user_path
from hwnas.errors import DataProblemsError, HwnasError, UnreadableImageError
from hwnas.experiments import check_names, experiment_space, with_counted_classes
from hwnas.failures import explained
from hwnas.progress import Progress
from hwnas.runs import (
    MANIFEST,
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
from hwnas.unreadable import FILE, Unreadable

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

    def check_ready(self) -> None:
        """Raise HwnasError if it could not start now; see ``Stage.check_ready``."""

    def run(self, ctx: StageContext, /) -> object:
        """Do the work, or resume it."""


class Pipeline:
    """An experiment and its run folder.

    Example:
        >>> Pipeline(load_experiment("configs/quickstart.toml"), Path("runs/quickstart"), Progress()).run()   # doctest: +SKIP
    """

    def __init__(self, experiment: Experiment, root: Path, progress: Progress) -> None:
        self.configured = with_counted_classes(experiment)
        self.root = root
        self.progress = progress
        self.unreadable = Unreadable.of_run(root)
        self.space = experiment_space(self.configured)
        check_names(self.configured, self.space)

    @property
    def experiment(self) -> Experiment:
        """The experiment without the images that the run leaves out."""
        data = self.unreadable.applied(self.configured.data)
        return self.configured.model_copy(update={"data": data})

    @property
    def folder(self) -> RunFolder:
        """What the stages read."""
        return RunFolder(self.experiment, self.space, self.root, self.unreadable.same_as)

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
        if fresh:
            # nothing is kept that the images left out so far would have to agree with
            self._forget_left_out()
        self._check(self.needed)
        for name in self.needed:
            self._run_stage(name, fresh)

    def run_stage(self, name: str, *, fresh: bool = False) -> None:
        """Run one stage: skip it if it is up to date, resume it if it was interrupted,
        and start it again if its inputs have changed.

        Before a search, the settings of the training after it are checked as well.
        """
        self._check(stage_class(name).checked)
        self._run_stage(name, fresh)

    def _run_stage(self, name: str, fresh: bool) -> None:
        if stage_class(name).runs_networks:
            from hwnas.engine import flush_denormals

            # denormal floats make a CPU many times slower, in training and in timing
            flush_denormals()
        prepare(self.root)
        known = self.unreadable.images
        with locked(self.root):
            try:
                self.perform(self.stage(name), fresh)
                return
            except UnreadableImageError:
                # an image that is left out and met again would be met for ever
                if self.configured.data.unreadable == "fail" or self.unreadable.images == known:
                    raise
        # the image is left out now
        self._run_stage(name, fresh=False)

    def _check(self, stages: Collection[str]) -> None:
        """Check what the coming ``stages`` need before the first of them starts. Raises
        DataError for images that do not decode, or leaves them out if
        ``data.unreadable = 'skip'``.
        """
        experiment = self.experiment
        if self.configured.data.unreadable == "fail":
            # images that the user was asked to remove or replace, and that are still there
            data = self.unreadable.removed(self.configured.data)
            experiment = experiment.model_copy(update={"data": data})
        try:
            inspection = preflight.check(experiment, self.space, stages, self.progress)
        except DataProblemsError as error:
            # so that the results so far are still up to date once the images are removed
            if any(self.root.glob(f"*/{MANIFEST}")):
                self._leave_out_before_work(error.unreadable)
            raise
        if inspection is not None:
            self._leave_out_before_work(inspection.unreadable)
        if self.unreadable.images:
            count = len(self.unreadable.images)
            self.progress.info(f"images that do not decode and are left out: {count}, see {FILE}")

    def _leave_out_before_work(self, images: Mapping[str, str]) -> None:
        if images:
            prepare(self.root)
            with locked(self.root):
                self._leave_out(images, {})

    def _leave_out(self, images: Mapping[str, str], inputs: Mapping[str, str]) -> None:
        """Leave out images (path -> reason) from now on. ``inputs`` are those of the stage
        that has met them, if one has. The run folder must be locked.
        """
        new = {image: why for image, why in images.items() if image not in self.unreadable.images}
        if new:
            self.unreadable = self.unreadable.extended(new, self.experiment.data, inputs)
            self.unreadable.save(self.root / FILE)

    def _forget_left_out(self) -> None:
        """Start without images that are left out; the list is moved aside."""
        if (self.root / FILE).exists():
            set_aside(self.root / FILE)
        self.unreadable = Unreadable()

    def perform(self, work: Work, fresh: bool) -> None:
        """Do a unit of work unless it is up to date. The run folder must be locked."""
        inputs = self._inputs(work)
        if not self.prepare_work(work.name, inputs, fresh, work.check_ready):
            return

        folder = self.root / work.name
        started = time.monotonic()
        try:
            with (
                explained(work.name, self.experiment),
                recorded_stage(folder, work.name, inputs, work.outputs),
            ):
                work.run(StageContext(self.experiment, self.root, folder, self.progress))
        except UnreadableImageError as error:
            self._leave_out({error.image: str(error.__cause__ or error)}, inputs)
            raise UnreadableImageError(
                f"{str(error).removesuffix('.')}, then run the same command again, which resumes.",
                error.image,
            ) from error
        self.progress.info(f"{work.name}: done in {time.monotonic() - started:.0f} s")

    def prepare_work(
        self,
        name: str,
        inputs: Mapping[str, str],
        fresh: bool,
        check_ready: Callable[[], None] = lambda: None,
    ) -> bool:
        """Get the folder of a stage ready; False if the stage is up to date. Results from
        other inputs are moved aside, as are all results if ``fresh``, unless
        ``check_ready`` raises an error.
        """
        folder = self.root / name
        # --fresh treats whatever is there as stale
        state = "stale" if fresh and folder.exists() else state_of(folder, inputs)
        if state == "done":
            self.progress.info(f"{name}: up to date, skipped")
            return False

        check_ready()
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
        save_config(self.root, self.configured)
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
        current = self._up_to_date()
        estimates = self._estimates(current) if timed else None
        for name in self.needed:
            state = "up to date: " if name in current else ""
            lines.append(f"{name:9} {state}{self.stage(name).summary()}")
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
        if data.path is not None and not user_path(data.path, "data.path").exists():
            line += "; that path does not exist yet"
        return line

    def _estimates(self, current: Sequence[str]) -> Estimates:
        """Estimate how long each stage takes that is not in ``current``, the stages that
        are up to date.
        """
        from hwnas.estimate.plan import Estimates
        from hwnas.networks import architecture

        self.progress.info("timing a few steps of every stage")
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
