"""The work of the validation stage: measures the files of a bundle on a device, and
checks each against PyTorch and the table's prediction.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

from hwnas.config import DataConfig, ValidateConfig
from hwnas.core.table import LatencyTable
from hwnas.devices.device import Explaining
from hwnas.devices.session import Bench, Session, spread_of
from hwnas.document import file_sha256
from hwnas.errors import DeviceError
from hwnas.export.bundle import BundleFile
from hwnas.export.target import target
from hwnas.validate.exported import Exported, load_bundle
from hwnas.validate.latency import LatencyPrediction, measure_files, prediction_of
from hwnas.validate.quality import BundleQuality, app_score, quality_of
from hwnas.verdict import FileVerdict, Verdict


def validate(
    bench: Bench, folder: Path, data: DataConfig, config: ValidateConfig, table: LatencyTable | None
) -> Verdict:
    """Measure and check every file of the bundle in ``folder`` on a device. Raises
    DeviceError or DocumentError.
    """
    bundle = load_bundle(folder)
    device = bench.device
    runtimes = bench.connection.runtimes()
    files = tuple(file for file in bundle.files if file.runtime in runtimes)
    if not files:
        known = ", ".join(runtimes) or "no runtime"
        raise DeviceError(
            f"{device.id} runs {known}, but the bundle has no file for it: add one to"
            " export.formats, or install a runtime that the bundle has a file for."
        )
    not_run = {}
    missing = bench.connection.missing() if isinstance(bench.connection, Explaining) else {}
    for file in bundle.files:
        if file.runtime not in runtimes:
            reason = f" ({missing[file.runtime]})" if file.runtime in missing else ""
            not_run[file.name] = f"{device.id} does not run {file.runtime}{reason}"

    exported = Exported(bundle, folder, files)
    quality = quality_of(exported, bench, data, config)
    prediction = prediction_of(bundle, bench, table)
    session = measure_files(exported, bench, prediction, config)
    verdicts = tuple(_file_verdict(file, session, prediction, quality, config) for file in files)
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
        unpredicted=prediction.unpredicted,
        drift=prediction.drift(session),
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


def _file_verdict(
    file: BundleFile,
    session: Session,
    prediction: LatencyPrediction,
    quality: BundleQuality,
    config: ValidateConfig,
) -> FileVerdict:
    """Compare what was measured of one file with what was expected of it."""
    file_target = target(file.format)
    file_quality = quality.files[file.name]
    measured_ms = session.ms(file.name)
    network_ms = _ms_of(f"network-{file.name}", session)

    predicted_ms = prediction.predicted_ms(file)
    drift = prediction.drift(session) or 1.0
    latency_error = None
    latency_passed = None
    if predicted_ms is not None:
        # the table predicts the network, not what else is in the file
        comparable_ms = network_ms if network_ms is not None else measured_ms
        latency_error = comparable_ms / drift / predicted_ms - 1
        is_same_device = abs(drift - 1) <= config.max_drift
        latency_passed = abs(latency_error) <= config.latency_tolerance and is_same_device

    # int8 rounding and NMS change outputs by design: only exact files have to match
    parity_passed = None
    if file_target.exact:
        parity_passed = file_quality.parity.relative_error <= config.parity_tolerance

    timed_on = None
    if file_target.graph != "decoded":
        timed_on = "test image" if file.name in session.fed else "noise"
    return FileVerdict(
        name=file.name,
        runtime=file.runtime,
        runtime_version=session.header(file.runtime).runtime_version,
        dtype=file.dtype,
        measured_ms=measured_ms,
        network_ms=network_ms,
        app_ms=_ms_of(f"app-{file.name}", session),
        timed_on=timed_on,
        spread=spread_of(session.rounds(file.name)),
        predicted_ms=predicted_ms,
        latency_error=latency_error,
        latency_passed=latency_passed,
        parity=file_quality.parity,
        parity_passed=parity_passed,
        metrics=file_quality.metrics,
        loss=file_quality.drop,
        quality_passed=file_quality.drop <= config.tolerance(prediction.bundle.metric, file.dtype),
        **file_quality.timings_ms,
    )


def _ms_of(item_name: str, session: Session) -> float | None:
    """The latency of a timed item; None if the session has no such item."""
    return session.ms(item_name) if item_name in session.items else None
