"""Validation: are the exported files as fast and as accurate as promised, on the device?

A prediction holds for the device as it was when it was profiled. Clocks, temperature and neighbours change, so validation
measures the network's own blocks again, in the same rounds as the files: their sum, against the table's, is the *drift* of the
device. The prediction is judged at the profiled speed (measured time divided by the drift); the plain measured time and the
drift stand beside it. A drift above the tolerance is said, one above ``validate.max_drift`` fails: that is not the device that was
profiled. And a table of another device never predicts anything here.

Outputs are compared on the device, too: each file gets the bundle's real images there, and its logits are held against PyTorch's. A
file whose runtime the device lacks is left out, and the verdict says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hwnas.config import DataConfig, DeviceConfig, ValidateConfig
from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms, missing_ops
from hwnas.core.op import Op
from hwnas.core.table import LatencyTable
from hwnas.data.images import evaluation_batches, load_images
from hwnas.devices.device import Connection, Device
from hwnas.devices.profile import spread_of
from hwnas.document import Document, file_sha256
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import Bundle, BundleFile, Parity, parity
from hwnas.progress import Progress

OUTPUTS = ["verdict.json"]
Build = Callable[[Sequence[Op], str, str], Path]
Rounds = list[list[float]]
IMAGES_AT_ONCE = 512


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileVerdict(_Part):
    """One file on the device. Latency is judged where a table of the same runtime, dtype and threads predicts it."""

    name: str
    runtime: str
    runtime_version: str
    dtype: str
    measured_ms: float = Field(description="median over rounds of the median over runs")
    spread: float = Field(description="interquartile range of the rounds' medians / median")
    predicted_ms: float | None
    latency_error: float | None = Field(description="measured_ms / drift against predicted_ms, as a fraction")
    latency_passed: bool | None
    parity: Parity | None = Field(None, description="outputs on this device against PyTorch's, on the bundle's images")
    parity_passed: bool | None = Field(description="for float files; none for int8, which is judged by accuracy alone")
    accuracy: float
    accuracy_loss: float
    accuracy_passed: bool


class Verdict(Document):
    """What validation found. ``passed`` only if every judged number is within its tolerance."""

    SCHEMA: ClassVar[str] = "hwnas.verdict"

    device: str
    cpu: str
    cores: tuple[int, ...]
    governor: str
    threads: int
    date: str
    bundle_sha256: str
    table: str | None
    table_sha256: str | None
    unpredicted: str | None = Field(description="why the table predicts nothing here; none where it does")
    drift: float | None = Field(description="time of the network's blocks now / in the table; none without a table that applies")
    tolerances: ValidateConfig
    images: int
    torch_accuracy: float
    files: tuple[FileVerdict, ...]
    not_run: dict[str, str] = Field({}, description="files of the bundle that were left out, and why")
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
    device: Device,
    connection: Connection,
    settings: DeviceConfig,
    data: DataConfig,
    config: ValidateConfig,
    table: LatencyTable | None,
    build: Build,
    work: Path,
    progress: Progress,
) -> Verdict:
    """Measure and test every file of the bundle in ``folder`` on a device.

    ``build(ops, runtime, dtype)`` gives the file of a chain of ops, for measuring the drift.
    """
    bundle = load_bundle(folder)
    runtimes = connection.runtimes()
    files = tuple(file for file in bundle.files if file.runtime in runtimes)
    not_run = {file.name: f"{device.id} does not run {file.runtime}" for file in bundle.files if file.runtime not in runtimes}
    if not files:
        has = ", ".join(runtimes) or "no runtime"
        raise DeviceError(f"{device.id} has {has}, for which the bundle has no file: export one (export.formats), or install its runtime.")
    parities = _parities(files, folder, connection, work)
    accuracies, torch_accuracy, images = _accuracies(bundle, files, folder, data, config.images, connection, work, progress)
    measurement = _Measurement(bundle, files, folder, device, connection, settings, table, build)
    measurement.run(config, work, progress)
    drift = measurement.drift()
    verdicts = tuple(
        _judged(file, measurement, drift, parities[file.name], accuracies[file.name], torch_accuracy, config) for file in files
    )
    header = next(iter(measurement.headers.values()))
    return Verdict(
        device=device.id,
        cpu=str(header["cpu"]),
        cores=measurement.cores,
        governor=str(header["governor"]),
        threads=settings.threads,
        date=date.today().isoformat(),
        bundle_sha256=bundle.sha256,
        table=None if table is None else table.title,
        table_sha256=None if table is None else table.sha256,
        unpredicted=measurement.unpredicted,
        drift=drift,
        tolerances=config,
        images=images,
        torch_accuracy=torch_accuracy,
        files=verdicts,
        not_run=not_run,
        passed=all(False not in (file.accuracy_passed, file.latency_passed, file.parity_passed) for file in verdicts),
    )


def _parities(files: Sequence[BundleFile], folder: Path, connection: Connection, work: Path) -> dict[str, Parity]:
    """Each file's logits of the bundle's images, computed on the device, against PyTorch's."""
    with np.load(folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, logits = arrays["images"], arrays["logits"]
    return {file.name: parity(connection.predict(folder / file.name, images_NHWC, work), logits) for file in files}


def _accuracies(
    bundle: Bundle,
    files: Sequence[BundleFile],
    folder: Path,
    data: DataConfig,
    limit: int | None,
    connection: Connection,
    work: Path,
    progress: Progress,
) -> tuple[dict[str, float], float, int]:
    """Top-1 of each file on the device, PyTorch's on the same images, and their number. Images go in parts, to bound memory."""
    test = load_images(data.at(bundle.architecture.resolution), "test")
    right = {file.name: 0 for file in files}
    total = torch_right = 0
    with np.load(folder / "parity.npz", allow_pickle=False) as arrays:
        predictions = arrays["predictions"]
    with progress.task("running the test images on the device", len(test) if limit is None else min(limit, len(test))) as task:
        for x_NCHW, y in evaluation_batches(test, IMAGES_AT_ONCE, limit=limit, workers=data.workers):
            images_NHWC, labels = np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy()), y.numpy()
            for file in files:
                right[file.name] += int((connection.predict(folder / file.name, images_NHWC, work).argmax(1) == labels).sum())
            torch_right += int((predictions[total : total + len(labels)] == labels).sum())
            total += len(labels)
            task.advance(len(labels))
    return {name: count / total for name, count in right.items()}, torch_right / total, total


