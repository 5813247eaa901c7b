"""What validation asks of a detector's files: on a device, their AP beside PyTorch's, and how near their outputs come.

Each file's outputs are read as its ``graph`` says, with the bundle's post-processing where the graph has none. AP is COCO's, on the same
images for all; a file that finds nothing gets 0. The time of the NumPy post-processing is taken on the computer that validates.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hwnas.config import DataConfig, ValidateConfig
from hwnas.data.coco import CocoImages
from hwnas.data.images import evaluation_batches, evaluation_order, load_images
from hwnas.detection import average_precision
from hwnas.devices.session import Bench
from hwnas.errors import ConfigError, DeviceError, DocumentError
from hwnas.export.bundle import Bundle, BundleFile, DetectorFile, DetectorPart, Parity
from hwnas.export.detector_stage import detector_parity, torch_found
from hwnas.export.post_processing import BOX, READERS, Found
from hwnas.export.target import target
from hwnas.nn.ssd import Detections
from hwnas.validate.exported import Exported

OUTPUT_BYTES = 64 * 2**20
"""Outputs of a file that are in memory at once."""
IMAGES_AT_ONCE = 512


@dataclass(frozen=True)
class Judgement:
    """AP by file name, PyTorch's on the same images, and the median time of the NumPy post-processing of one image by file name.

    ``app_post_processing_ms``: of what scores ``validate.app_score`` or more; none where AP's threshold is not below that.
    """

    ap: dict[str, float]
    post_processing_ms: dict[str, float]
    app_post_processing_ms: dict[str, float]
    torch_ap: float
    images: int


def parities(exported: Exported, bench: Bench) -> dict[str, Parity]:
    """Each file's outputs for the bundle's images, computed on the device, against PyTorch's."""
    bundle = exported.bundle
    settings, resolution = _detector(bundle).post_processing, bundle.architecture.resolution
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, rows = arrays["images"], arrays["rows"]
    found = {}
    for file in exported.files:
        outputs = _outputs(exported, file, images_NHWC, bench)
        found[file.name] = detector_parity(target(file.format).graph, outputs, rows, settings, resolution)
    return found


def judge(exported: Exported, bench: Bench, data: DataConfig, config: ValidateConfig) -> Judgement:
    """The AP of each file on the device, on all test images or ``config.images`` of them. Images go in parts, to bound memory."""
    bundle, limit = exported.bundle, config.images
    part, arch = _detector(bundle), bundle.architecture
    test = load_images(data.at(arch.resolution), "test")
    if not isinstance(test, CocoImages):
        raise ConfigError(f"data.name = {data.name!r} has no boxes, but the bundle is a detector's: name the data it was exported with.")
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        reference = torch_found(arrays["counts"], arrays["found"])
    if len(reference) != len(test):
        raise DocumentError(f"the bundle was made with {len(reference)} test images, and the data have {len(test)}: export again.")
    order = evaluation_order(test, limit).tolist()
    found: dict[str, list[Found]] = defaultdict(list)
    times_ms: dict[str, list[float]] = defaultdict(list)
    app_times_ms: dict[str, list[float]] = defaultdict(list)
    app = app_score(bundle, config)
    at_once = max(1, min(IMAGES_AT_ONCE, OUTPUT_BYTES // max(4 * _size(each) for each in part.files.values())))
    options = part.post_processing.model_dump()
    with bench.progress.task("running the test images on the device", len(order)) as task:
        for x_NCHW, _ in evaluation_batches(test, at_once, limit=limit, workers=data.workers):
            images_NHWC = bundle.interface.fed(np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy()))
            for file in exported.files:
                read = READERS[part.files[file.name].graph]
                for row in _outputs(exported, file, images_NHWC, bench):
                    start = time.perf_counter()
                    found[file.name].append(read(row, options, arch.resolution, arch.classes))
                    times_ms[file.name].append(1e3 * (time.perf_counter() - start))
                    if app is not None:
                        start = time.perf_counter()
                        read(row, {**options, "min_score": app}, arch.resolution, arch.classes)
                        app_times_ms[file.name].append(1e3 * (time.perf_counter() - start))
            task.advance(len(images_NHWC))
    return Judgement(
        ap={name: _ap(test, order, each) for name, each in found.items()},
        post_processing_ms=_medians(times_ms, part),
        app_post_processing_ms=_medians(app_times_ms, part),
        torch_ap=_ap(test, order, reference[: len(order)]),
        images=len(order),
    )


def app_score(bundle: Bundle, config: ValidateConfig) -> float | None:
    """The threshold at which NMS is timed beside AP's; None where AP's is not below it."""
    assert bundle.detector is not None
    return config.app_score if config.app_score > bundle.detector.post_processing.min_score else None


def write_typical_image(bundle_folder: Path, score: float, path: Path) -> None:
    """Write the test image, of the bundle's, with as many scores above ``score`` as the median one has, as the files take it, float32 or
    uint8 [1, H, W, C]: how long NMS takes depends on that.
    """
    with np.load(bundle_folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, rows = arrays["images"], arrays["rows"]
    counts = (rows[..., BOX:] > score).sum(axis=(1, 2))
    typical = int(np.argsort(counts, kind="stable")[len(counts) // 2])
    np.save(path, images_NHWC[typical : typical + 1])


def _medians(times_ms: dict[str, list[float]], part: DetectorPart) -> dict[str, float]:
    """Of the files that leave post-processing to NumPy."""
    return {name: float(np.median(each)) for name, each in times_ms.items() if part.files[name].graph == "decoded"}


def _ap(images: CocoImages, order: list[int], found: list[Found]) -> float:
    detections = [Detections(*(torch.from_numpy(np.ascontiguousarray(part)) for part in each)) for each in found]
    return average_precision(images, dict(zip(order, detections, strict=True))).AP


def _outputs(exported: Exported, file: BundleFile, images_NHWC: np.ndarray, bench: Bench) -> np.ndarray:
    """One row per image, [N, numbers of all outputs]."""
    outputs = exported.predict(file, images_NHWC, bench)
    size = _size(_detector(exported.bundle).files[file.name])
    if outputs.size != len(images_NHWC) * size:
        raise DeviceError(
            f"{file.name} gave outputs {list(outputs.shape)} for {len(images_NHWC)} images, but bundle.json says {size} "
            "numbers an image: export again."
        )
    return outputs.reshape(len(images_NHWC), -1)


def _size(described: DetectorFile) -> int:
    return sum(int(np.prod(output.shape)) for output in described.outputs)


def _detector(bundle: Bundle) -> DetectorPart:
    assert bundle.detector is not None, "this is a classifier's bundle"
    return bundle.detector
