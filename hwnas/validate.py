"""Validation: are the exported files as fast and as accurate as promised, on the device?

A prediction holds for the device as it was when it was profiled. Clocks, temperature and neighbours change, so validation
measures the network's own blocks again, in the same rounds as the files: their sum, against the table's, is the *drift* of the
device. The prediction is judged at the profiled speed (measured time divided by the drift); the plain measured time and the
drift stand beside it. A drift above the tolerance is said, one above ``validate.max_drift`` fails: that is not the device that was
profiled. And a table of another device never predicts anything here.

Outputs are compared on the device, too: each file gets the bundle's real images there, and its outputs are held against PyTorch's. A
file whose runtime the device lacks is left out, and the verdict says so.

A prediction is of the network alone. Where a file holds more, a normalisation, a softmax or a detector's decoding, the network is timed
alone, too, in the same rounds, and that time is the one that is held against the prediction (``network_ms``).

Detectors are judged by their AP (``validate_detector``). Their ONNX files decode, or choose, in the same graph, and so have no prediction,
nor has a file with NMS: its measured time stands beside that of the file without, and the time that NumPy takes for the same. How long NMS
takes depends on how many boxes it looks at: it is timed on a test image, at the threshold of scores that AP needs and at an app's
(``validate.app_score``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hwnas import validate_detector
from hwnas.config import DataConfig, DeviceConfig, ValidateConfig
from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms, missing_ops
from hwnas.core.ops import Op
from hwnas.core.table import LatencyTable
from hwnas.data.images import evaluation_batches, load_images
from hwnas.devices.device import Connection, Device
from hwnas.devices.profile import spread_of
from hwnas.document import file_sha256, write_atomic
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import Bundle, BundleFile, Parity, parity
from hwnas.export.target import target
from hwnas.progress import Progress
from hwnas.verdict import FileVerdict, Verdict, drift_note, lines

__all__ = ["FileVerdict", "Verdict", "drift_note", "lines", "load_bundle", "validate"]

OUTPUTS = ["verdict.json"]
Build = Callable[[Sequence[Op], str, str], Path]
Rounds = list[list[float]]
IMAGES_AT_ONCE = 512
"""What is in a file's graph -> how a copy with another threshold of scores is made."""


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
    quality = _quality(bundle, files, folder, data, config, connection, work, progress)
    with TemporaryDirectory(dir=work, prefix=".networks-") as networks:
        measurement = _Measurement(bundle, files, folder, device, connection, settings, table, build, Path(networks))
        if bundle.detector is not None:
            measurement.add_nms(bundle, files, folder, config)
        measurement.run(config, work, progress)
    drift = measurement.drift()
    verdicts = tuple(_judged(file, measurement, drift, quality, config) for file in files)
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
        images=quality.images,
        **quality.torch,
        **_thresholds(bundle, config),
        files=verdicts,
        not_run=not_run,
        passed=all(file.quality_passed and False not in (file.latency_passed, file.parity_passed) for file in verdicts),
    )


def _thresholds(bundle: Bundle, config: ValidateConfig) -> dict[str, Any]:
    """The scores at which a detector's NMS is timed, as the verdict has them."""
    if bundle.detector is None:
        return {}
    return {"min_score": bundle.detector.post_processing.min_score, "app_score": validate_detector.app_score(bundle, config)}


@dataclass(frozen=True)
class _Quality:
    """How good PyTorch and the files are on the same images, by the names of the verdict's fields, and how near their outputs are."""

    torch: dict[str, float]
    files: dict[str, dict[str, Any]]
    parities: dict[str, Parity]
    images: int


def _quality(
    bundle: Bundle,
    files: Sequence[BundleFile],
    folder: Path,
    data: DataConfig,
    config: ValidateConfig,
    connection: Connection,
    work: Path,
    progress: Progress,
) -> _Quality:
    if bundle.detector is None:
        parities = _parities(bundle, files, folder, connection, work)
        accuracies, torch, images = _accuracies(bundle, files, folder, data, config.images, connection, work, progress)
        allowed = {"fp32": config.accuracy_tolerance, "int8": config.int8_accuracy_tolerance}
        fields = {file.name: _field("accuracy", accuracies[file.name], torch, allowed[file.dtype]) for file in files}
        return _Quality({"torch_accuracy": torch}, fields, parities, images)
    parities = validate_detector.parities(bundle, files, folder, connection, work)
    found = validate_detector.judge(bundle, files, folder, data, config, connection, work, progress)
    allowed = {"fp32": config.ap_tolerance, "int8": config.int8_ap_tolerance}
    fields = {file.name: _field("ap", found.ap[file.name], found.torch_ap, allowed[file.dtype]) for file in files}
    for name, ms in found.post_processing_ms.items():
        fields[name]["post_processing_ms"] = ms
        fields[name]["app_post_processing_ms"] = found.app_post_processing_ms.get(name)
    return _Quality({"torch_ap": found.torch_ap}, fields, parities, found.images)


def _field(name: str, value: float, torch: float, tolerance: float) -> dict[str, Any]:
    return {name: value, f"{name}_loss": torch - value, f"{name}_passed": torch - value <= tolerance}


