"""The stages in order, what each reads, and when one may be skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas import __version__, preflight
from hwnas.config import DataConfig, Experiment, SearchConfig
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.cost import missing_ops
from hwnas.core.describe import counted, describe_networks
from hwnas.core.limits import LatencyLimit
from hwnas.core.published import named
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.core.spaces import DARTS_SPACES, SPACES, is_document, load_space
from hwnas.core.table import LatencyTable
from hwnas.data import DATASETS, fingerprint
from hwnas.data.inspection import with_classes
from hwnas.devices.device import ADDRESSES, HOST, connect, find_device
from hwnas.document import content_sha256, file_sha256
from hwnas.errors import ConfigError, HwnasError, SpaceError, UserError
from hwnas.networks import architecture, named_networks
from hwnas.progress import Progress
from hwnas.runs import StageContext, changed_inputs, locked, prepare, save_config, set_aside, stage, state_of
from hwnas.search import FINDERS, STRATEGIES

if TYPE_CHECKING:  # the estimates import all stages
    from hwnas.devices.session import Bench
    from hwnas.estimate.plan import Estimates

STAGES = ("profile", "search", "train", "export", "validate", "report")


@dataclass(frozen=True)
class Stage:
    """A stage of one experiment: its output files, its inputs' hashes, and the function that does it.

    ``inputs`` also refuses what the stage cannot work with, before anything earlier is set aside.
    """

    name: str
    outputs: list[str]
    inputs: Callable[[], dict[str, str]]
    run: Callable[[StageContext], Any]


def experiment_space(experiment: Experiment) -> SearchSpace:
    """The space of an experiment: built-in ones take classes, channels and resolution from the data."""
    name, data = experiment.space.name, experiment.data
    overrides: dict[str, Any] = {}
    if name in SPACES:
        overrides = {"classes": data.classes, "resolution": data.resolution, "in_channels": data.channels}
    detects = experiment.task == "detect"
    overrides |= {"act": experiment.space.act} if experiment.space.act else {}
    overrides |= {"width": experiment.space.width} if experiment.space.width != 1.0 else {}
    if experiment.space.layers is not None:
        if name not in DARTS_SPACES:
            known = ", ".join(DARTS_SPACES)
            raise ConfigError(
                f"space.layers = {experiment.space.layers} is for {known}, not for {name!r}: remove it; a document has its number of cells."
            )
        overrides["layers"] = experiment.space.layers
    space: SearchSpace = load_space(name, **overrides)
    if (space.classes, space.resolution, space.in_channels) != (data.classes, data.resolution, data.channels):
        raise ConfigError(
            f"space {name!r} has {space.classes} classes, {space.resolution} px and {space.in_channels} channels, but the data "
            f"{data.classes}, {data.resolution} and {data.channels}: make them agree."
        )
    space = space.restrict(experiment.space.restrict) if experiment.space.restrict else space
    if space.detector is not None and not detects:
        raise ConfigError(f"space {name!r} is one of detectors: set task = 'detect' and name data with boxes, or search another.")
    return space if not detects or space.detector is not None else _with_detector(space, experiment)


def _counted(experiment: Experiment) -> DataConfig:
    """The data with ``classes`` where they are not given: those of a space document, whose hash they are part of, else those there are."""
    if "classes" in experiment.data.model_fields_set or not is_document(experiment.space.name):
        return with_classes(experiment.data)
    return experiment.data.model_copy(update={"classes": load_space(experiment.space.name).classes})


def _with_detector(space: SearchSpace, experiment: Experiment) -> SearchSpace:
    """The space of detectors. Where an architecture is named, one without them is good enough for what is left to do."""
    if not isinstance(space, MacroSpace):
        raise ConfigError(f"space {space.name!r} is one of cells, and detectors are searched on blocks in a row: choose another space.")
    try:
        return space.with_detector(extras=experiment.detector.extras, scores=experiment.detector.scores)
    except SpaceError:
        if experiment.train.arch is None:
            raise
        return space


def check_names(experiment: Experiment, space: SearchSpace) -> None:
    """Look up everything the experiment names, so that a misspelling is found before any work is done."""
    find_device(experiment.device.name)
    DATASETS.get(experiment.data.name)
    for plugin, known in ((experiment.search.strategy, STRATEGIES), (experiment.search.finder, FINDERS)):
        if plugin is not None:
            plugin.options(known.get(plugin.name).Config)
    named_networks(experiment, space)
    name = experiment.train.arch
    if name is not None and Path(name).suffix != ".json":
        data, width = experiment.data, experiment.space.width
        named(name, space, resolution=data.resolution, classes=data.classes, in_channels=data.channels, width=width)


def limit_hashes(config: SearchConfig) -> dict[str, str]:
    """The tables that ``search.limits`` name, as inputs of a stage."""
    return {
        f"search.limits[{i}].table": LatencyTable.load(Path(limit.table).expanduser()).sha256
        for i, limit in enumerate(config.limits)
        if isinstance(limit, LatencyLimit)
    }


class Pipeline:
    """An experiment and its run folder.

    Example:
        >>> Pipeline(load_experiment("configs/quickstart.toml"), Path("runs/quickstart"), Progress()).run()   # doctest: +SKIP
    """

    def __init__(self, experiment: Experiment, root: Path, progress: Progress) -> None:
        experiment = experiment.model_copy(update={"data": _counted(experiment)})
        self.experiment, self.root, self.progress = experiment, root, progress
        self.space = experiment_space(experiment)
        check_names(experiment, self.space)

    @property
    def table_path(self) -> Path:
        """The table that prices the search: the configured one, else the profiled one."""
        table = self.experiment.search.table
        return Path(table).expanduser() if table is not None else self.root / "profile" / "table.json"

    @property
    def needed(self) -> tuple[str, ...]:
        """The stages this experiment goes through: no profiling with a table, neither that nor a search with an architecture."""
        skipped = {"profile"} if self.experiment.search.table is not None else set()
        skipped |= {"profile", "search"} if self.experiment.train.arch is not None else set()
        return tuple(name for name in STAGES if name not in skipped)

    def stage(self, name: str) -> Stage:
        """A stage by name. Raises SpaceError where a detector is searched, and the space carries none."""
        detects = self.experiment.task == "detect" and name in ("profile", "search")
        if detects and isinstance(self.space, MacroSpace) and self.space.detector is None:
            self.space.with_detector()  # says why it carries none
        stages: dict[str, Callable[[], Stage]] = {
            "profile": self._profile,
            "search": self._search,
            "train": self._train,
            "export": self._export,
            "validate": self._validate,
            "report": self._report,
        }
        return stages[name]()

    def run(self, *, fresh: bool = False) -> None:
        """All needed stages, skipping what is current. What the user forgot is asked for before the first one."""
        preflight.check(self.experiment, self.space, self.needed)
        for name in self.needed:
            self._run_stage(name, fresh)

    def run_stage(self, name: str, *, fresh: bool = False) -> None:
        """One stage: skipped where it is current, resumed where it was interrupted, started anew where its inputs changed.

        What the training after a search could not work with is refused before the search.
        """
        preflight.check(self.experiment, self.space, {"search": ("search", "train"), "train": ("train",)}.get(name, ()))
        self._run_stage(name, fresh)

    def _run_stage(self, name: str, fresh: bool) -> None:
        from hwnas.engine import flush_denormals

        flush_denormals()
        prepare(self.root)
        with locked(self.root):
            self.perform(self.stage(name), fresh)

    def perform(self, current: Stage, fresh: bool) -> None:
        """A stage of a locked run folder, unless it is current."""
        inputs = self._inputs(current)
        if not self.begins(current.name, inputs, fresh):
            return
        folder, started = self.root / current.name, time.monotonic()
        with stage(folder, current.name, inputs, current.outputs):
            current.run(StageContext(self.experiment, self.root, folder, self.progress))
        self.progress.say(f"{current.name}: done in {time.monotonic() - started:.0f} s")

    def begins(self, name: str, inputs: Mapping[str, str], fresh: bool) -> bool:
        """Whether a stage has something to do. Its folder is then there, and what it held of other inputs is set aside."""
        folder = self.root / name
        state = "stale" if fresh and folder.exists() else state_of(folder, inputs)
        if state == "done":
            self.progress.say(f"{name}: current, skipped")
            return False
        if state == "stale":
            if not fresh:
                self.progress.detail(f"{name}: changed since: {', '.join(changed_inputs(folder, inputs)) or 'its output files'}")
            why = "starting anew" if fresh else "inputs changed"
            self.progress.say(f"{name}: {why}; the earlier results move to {set_aside(folder).name}")
        elif state == "resume":
            self.progress.say(f"{name}: resumes")
        save_config(self.root, self.experiment)  # not earlier: a refused configuration must not replace that of the results
        folder.mkdir(exist_ok=True)
        return True

    def plan(self, *, timed: bool = False) -> str:
        """What ``run`` would do, in words. Nothing is written into the run folder.

        Read are the configuration and what it names beside the images: a space, a device, networks. The images or their labels were read
        before, where ``data.classes`` was not given and had to be counted.
        With ``timed``, a few steps of every stage are done in a temporary folder, and each stage is said to take how long; for that, the
        images, the table and what the run folder already holds are read, too.
        """
        experiment, space = self.experiment, self.space
        device, data = experiment.device, experiment.data
        if experiment.search.target_ms is not None:
            target = f"at {experiment.search.target_ms:g} ms"
        elif experiment.search.target_range is not None:
            target = f"at {experiment.search.target_range:.0%} of the way from the fastest to the slowest"
        else:
            target = "without a target yet: set search.target_ms"
        arch = experiment.train.arch or "the searched architecture"
        trains = experiment.search.weights is None
        searcher = f"{experiment.search.strategy.name} for {experiment.search.epochs:g} epochs" if trains else "a trained super-net"
        texts = {
            "profile": f"measure {self._measured()} of space {space.name} on {device.name} ({device.runtime}, "
            f"{device.dtype}, {device.threads} thread{'s' if device.threads > 1 else ''}) in {experiment.profile.rounds} rounds",
            "search": f"{searcher} over {counted(space.architectures)} architectures, {target}",
            "train": f"{arch} for {experiment.train.epochs:g} epochs, weights from {experiment.train.backbone or experiment.train.weights}",
            "export": ", ".join(experiment.export_formats),
            "validate": f"latency within {experiment.validation.latency_tolerance:.0%} of predicted, "
            + (
                f"int8 AP within {experiment.validation.int8_ap_tolerance:.1%} of PyTorch"
                if experiment.task == "detect"
                else f"int8 top-1 within {experiment.validation.int8_accuracy_tolerance:.1%} of PyTorch"
            ),
            "report": str(self.root / "report" / "report.html"),
        }
        where = f" in {data.path}" if data.path else ""
        classes = f"{data.classes} class{'es' if data.classes != 1 else ''}"
        source = f"data: {data.name}{where}, {classes}, {data.channels} x {data.resolution} px"
        lines = [f"experiment {experiment.name} in {self.root}", source]
        if not timed:
            return "\n".join([*lines, *(f"{name:9} {texts[name]}" for name in self.needed)])
        found = self._estimates()
        for name in self.needed:
            lines.append(f"{name:9} {texts[name]}")
            lines += [f"{'':9} {found.stages[name]}"] if name in found.stages else []
        return "\n".join([*lines, f"{'in all':9} {found.summary}"])

    def _estimates(self) -> Estimates:
        """How long the stages take that are not up to date."""
        from hwnas.estimate.plan import Estimates

        self.progress.say("timing a few steps of every stage")
        current = self._up_to_date()
        profiled = self.experiment.search.table is not None or "profile" in current
        searched = self.root / "search" / "arch.json"
        known = "search" in current or self.experiment.train.arch is not None
        return Estimates(
            self.experiment,
            self.space,
            self.needed,
            current=current,
            table=LatencyTable.load(self.table_path) if profiled and self.table_path.is_file() else None,
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

    def _inputs(self, of: Stage) -> dict[str, str]:
        return {"hwnas": content_sha256(__version__), **of.inputs()}

    def _measured(self) -> str:
        """What would be profiled. Spaces without a price by choice, which are never profiled, are not asked for their ops."""
        from hwnas.devices.profile import planned_ops

        profile = self.experiment.profile
        if profile.mode != "ops" or "profile" not in self.needed:
            return f"{profile.sampled + len(named_networks(self.experiment, self.space))} networks"
        ops = planned_ops(self.space, named_networks(self.experiment, self.space))
        return f"{len(ops)} ops and {profile.fit_networks + profile.test_networks} networks"

    def _config(self, *sections: str) -> dict[str, str]:
        content = self.experiment.model_dump(mode="json", by_alias=True)
        return {section: content_sha256(content[section]) for section in sections}

    def _data(self) -> dict[str, str]:
        data = self.experiment.data
        found = {**self._config("data"), "images": fingerprint(data)}
        if data.name == "folder" and data.augment != "imagenet":
            # These were evaluated on a centre crop, whatever they were trained on: what was found out that way does not stand.
            found["geometry"] = content_sha256(data.resize_mode)
        return found

    def _file(self, path: Path, made_by: str) -> dict[str, str]:
        if path == self.table_path and self.experiment.search.table is not None:
            preflight.configured_table(self.experiment.search.table)
        if not path.is_file():
            raise UserError(f"{path} does not exist yet: run 'hwnas {made_by}' with the same --out first, or 'hwnas run'.")
        return {path.name: file_sha256(path)}

    def _bench(self, ctx: StageContext) -> Bench:
        from hwnas.devices.session import Bench
        from hwnas.export.timing import timing_file

        device = find_device(self.experiment.device.name)
        return Bench(device, connect(device), self.experiment.device, timing_file, ctx.folder, ctx.progress)

    def _profile(self) -> Stage:
        from hwnas.devices.profile import profile

        def run(ctx: StageContext) -> None:
            bench = self._bench(ctx)
            table = profile(bench, self.space, self.experiment.profile, self.experiment.seed, networks)
            table.save(ctx.folder / "table.json")
            held_out = table.calibration.held_out if table.calibration else None
            if "more_networks" in table.provenance:
                ctx.progress.say(f"table of {len(table.entries)} ops fitted to whole networks: {table.provenance['more_networks']}")
            elif held_out is not None:
                ctx.progress.say(
                    f"table of {len(table.entries)} ops; {held_out.networks} held-out networks: mean error {held_out.mape:.1%}, "
                    f"largest {held_out.max_error:.1%} (uncalibrated sum: {held_out.raw_mape:.1%})"
                )
            for line in describe_networks(networks, table):
                ctx.progress.say(line)

        networks = named_networks(self.experiment, self.space)
        device = find_device(self.experiment.device.name)
        inputs = {f"profile.networks[{i}]": arch.sha256 for i, arch in enumerate(networks)}
        inputs |= {"space.json": self.space.sha256, "device.json": device.sha256, **self._config("device", "profile", "seed")}
        for i, prior in enumerate(self.experiment.profile.prior if self.experiment.profile.mode == "networks" else ()):
            table = LatencyTable.load(Path(prior).expanduser())
            inputs[f"profile.prior[{i}]"] = table.sha256
            missing = missing_ops([op for arch in networks for op in arch.ops()], table)
            if missing:
                raise ConfigError(
                    f"profile.prior {prior!r} lacks {missing[0]} of profile.networks: profile those networks there, too, "
                    "or remove one of the two keys."
                )
        if self.experiment.device.cores is None and device.connection not in ADDRESSES:  # those that may be out of reach are asked later
            connect(device).cores(self.experiment.device.threads)  # refuses more threads than there are cores
        return Stage("profile", ["table.json"], lambda: inputs, run)

    def _search(self) -> Stage:
        from hwnas.search import stage as search

        def inputs() -> dict[str, str]:
            config = self.experiment.search
            found = self._file(self.table_path, "profile") | limit_hashes(config)
            found |= {"super-net": file_sha256(search.trained_supernet(config.weights))} if config.weights is not None else {}
            if config.backbone is not None:
                found["backbone"] = file_sha256(search.trained_supernet(config.backbone, "search.backbone"))
            found |= self._config("detector") if self.experiment.task == "detect" else {}
            search.search_context(self.experiment, self.space, LatencyTable.load(self.table_path))
            return {"space.json": self.space.sha256, **found, **self._data(), **self._config("search", "seed")}

        return Stage(
            "search",
            search.outputs(self.experiment.search),
            inputs,
            lambda ctx: search.run(ctx, self.space, LatencyTable.load(self.table_path)),
        )

    def _train(self) -> Stage:
        from hwnas.nn.network import load_network
        from hwnas.train import stage as train

        searched, inherited = self.root / "search" / "arch.json", self.root / "search" / "supernet.safetensors"

        def inputs() -> dict[str, str]:
            found = {} if self.experiment.train.arch else self._file(searched, "search")
            if self.experiment.train.weights == "supernet":
                found |= self._file(inherited, "search")
            arch = architecture(self.experiment, self.space, searched)
            if self.experiment.train.weights == "supernet" and arch != Architecture.load(searched):
                raise ConfigError("train.weights = 'supernet' fits the searched architecture alone: set train.weights = 'scratch'.")
            if self.experiment.train.weights == "supernet" and load_network(inherited).arch.identity != arch.identity:
                raise ConfigError(
                    "train.weights = 'supernet' needs a super-net of full size, and this one was a proxy: set train.weights = 'scratch'."
                )
            if self.experiment.train.backbone is not None:
                found |= {"backbone": file_sha256(train.trained_backbone(self.experiment.train.backbone, arch))}
            if self.experiment.task == "detect":
                found |= self._config("detector")
            return {"architecture": arch.sha256, **found, **self._data(), **self._config("train", "seed")}

        outputs = train.outputs(self.experiment)
        return Stage("train", outputs, inputs, lambda ctx: train.run(ctx, architecture(self.experiment, self.space, searched)))

    def _export(self) -> Stage:
        from hwnas.export import stage as export

        def inputs() -> dict[str, str]:
            sections = ("export", "detector") if self.experiment.task == "detect" else ("export",)
            return {**self._file(self.root / "train" / "model.safetensors", "train"), **self._data(), **self._config(*sections)}

        formats = self.experiment.export_formats
        return Stage("export", export.outputs(formats), inputs, lambda ctx: export.run(ctx, connect(HOST).predict))

    def _cautions(self) -> tuple[Caution, ...]:
        """What the search and the training of the exported network say against themselves."""
        from hwnas.export.bundle import Bundle
        from hwnas.search.result import SearchResult
        from hwnas.train.result import TrainResult

        arch = Bundle.load(self.root / "export" / "bundle.json").architecture
        searched, found = self.root / "search" / "arch.json", self.root / "search" / "search.json"
        trained = self.root / "train" / "train.json"
        cautions: list[Caution] = []
        if searched.is_file() and found.is_file() and Architecture.load(searched) == arch:
            learning = SearchResult.load(found).learning
            cautions += learning.cautions if learning is not None else ()
        if trained.is_file():
            result = TrainResult.load(trained)
            if result.architecture_sha256 == arch.sha256 and result.caution is not None:
                cautions.append(result.caution)
        return tuple(cautions)

    def _validate(self) -> Stage:
        from hwnas.validate.stage import OUTPUTS, validate
        from hwnas.verdict import lines

        def inputs() -> dict[str, str]:
            table = self._file(self.table_path, "profile") if self.table_path.exists() else {}
            bundle = self._file(self.root / "export" / "bundle.json", "export")
            cautions = [caution.model_dump() for caution in self._cautions()]
            return {
                **bundle,
                **table,
                **self._data(),
                **self._config("validate", "device"),
                **({"warnings": content_sha256(cautions)} if cautions else {}),  # a verdict without them stays current
            }

        def run(ctx: StageContext) -> None:
            table = LatencyTable.load(self.table_path) if self.table_path.exists() else None
            bundle = self.root / "export"
            verdict = validate(self._bench(ctx), bundle, self.experiment.data, self.experiment.validation, table)
            verdict = verdict.model_copy(update={"warnings": self._cautions()})
            verdict.save(ctx.folder / "verdict.json")
            for line in lines(verdict):
                ctx.progress.say(line)

        return Stage("validate", OUTPUTS, inputs, run)

    def _report(self) -> Stage:
        from hwnas.report import stage as report

        def inputs() -> dict[str, str]:
            found = [self.root / name / file for name, file in report.SOURCES]
            hashes = {f"{path.parent.name}/{path.name}": file_sha256(path) for path in [*found, self.table_path] if path.is_file()}
            return {**hashes, "config": content_sha256(self.experiment.model_dump(mode="json", by_alias=True))}

        return Stage("report", ["report.html"], inputs, lambda ctx: report.run(ctx, self.space, self.table_path))
