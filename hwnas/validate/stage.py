"""The validation stage: a bundle, a table and a device in; a verdict out."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from hwnas.config import DataConfig, ValidateConfig
from hwnas.core.table import LatencyTable
from hwnas.devices.session import Bench, Session, spread_of
from hwnas.errors import DeviceError
from hwnas.export.bundle import BundleFile
from hwnas.export.target import target
from hwnas.validate.exported import Exported, load_bundle
from hwnas.validate.latency import Promise, measured, promise_of
from hwnas.validate.quality import Quality, quality_of, thresholds
from hwnas.verdict import FileVerdict, Verdict

OUTPUTS = ["verdict.json"]


def validate(bench: Bench, folder: Path, data: DataConfig, config: ValidateConfig, table: LatencyTable | None) -> Verdict:
    """Measure and test every file of the bundle in ``folder`` on a device. Raises DeviceError or DocumentError."""
    bundle, device = load_bundle(folder), bench.device
    runtimes = bench.connection.runtimes()
    files = tuple(file for file in bundle.files if file.runtime in runtimes)
    not_run = {file.name: f"{device.id} does not run {file.runtime}" for file in bundle.files if file.runtime not in runtimes}
    if not files:
        has = ", ".join(runtimes) or "no runtime"
        raise DeviceError(f"{device.id} has {has}, for which the bundle has no file: export one (export.formats), or install its runtime.")
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
        bundle_sha256=bundle.sha256,
        table=None if table is None else table.title,
        table_sha256=None if table is None else table.sha256,
        unpredicted=promise.unpredicted,
        drift=promise.drift(session),
        tolerances=config,
        images=quality.images,
        **quality.torch,
        **thresholds(bundle, config),
        files=verdicts,
        not_run=not_run,
        passed=all(file.quality_passed and False not in (file.latency_passed, file.parity_passed) for file in verdicts),
    )


def _judged(file: BundleFile, session: Session, promise: Promise, quality: Quality, config: ValidateConfig) -> FileVerdict:
    predicted = promise.predicted_ms(file)
    drift = promise.drift(session) or 1.0
    network, app = f"network-{file.name}", f"app-{file.name}"
    judged = session.ms(network if network in session.items else file.name)
    error = None if predicted is None else judged / drift / predicted - 1
    outputs, made = quality.parities[file.name], target(file.format)
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
        latency_passed=None if error is None else abs(error) <= config.latency_tolerance and abs(drift - 1) <= config.max_drift,
        parity=outputs,
        parity_passed=outputs.relative_error <= config.parity_tolerance if made.exact else None,
        **quality.files[file.name],
    )
