"""The latency of the files on the device, compared with what a table predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hwnas.config import ValidateConfig
from hwnas.core.cost import latency_ms, missing_ops
from hwnas.core.ops import Op
from hwnas.core.table import LatencyTable
from hwnas.devices.session import Bench, Item, Schedule, Session
from hwnas.document import write_atomic
from hwnas.export.bundle import Bundle, BundleFile, load_parity
from hwnas.export.post_processing import BOX
from hwnas.export.target import target
from hwnas.validate.exported import Exported
from hwnas.validate.quality import app_score


@dataclass(frozen=True)
class LatencyPrediction:
    """What a table predicts for a bundle's network on this device.

    ``table`` is None if it predicts nothing, and ``unpredicted`` says why. ``blocks``
    are the ops that measure the drift; empty if the table cannot provide their times.
    """

    bundle: Bundle
    table: LatencyTable | None
    unpredicted: str | None
    blocks: tuple[Op, ...]

    def drift(self, session: Session) -> float | None:
        """The time of the network's blocks now, divided by the time in the table."""
        if self.table is None or not self.blocks:
            return None
        return session.drift(self.bundle.architecture.ops(), self.table)

    def predicted_ms(self, file: BundleFile) -> float | None:
        """The latency that the table predicts for a file's network; None if the file
        has another runtime or dtype, or if its network cannot be timed by itself.
        """
        if self.table is None or not is_timed_alone(self.bundle, file):
            return None
        header = self.table.header
        same = (header.runtime, header.dtype) == (file.runtime, file.dtype)
        return latency_ms(self.bundle.architecture, self.table) if same else None


def prediction_of(bundle: Bundle, bench: Bench, table: LatencyTable | None) -> LatencyPrediction:
    """What the table, if any, predicts for a bundle on this device."""
    unpredicted = _reason_unpredicted(bundle, bench, table)
    if table is None or unpredicted is not None:
        return LatencyPrediction(bundle, None, unpredicted, ())
    # Costs that were fitted to whole networks are not the times of single blocks, so
    # timing a block says nothing about how they have changed.
    is_measured = all(entry.runs != "unknown" for entry in table.entries.values())
    blocks = bundle.architecture.ops() if is_measured else ()
    return LatencyPrediction(bundle, table, None, tuple(dict.fromkeys(blocks)))


def _reason_unpredicted(bundle: Bundle, bench: Bench, table: LatencyTable | None) -> str | None:
    """Why the table predicts nothing about this bundle on this device; None
    if it does.
    """
    if table is None:
        return "there is no table of this device"
    # times depend on the device and on the number of threads
    if table.header.device != bench.device.id:
        return f"the table is of {table.header.device}, not of {bench.device.id}"
    if table.header.threads != bench.settings.threads:
        return f"the table is for {table.header.threads} threads, not {bench.settings.threads}"
    missing = missing_ops(bundle.architecture.ops(), table)
    if not missing:
        return None
    more = " ..." if len(missing) > 3 else ""
    return f"the table lacks {', '.join(missing[:3])}{more}"


def measure_files(
    exported: Exported, bench: Bench, prediction: LatencyPrediction, config: ValidateConfig
) -> Session:
    """The exported files and the blocks that measure the drift, timed in interleaved
    rounds.

    If the rounds of one file spread too widely, everything gets as many rounds again:
    the drift has to come from the same rounds as the files.
    """
    # noise that twice the rounds do not remove is reported instead of waited for
    max_rounds = 2 * config.rounds
    schedule = Schedule(
        rounds=config.rounds, max_rounds=max_rounds, max_spread=config.max_spread, together=True
    )
    with TemporaryDirectory(dir=bench.folder, prefix=".networks-") as work:
        networks = Path(work)
        items = [
            *_network_items(exported, networks),
            *_block_items(prediction, bench),
            *_nms_items(exported, networks, config),
        ]
        session = Session(bench, items, schedule)
        session.run("measuring the exported files")
    if session.noisy:
        bench.progress.warning(
            f"{', '.join(session.noisy)} stayed noisy after {max_rounds} rounds: measure on a"
            " quieter device."
        )
    return session


def _network_items(exported: Exported, networks: Path) -> Iterator[Item]:
    """The files without NMS in their graph; each is followed by its network by itself
    if the file contains more.
    """
    for file in exported.files:
        if target(file.format).graph != "decoded":
            continue  # these are in _nms_items
        yield exported.item(file)
        network = _network_alone(exported, file)
        if network is not None:
            path = networks / f"network-{file.name}"
            write_atomic(path, network)
            yield exported.item(file, path)


def is_timed_alone(bundle: Bundle, file: BundleFile) -> bool:
    """Whether the network of a file can be timed without the rest of the
    file's graph.
    """
    return not bundle.settings.decodes or target(file.format).parts_detectors


def _network_alone(exported: Exported, file: BundleFile) -> bytes | None:
    """The network of a file that contains more; None if the file contains nothing else,
    or if the network cannot be separated.
    """
    bundle = exported.bundle
    decodes = bundle.settings.decodes
    if not is_timed_alone(bundle, file):
        return None
    if not decodes and not bundle.interface.softmax and bundle.interface.input == "float32":
        return None  # the file is the network
    return target(file.format).network_alone(exported.path(file).read_bytes(), detector=decodes)


def _block_items(prediction: LatencyPrediction, bench: Bench) -> Iterator[Item]:
    """The network's blocks, built for timing in the same way as when they were
    profiled.
    """
    if prediction.table is None:
        return
    header = prediction.table.header
    for op in prediction.blocks:
        path = bench.build((op,), header.runtime, header.dtype)
        # a noisy block only blurs the drift, which is a sum over many of them
        yield Item(op.key, header.runtime, path, (op,), repeat_if_noisy=False)


def _nms_items(exported: Exported, networks: Path, config: ValidateConfig) -> Iterator[Item]:
    """The files with NMS in their graph, on a test image, and copies of them with an
    app's threshold.
    """
    files = [file for file in exported.files if target(file.format).graph != "decoded"]
    if not files:
        return

    bundle = exported.bundle
    score = app_score(bundle, config)
    image = networks / "image.npy"
    write_typical_image(exported.folder, bundle.settings.reference, config.app_score, image)
    for file in files:
        yield exported.item(file, image=image)
        if score is not None:
            path = networks / f"app-{file.name}"
            content = exported.path(file).read_bytes()
            write_atomic(path, target(file.format).at_score(content, score))
            yield exported.item(file, path, image)


def write_typical_image(bundle_folder: Path, reference: str, score: float, path: Path) -> None:
    """Write the test image of a detector's bundle whose number of scores above
    ``score`` is the median, because the time of NMS depends on it. The image is written
    as the files take it: float32 or uint8 [1, H, W, C]. ``reference`` names PyTorch's
    rows (``Task.reference``).
    """
    arrays = load_parity(bundle_folder, "images", reference)
    images_NHWC, rows = arrays["images"], arrays[reference]
    # the time grows with the boxes that NMS compares, so the median image is typical
    counts = (rows[..., BOX:] > score).sum(axis=(1, 2))
    typical = int(np.argsort(counts, kind="stable")[len(counts) // 2])
    np.save(path, images_NHWC[typical : typical + 1])