def _parities(bundle: Bundle, files: Sequence[BundleFile], folder: Path, connection: Connection, work: Path) -> dict[str, Parity]:
    """Each file's outputs for the bundle's images, computed on the device, against PyTorch's."""
    with np.load(folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, wanted = arrays["images"], bundle.interface.outputs_of(arrays["logits"])
    return {file.name: parity(connection.predict(folder / file.name, images_NHWC, work), wanted) for file in files}


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
            images_NHWC, labels = bundle.interface.fed(np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy())), y.numpy()
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


def _holds_more(bundle: Bundle) -> bool:
    """Whether the files hold more than the network."""
    return bundle.detector is not None or bundle.interface.softmax or bundle.interface.input == "uint8"


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
        networks: Path,
    ) -> None:
        self.arch: Architecture = bundle.architecture
        self.connection, self.settings, self.table = connection, settings, table
        self.cores = tuple(settings.cores or connection.cores(settings.threads))
        self.headers: dict[str, dict[str, object]] = {}
        self.rounds: dict[str, Rounds] = defaultdict(list)
        self.fed: set[str] = set()  # items that got an image instead of noise
        self.networks = networks
        chain = [op.key for op in self.arch.ops()]
        self.items: dict[str, list[dict[str, object]]] = defaultdict(list)
        self.alone: set[str] = set()  # files whose network can be timed alone
        for file in files:
            made = target(file.format)
            if made.graph != "decoded":
                continue  # add_nms
            self.items[file.runtime].append({"id": file.name, "path": str((folder / file.name).resolve()), "ops": chain})
            if not _holds_more(bundle):
                self.alone.add(file.name)
                continue
            network = made.network_alone((folder / file.name).read_bytes(), detector=bundle.detector is not None)
            if network is not None:
                self.alone.add(file.name)
                path = networks / f"network-{file.name}"
                write_atomic(path, network)
                self.items[file.runtime].append({"id": path.name, "path": str(path.resolve()), "ops": chain})
        self.blocks: tuple[Op, ...] = ()
        self.unpredicted = _unpredicted(bundle, device, settings, table)
        # Prices that were fitted to whole networks are not times of blocks alone, so no block can tell how they have changed.
        measured = table is not None and all(entry.runs != "unknown" for entry in table.entries.values())
        if table is not None and self.unpredicted is None and measured:
            self.blocks = tuple(dict.fromkeys(self.arch.ops()))
            runtime, dtype = table.header.runtime, table.header.dtype
            self.items[runtime] += [{"id": op.key, "path": str(build((op,), runtime, dtype)), "ops": [op.key]} for op in self.blocks]

    def add_nms(self, bundle: Bundle, files: Sequence[BundleFile], folder: Path, config: ValidateConfig) -> None:
        """The files with NMS in their graph, on a test image, and copies of them with an app's threshold."""
        app_score = validate_detector.app_score(bundle, config)
        image = self.networks / "image.npy"
        validate_detector.write_typical_image(folder, config.app_score, image)
        for file in files:
            made = target(file.format)
            if made.graph == "decoded":
                continue
            item = {"path": str((folder / file.name).resolve()), "ops": [op.key for op in self.arch.ops()], "input": str(image.resolve())}
            self.items[file.runtime].append({**item, "id": file.name})
            if app_score is not None:
                path = self.networks / f"app-{file.name}"
                write_atomic(path, made.at_score((folder / file.name).read_bytes(), app_score))
                self.items[file.runtime].append({**item, "id": path.name, "path": str(path.resolve())})

    def applies(self, file: BundleFile) -> bool:
        """Whether the table predicts this file."""
        table = self.table if self.unpredicted is None else None
        same = table is not None and (table.header.runtime, table.header.dtype) == (file.runtime, file.dtype)
        return same and file.name in self.alone

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
                    self.fed |= {row["id"]} if row.get("input") == "image" else set()
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
    quality: _Quality,
    config: ValidateConfig,
) -> FileVerdict:
    table = measurement.table if measurement.applies(file) else None
    predicted = None if table is None else latency_ms(measurement.arch, table)
    network = f"network-{file.name}" if f"network-{file.name}" in measurement.rounds else None
    judged = measurement.ms(network or file.name)
    error = None if predicted is None else judged / (drift or 1.0) / predicted - 1
    outputs, made = quality.parities[file.name], target(file.format)
    app = f"app-{file.name}" if f"app-{file.name}" in measurement.rounds else None
    timed_on = ("test image" if file.name in measurement.fed else "noise") if made.graph != "decoded" else None
    return FileVerdict(
        name=file.name,
        runtime=file.runtime,
        runtime_version=str(measurement.headers[file.runtime]["runtime_version"]),
        dtype=file.dtype,
        measured_ms=measurement.ms(file.name),
        network_ms=None if network is None else judged,
        app_ms=None if app is None else measurement.ms(app),
        timed_on=timed_on,
        spread=spread_of(measurement.rounds[file.name]),
        predicted_ms=predicted,
        latency_error=error,
        latency_passed=None if error is None else abs(error) <= config.latency_tolerance and abs((drift or 1.0) - 1) <= config.max_drift,
        parity=outputs,
        parity_passed=outputs.relative_error <= config.parity_tolerance if made.exact else None,
        **quality.files[file.name],
    )