def _unpredicted(bundle: Bundle, device: Device, settings: DeviceConfig, table: LatencyTable | None) -> str | None:
    """Why the table predicts nothing about this bundle on this device; None where it does."""
    if table is None:
        return "there is no table of this device"
    if table.header.device != device.id:
        return f"the table is of {table.header.device}, not of {device.id}"
    if table.header.threads != settings.threads:
        return f"the table is for {table.header.threads} threads, not {settings.threads}"
    missing = missing_ops(bundle.architecture.ops(), table)
    return f"the table lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}" if missing else None


class _Measurement:
    """The exported files, and the blocks that tell the drift, measured in interleaved rounds."""

    def __init__(
        self,
        bundle: Bundle,
        files: Sequence[BundleFile],
        folder: Path,
        device: Device,
        connection: Connection,
        settings: DeviceConfig,
        table: LatencyTable | None,
        build: Build,
    ) -> None:
        self.arch: Architecture = bundle.architecture
        self.connection, self.settings, self.table = connection, settings, table
        self.cores = tuple(settings.cores or connection.cores(settings.threads))
        self.headers: dict[str, dict[str, object]] = {}
        self.rounds: dict[str, Rounds] = defaultdict(list)
        chain = [op.key for op in self.arch.ops()]
        self.items: dict[str, list[dict[str, object]]] = defaultdict(list)
        for file in files:
            self.items[file.runtime].append({"id": file.name, "path": str((folder / file.name).resolve()), "ops": chain})
        self.blocks: tuple[Op, ...] = ()
        self.unpredicted = _unpredicted(bundle, device, settings, table)
        # Prices that were fitted to whole networks are not times of blocks alone, so no block can tell how they have changed.
        measured = table is not None and all(entry.runs != "unknown" for entry in table.entries.values())
        if table is not None and self.unpredicted is None and measured:
            self.blocks = tuple(dict.fromkeys(self.arch.ops()))
            runtime, dtype = table.header.runtime, table.header.dtype
            self.items[runtime] += [{"id": op.key, "path": str(build((op,), runtime, dtype)), "ops": [op.key]} for op in self.blocks]

    def applies(self, file: BundleFile) -> bool:
        """Whether the table predicts this file."""
        table = self.table if self.unpredicted is None else None
        return table is not None and (table.header.runtime, table.header.dtype) == (file.runtime, file.dtype)

    def run(self, config: ValidateConfig, work: Path, progress: Progress) -> None:
        """All rounds, and as many again while a file's rounds spread too widely."""
        count = sum(map(len, self.items.values()))
        with progress.task("measuring the exported files", config.rounds * count) as task:
            for number in range(config.rounds):
                self._round(number, work, progress)
                task.advance(count)
        files = [str(item["id"]) for items in self.items.values() for item in items if item["id"] not in {op.key for op in self.blocks}]
        for number in range(config.rounds, 2 * config.rounds):
            if all(spread_of(self.rounds[name]) <= config.max_spread for name in files):
                return
            self._round(number, work, progress)
        noisy = [name for name in files if spread_of(self.rounds[name]) > config.max_spread]
        if noisy:
            progress.warn(f"{', '.join(noisy)} stayed noisy after {2 * config.rounds} rounds: measure on a quieter device.")

    def _round(self, number: int, work: Path, progress: Progress) -> None:
        rng = np.random.default_rng(number)
        for runtime, items in sorted(self.items.items()):
            plan = {
                "runtime": runtime,
                "threads": self.settings.threads,
                "cores": list(self.cores),
                "items": [{**items[i], "round": number} for i in rng.permutation(len(items))],
            }
            for row in self.connection.measure(plan, work):
                if "error" in row:
                    raise DeviceError(f"{row['id']} does not run with {runtime}: {row['error']}")
                if "id" in row:
                    self.rounds[row["id"]].append(row["ms"])
                elif "note" in row:
                    progress.say(row["note"])
                elif "runner" in row:
                    self.headers[runtime] = row

    def ms(self, name: str) -> float:
        """Median over rounds of the median over runs."""
        return float(np.median([np.median(runs) for runs in self.rounds[name]]))

    def drift(self) -> float | None:
        """The time of the network's blocks now against their entries in the table."""
        if self.table is None or not self.blocks:
            return None
        ops = self.arch.ops()
        return sum(self.ms(op.key) for op in ops) / sum(self.table.entries[op.key].ms for op in ops)


