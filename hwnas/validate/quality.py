"""How good the files are on the device: a classifier's top-1, a detector's AP, and how near their outputs are to PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hwnas.config import DataConfig, ValidateConfig
from hwnas.data.images import evaluation_batches, load_images
from hwnas.devices.session import Bench
from hwnas.export.bundle import Bundle, Parity, parity
from hwnas.validate import detector
from hwnas.validate.exported import Exported

IMAGES_AT_ONCE = 512


@dataclass(frozen=True)
class Quality:
    """How good PyTorch and the files are on the same images, by the names of the verdict's fields, and how near their outputs are."""

    torch: dict[str, float]
    files: dict[str, dict[str, Any]]
    parities: dict[str, Parity]
    images: int


def quality_of(exported: Exported, bench: Bench, data: DataConfig, config: ValidateConfig) -> Quality:
    """The quality of every file that the device runs, by the task of the bundle."""
    files = exported.files
    if exported.bundle.detector is None:
        parities = _parities(exported, bench)
        accuracies, torch, images = _accuracies(exported, bench, data, config.images)
        allowed = {"fp32": config.accuracy_tolerance, "int8": config.int8_accuracy_tolerance}
        fields = {file.name: _field("accuracy", accuracies[file.name], torch, allowed[file.dtype]) for file in files}
        return Quality({"torch_accuracy": torch}, fields, parities, images)
    parities = detector.parities(exported, bench)
    found = detector.judge(exported, bench, data, config)
    allowed = {"fp32": config.ap_tolerance, "int8": config.int8_ap_tolerance}
    fields = {file.name: _field("ap", found.ap[file.name], found.torch_ap, allowed[file.dtype]) for file in files}
    for name, ms in found.post_processing_ms.items():
        fields[name]["post_processing_ms"] = ms
        fields[name]["app_post_processing_ms"] = found.app_post_processing_ms.get(name)
    return Quality({"torch_ap": found.torch_ap}, fields, parities, found.images)


def _field(name: str, value: float, torch: float, tolerance: float) -> dict[str, Any]:
    return {name: value, f"{name}_loss": torch - value, f"{name}_passed": torch - value <= tolerance}


def _parities(exported: Exported, bench: Bench) -> dict[str, Parity]:
    """Each file's outputs for the bundle's images, computed on the device, against PyTorch's."""
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, wanted = arrays["images"], exported.bundle.interface.outputs_of(arrays["logits"])
    return {file.name: parity(exported.predict(file, images_NHWC, bench), wanted) for file in exported.files}


def _accuracies(exported: Exported, bench: Bench, data: DataConfig, limit: int | None) -> tuple[dict[str, float], float, int]:
    """Top-1 of each file on the device, PyTorch's on the same images, and their number. Images go in parts, to bound memory."""
    bundle = exported.bundle
    test = load_images(data.at(bundle.architecture.resolution), "test")
    right = {file.name: 0 for file in exported.files}
    total = torch_right = 0
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        predictions = arrays["predictions"]
    count = len(test) if limit is None else min(limit, len(test))
    with bench.progress.task("running the test images on the device", count) as task:
        for x_NCHW, y in evaluation_batches(test, IMAGES_AT_ONCE, limit=limit, workers=data.workers):
            images_NHWC, labels = bundle.interface.fed(np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy())), y.numpy()
            for file in exported.files:
                right[file.name] += int((exported.predict(file, images_NHWC, bench).argmax(1) == labels).sum())
            torch_right += int((predictions[total : total + len(labels)] == labels).sum())
            total += len(labels)
            task.advance(len(labels))
    return {name: count / total for name, count in right.items()}, torch_right / total, total


def thresholds(bundle: Bundle, config: ValidateConfig) -> dict[str, Any]:
    """The scores at which a detector's NMS is timed, as the verdict has them."""
    if bundle.detector is None:
        return {}
    return {"min_score": bundle.detector.post_processing.min_score, "app_score": detector.app_score(bundle, config)}
