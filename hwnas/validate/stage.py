"""The validation stage: a bundle, a table and a device in; a verdict out."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from hwnas.config import DataConfig, ValidateConfig
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.table import LatencyTable
from hwnas.devices.session import Bench, Session, spread_of
from hwnas.document import content_sha256, file_sha256
from hwnas.errors import DeviceError
from hwnas.export.bundle import Bundle, BundleFile
from hwnas.export.target import target
from hwnas.export.timing import bench_of
from hwnas.runs import StageContext
from hwnas.search.result import SearchResult
from hwnas.stages import Stage
from hwnas.task import task_of
from hwnas.train.result import TrainResult
from hwnas.validate.exported import Exported, load_bundle
from hwnas.validate.latency import Promise, measured, promise_of
from hwnas.validate.quality import Quality, app_score, quality_of
from hwnas.verdict import FileVerdict, Verdict, lines


class Validate(Stage):
    """Runs the exported files on the device, and judges them."""

    name = "validate"
    result = "verdict.json"
    reported = ("verdict.json",)
    estimate = "hwnas.estimate.measuring:of_validation"
    outputs = ["verdict.json"]

    @property
    def bundle_folder(self) -> Path:
        """What is validated."""
        return self.at.root / "export"

    def inputs(self) -> dict[str, str]:
        """The bundle, the table if there is one, the data, the settings, and what
        earlier stages say against themselves.
        """
        at = self.at
        table = at.hash_of_table() if at.table_path.exists() else {}
        bundle = at.hash_of(self.bundle_folder / "bundle.json", "export")
        found = {
            **bundle,
            **table,
            **at.hashes_of_data(),
            **at.hashes_of_config("validate", "device"),
        }
        cautions = [caution.model_dump() for caution in self.cautions()]
        if cautions:  # a verdict without them stays current
            found["warnings"] = content_sha256(cautions)
        return found

    def cautions(self) -> tuple[Caution, ...]:
        """What the search and the training of the exported network say against themselves."""
        arch = Bundle.load(self.bundle_folder / "bundle.json").architecture
        searched, search = (
            self.at.path("search", "arch.json"),
            self.at.path("search", "search.json"),
        )
        train = self.at.path("train", "train.json")
        found: list[Caution] = []
        if searched.is_file() and search.is_file() and Architecture.load(searched) == arch:
            learning = SearchResult.load(search).learning
            found += learning.cautions if learning is not None else ()
        if train.is_file():
            result = TrainResult.load(train)
            if result.architecture_sha256 == arch.sha256 and result.caution is not None:
                found.append(result.caution)
        return tuple(found)

    def summary(self) -> str:
        """What is allowed."""
        config, task = self.at.experiment.validation, task_of(self.at.experiment)
        lost = f"{task.words.metric} within {config.tolerance(task.metric, 'int8'):.1%}"
        latency = f"latency within {config.latency_tolerance:.0%} of predicted"
        search = self.at.experiment.search
        profiled = search.by_table and self.at.experiment.train.arch is None
        if search.table is None and not profiled and not self.at.table_path.exists():
            latency = "latency measured, and not judged, as no table predicts it"
        return f"{latency}, int8 {lost} of PyTorch"

    def run(self, ctx: StageContext) -> None:
        """Write ``verdict.json``."""
        experiment = self.at.experiment
        table = self.at.table() if self.at.table_path.exists() else None
        bench = bench_of(experiment.device, ctx.folder, ctx.progress)
        verdict = validate(bench, self.bundle_folder, experiment.data, experiment.validation, table)
        verdict = verdict.model_copy(update={"warnings": self.cautions()})
        verdict.save(ctx.folder / "verdict.json")
        for line in lines(verdict):
            ctx.progress.info(line)


def validate(
    bench: Bench, folder: Path, data: DataConfig, config: ValidateConfig, table: LatencyTable | None
) -> Verdict:
    """Measure and test every file of the bundle in ``folder`` on a device. Raises
    DeviceError or DocumentError.
    """
    bundle, device = load_bundle(folder), bench.device
    runtimes = bench.connection.runtimes()
    files = tuple(file for file in bundle.files if file.runtime in runtimes)
    not_run = {
        file.name: f"{device.id} does not run {file.runtime}"
        for file in bundle.files
        if file.runtime not in runtimes
    }
    if not files:
        has = ", ".join(runtimes) or "no runtime"
        raise DeviceError(
            f"{device.id} has {has}, for which the bundle has no file: export one (export.formats),"
            " or install its runtime."
        )
    exported = Exported(bundle, folder, files)
    quality = quality_of(exported, bench, data, config)
    promise = promise_of(bundle, bench, table)
    session = measured(exported, bench, promise, config)
    verdicts = tuple(_judged(file, session, promise, quality, config) for file in files)
    header = next(iter(session.headers.values()))
    return Verdict(
        device=device.id,
        cpu=header.cpu,
        cores=session.cores,
        governor=header.governor,
        threads=bench.settings.threads,
        date=date.today().isoformat(),
        bundle_sha256=file_sha256(folder / "bundle.json"),
        table=None if table is None else table.title,
        table_sha256=None if table is None else table.sha256,
        unpredicted=promise.unpredicted,
        drift=promise.drift(session),
        tolerances=config,
        images=quality.images,
        task=bundle.task,
        metric=bundle.metric,
        metrics=quality.torch,
        min_score=bundle.settings.min_score(),
        app_score=app_score(bundle, config),
        files=verdicts,
        not_run=not_run,
        passed=all(file.passed for file in verdicts),
    )


def _judged(
    file: BundleFile, session: Session, promise: Promise, quality: Quality, config: ValidateConfig
) -> FileVerdict:
    predicted = promise.predicted_ms(file)
    drift = promise.drift(session) or 1.0
    network, app = f"network-{file.name}", f"app-{file.name}"
    judged = session.ms(network if network in session.items else file.name)
    error = None if predicted is None else judged / drift / predicted - 1
    judgement, made = quality.files[file.name], target(file.format)
    timed_on = "test image" if file.name in session.fed else "noise"
    return FileVerdict(
        name=file.name,
        runtime=file.runtime,
        runtime_version=session.header(file.runtime).runtime_version,
        dtype=file.dtype,
        measured_ms=session.ms(file.name),
        network_ms=judged if network in session.items else None,
        app_ms=session.ms(app) if app in session.items else None,
        timed_on=timed_on if made.graph != "decoded" else None,
        spread=spread_of(session.rounds(file.name)),
        predicted_ms=predicted,
        latency_error=error,
        latency_passed=(
            None
            if error is None
            else abs(error) <= config.latency_tolerance and abs(drift - 1) <= config.max_drift
        ),
        parity=judgement.parity,
        parity_passed=(
            judgement.parity.relative_error <= config.parity_tolerance if made.exact else None
        ),
        metrics=judgement.metrics,
        loss=judgement.loss,
        quality_passed=judgement.loss <= config.tolerance(promise.bundle.metric, file.dtype),
        **judgement.timings_ms,
    )