def _judged(
    file: BundleFile,
    measurement: _Measurement,
    drift: float | None,
    outputs: Parity,
    accuracy: float,
    torch_accuracy: float,
    config: ValidateConfig,
) -> FileVerdict:
    table = measurement.table if measurement.applies(file) else None
    predicted = None if table is None else latency_ms(measurement.arch, table)
    measured = measurement.ms(file.name)
    error = None if predicted is None else measured / (drift or 1.0) / predicted - 1
    tolerance = config.int8_accuracy_tolerance if file.dtype == "int8" else config.accuracy_tolerance
    return FileVerdict(
        name=file.name,
        runtime=file.runtime,
        runtime_version=str(measurement.headers[file.runtime]["runtime_version"]),
        dtype=file.dtype,
        measured_ms=measured,
        spread=spread_of(measurement.rounds[file.name]),
        predicted_ms=predicted,
        latency_error=error,
        latency_passed=None if error is None else abs(error) <= config.latency_tolerance and abs((drift or 1.0) - 1) <= config.max_drift,
        parity=outputs,
        parity_passed=None if file.dtype == "int8" else outputs.relative_error <= config.parity_tolerance,
        accuracy=accuracy,
        accuracy_loss=torch_accuracy - accuracy,
        accuracy_passed=torch_accuracy - accuracy <= tolerance,
    )


def drift_note(verdict: Verdict) -> str | None:
    """A sentence about a device that is not as fast as when it was profiled; None while it is within the tolerance."""
    if verdict.drift is None or abs(verdict.drift - 1) <= verdict.tolerances.latency_tolerance:
        return None
    how = "slower" if verdict.drift > 1 else "faster"
    said = f"{verdict.device} is {abs(verdict.drift - 1):.0%} {how} now than when it was profiled (its clock, temperature or load changed)"
    if abs(verdict.drift - 1) > verdict.tolerances.max_drift:
        return f"{said}, more than the {verdict.tolerances.max_drift:.0%} allowed: profile it again."
    return f"{said}; predictions are judged at the profiled speed."


def lines(verdict: Verdict) -> list[str]:
    """A verdict as lines for a terminal."""
    out = []
    for file in verdict.files:
        latency = f"{file.measured_ms:.4g} ms"
        if file.predicted_ms is not None and file.latency_error is not None:
            mark = "ok" if file.latency_passed else "OUT OF TOLERANCE"
            latency += (
                f", drift {(verdict.drift or 1) - 1:+.1%}, error {file.latency_error:+.1%} of {file.predicted_ms:.4g} ms predicted ({mark})"
            )
        mark = "ok" if file.accuracy_passed and file.parity_passed is not False else "OUT OF TOLERANCE"
        outputs = "" if file.parity is None else f", outputs within {file.parity.relative_error:.1e}"
        out.append(f"{file.name}: {latency}; top-1 {file.accuracy:.2%} against {verdict.torch_accuracy:.2%} in PyTorch{outputs} ({mark})")
    out += [f"{name}: not run, {why}" for name, why in verdict.not_run.items()]
    note = drift_note(verdict) or (f"latency is not judged: {verdict.unpredicted}." if verdict.unpredicted else None)
    return [*out, *([f"note: {note}"] if note else []), f"verdict: {'passed' if verdict.passed else 'FAILED'}"]
