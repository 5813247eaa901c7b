"""Validation: are the exported files as fast and as accurate as promised, on the device?"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from hwnas.config import DataConfig, DeviceConfig, ValidateConfig
from hwnas.core.cost import latency_ms
from hwnas.core.table import LatencyTable
from hwnas.data.images import load_images, ordered_batches
from hwnas.devices.device import Connection
from hwnas.devices.profile import spread_of
from hwnas.document import Document, file_sha256
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import Bundle, BundleFile
from hwnas.progress import Progress

OUTPUTS = ["verdict.json"]


class FileVerdict(BaseModel):
    """One file on the device. Latency is judged where a table of the same runtime, dtype and threads predicts it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    runtime: str
    dtype: str
    measured_ms: float
    spread: float
    predicted_ms: float | None
    latency_error: float | None
    latency_passed: bool | None
    accuracy: float
    accuracy_loss: float
    accuracy_passed: bool


class Verdict(Document):
    """What validation found. ``passed`` only if every judged number is within its tolerance."""

    SCHEMA: ClassVar[str] = "hwnas.verdict"

    device: str
    threads: int
    table: str | None
    images: int
    torch_accuracy: float
    files: tuple[FileVerdict, ...]
    passed: bool


def load_bundle(folder: Path) -> Bundle:
    """The bundle in a folder, its files checked against their hashes."""
    bundle = Bundle.load(folder / "bundle.json")
    for file in bundle.files:
        path = folder / file.name
        if not path.is_file() or file_sha256(path) != file.sha256:
            raise DocumentError(f"{path} is missing or not the file that bundle.json describes: export again.")
    return bundle


def validate(
    folder: Path,
    connection: Connection,
    settings: DeviceConfig,
    config: ValidateConfig,
    table: LatencyTable | None,
    work: Path,
    progress: Progress,
) -> Verdict:
    """Measure and test every file of the bundle in ``folder`` on a device."""
    bundle = load_bundle(folder)
    images, labels = _test_images(bundle.data, config.images)
    accuracies = {}
    with progress.task("running the test images on the device", len(bundle.files)) as task:
        for file in bundle.files:
            logits = connection.predict(folder / file.name, images, work)
            accuracies[file.name] = float((logits.argmax(1) == labels).mean())
            task.advance(note=f"{file.name} {accuracies[file.name]:.2%}")
    rounds = _measure(bundle, folder, connection, settings, config.rounds, work, progress)
    with np.load(folder / "parity.npz", allow_pickle=False) as arrays:
        torch_accuracy = float((arrays["predictions"][: len(labels)] == labels).mean())
    verdicts = tuple(
        _judged(file, bundle, rounds[file.name], accuracies[file.name], torch_accuracy, table, settings, config) for file in bundle.files
    )
    passed = all(file.accuracy_passed and file.latency_passed is not False for file in verdicts)
    return Verdict(
        device=settings.name,
        threads=settings.threads,
        table=None if table is None else table.title,
        images=len(labels),
        torch_accuracy=torch_accuracy,
        files=verdicts,
        passed=passed,
    )


def _test_images(data: DataConfig, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    batches = list(ordered_batches(load_images(data, "test"), 256, limit))
    images_NHWC = np.concatenate([x.permute(0, 2, 3, 1).numpy() for x, _ in batches])
    return np.ascontiguousarray(images_NHWC), np.concatenate([y.numpy() for _, y in batches])


def _measure(
    bundle: Bundle, folder: Path, connection: Connection, settings: DeviceConfig, rounds: int, work: Path, progress: Progress
) -> dict[str, list[list[float]]]:
    """Runs per round of each file, files interleaved."""
    measured: dict[str, list[list[float]]] = {file.name: [] for file in bundle.files}
    ops = [op.key for op in bundle.architecture.ops()]
    with progress.task("measuring the exported files", rounds * len(measured)) as task:
        for number in range(rounds):
            for runtime in sorted({file.runtime for file in bundle.files}):
                items = [
                    {"id": file.name, "path": str((folder / file.name).resolve()), "round": number, "ops": ops}
                    for file in bundle.files
                    if file.runtime == runtime
                ]
                cores = list(settings.cores or connection.cores(settings.threads))
                plan = {"runtime": runtime, "threads": settings.threads, "cores": cores, "min_ms": 50, "min_runs": 10, "items": items}
                for row in connection.measure(plan, work):
                    if "error" in row:
                        raise DeviceError(f"{row['id']} does not run with {runtime}: {row['error']}")
                    if "id" in row:
                        measured[row["id"]].append(row["ms"])
                        task.advance()
    return measured


def _judged(
    file: BundleFile,
    bundle: Bundle,
    rounds: list[list[float]],
    accuracy: float,
    torch_accuracy: float,
    table: LatencyTable | None,
    settings: DeviceConfig,
    config: ValidateConfig,
) -> FileVerdict:
    measured = float(np.median([np.median(runs) for runs in rounds]))
    applies = table is not None and (table.header.runtime, table.header.dtype, table.header.threads) == (
        file.runtime,
        file.dtype,
        settings.threads,
    )
    predicted = latency_ms(bundle.architecture, table) if applies and table is not None else None
    error = None if predicted is None else measured / predicted - 1
    tolerance = config.int8_accuracy_tolerance if file.dtype == "int8" else config.accuracy_tolerance
    return FileVerdict(
        name=file.name,
        runtime=file.runtime,
        dtype=file.dtype,
        measured_ms=measured,
        spread=spread_of(rounds),
        predicted_ms=predicted,
        latency_error=error,
        latency_passed=None if error is None else abs(error) <= config.latency_tolerance,
        accuracy=accuracy,
        accuracy_loss=torch_accuracy - accuracy,
        accuracy_passed=torch_accuracy - accuracy <= tolerance,
    )


def lines(verdict: Verdict) -> list[str]:
    """A verdict as lines for a terminal."""
    out = []
    for file in verdict.files:
        latency = f"{file.measured_ms:.4g} ms"
        if file.predicted_ms is not None and file.latency_error is not None:
            mark = "ok" if file.latency_passed else "OUT OF TOLERANCE"
            latency += f", {file.latency_error:+.1%} of the {file.predicted_ms:.4g} ms predicted ({mark})"
        mark = "ok" if file.accuracy_passed else "OUT OF TOLERANCE"
        out.append(f"{file.name}: {latency}; top-1 {file.accuracy:.2%} against {verdict.torch_accuracy:.2%} in PyTorch ({mark})")
    return [*out, f"verdict: {'passed' if verdict.passed else 'FAILED'}"]
