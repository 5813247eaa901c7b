"""How good the files are on the device, and how closely their outputs match PyTorch's,
as defined by the bundle's task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hwnas.config import DataConfig, ValidateConfig
from hwnas.data.images import evaluation_batches, evaluation_order, load_images
from hwnas.devices.session import Bench
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import PARITY_FILE, Bundle, BundleFile, load_parity
from hwnas.export.quantization import first_line
from hwnas.export.target import target
from hwnas.task import Answers, FileAnswers, Parity
from hwnas.validate.exported import Exported

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.data.images import Images

IMAGES_AT_ONCE = 512
"""Images that are sent to the device at once, at most."""
OUTPUT_BYTES = 64 * 2**20
"""Bytes of a file's outputs that are in memory at once, at most."""


@dataclass(frozen=True)
class FileQuality:
    """A file's metrics by name, the drop in the task's metric against PyTorch, the time
    its answers need in addition to running the file, and how closely its outputs match.
    """

    metrics: dict[str, float]
    drop: float
    timings_ms: dict[str, float]
    parity: Parity


@dataclass(frozen=True)
class BundleQuality:
    """The metrics of PyTorch and the quality of the files, by file name, on the same
    images.
    """

    torch: dict[str, float]
    files: dict[str, FileQuality]
    images: int


def quality_of(
    exported: Exported, bench: Bench, data: DataConfig, config: ValidateConfig
) -> BundleQuality:
    """The quality of every file that the device runs, on all test images or
    ``config.images`` of them.
    """
    bundle = exported.bundle
    test = load_images(data.at(bundle.architecture.size), "test")
    bundle.settings.check_images(test, data.name, bundle.architecture)
    torch_answers = _torch_answers(exported)
    # answers are compared image by image, so the data must be that of the export
    if len(torch_answers) != len(test):
        raise DocumentError(
            f"the bundle was made with {len(torch_answers)} test images, but the data has"
            f" {len(test)}: export again."
        )

    torch = torch_answers.metrics(test, config.images)
    parities = _parities(exported, bench)
    files = {}
    for name, answers in _answers(exported, bench, test, data.workers, config).items():
        metrics = answers.metrics(test, config.images)
        drop = torch[bundle.metric] - metrics[bundle.metric]
        files[name] = FileQuality(metrics, drop, answers.timings_ms(), parities[name])
    return BundleQuality(torch, files, len(evaluation_order(test, config.images)))


def _parities(exported: Exported, bench: Bench) -> dict[str, Parity]:
    """Each file's outputs for the bundle's images, computed on the device, against
    PyTorch's.
    """
    bundle = exported.bundle
    task = bundle.settings
    arrays = load_parity(exported.folder, "images", task.reference)
    images_NHWC = arrays["images"]
    reference = bundle.interface.outputs_of(arrays[task.reference])
    parities = {}
    for file in exported.files:
        graph = target(file.format).graph
        outputs = _outputs(exported, file, images_NHWC, bench)
        parity = task.parity(graph, outputs, reference, bundle.architecture)
        if not math.isfinite(parity.relative_error):
            raise _not_finite(file, bench)
        parities[file.name] = parity
    return parities


def _not_finite(file: BundleFile, bench: Bench) -> DeviceError:
    return DeviceError(
        f"{file.name} gave outputs that are not finite on {bench.device.id}: update its runtime"
        f" ({file.runtime}), or leave {file.format} out of export.formats."
    )


def _torch_answers(exported: Exported) -> Answers:
    arrays = load_parity(exported.folder)
    try:
        return exported.bundle.settings.load_answers(arrays)
    except (LookupError, ValueError, TypeError) as error:
        raise DocumentError(
            f"{exported.folder / PARITY_FILE} does not hold PyTorch's answers"
            f" ({first_line(error)}): export again."
        ) from error


def _answers(
    exported: Exported, bench: Bench, test: Images, workers: int, config: ValidateConfig
) -> dict[str, FileAnswers]:
    """Each file's answers on the device, by file name. Images are sent in batches, to
    bound memory.
    """
    bundle = exported.bundle
    task = bundle.settings
    limit = config.images
    score = app_score(bundle, config)
    answers = {}
    for file in exported.files:
        graph = target(file.format).graph
        answers[file.name] = task.answers(graph, bundle.architecture, score)

    # all files get the same batches, so the largest output limits their size
    bytes_per_image = max(4 * (_numbers(file) or 1) for file in exported.files)  # float32
    batch_size = max(1, min(IMAGES_AT_ONCE, OUTPUT_BYTES // bytes_per_image))
    total = len(evaluation_order(test, limit))
    with bench.progress.task("running the test images on the device", total) as bar:
        for x_NCHW, _ in evaluation_batches(test, batch_size, limit=limit, workers=workers):
            # TFLite's order; the runner transposes for files of other layouts
            channels_last = np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy())
            images_NHWC = bundle.interface.fed(channels_last)
            for file in exported.files:
                answers[file.name].add(_outputs(exported, file, images_NHWC, bench))
            bar.advance(len(images_NHWC))
    return answers


def _outputs(
    exported: Exported, file: BundleFile, images_NHWC: np.ndarray, bench: Bench
) -> np.ndarray:
    """One row per image, [N, values of all outputs]."""
    outputs = exported.predict(file, images_NHWC, bench)
    numbers = _numbers(file)
    if numbers is not None and outputs.size != len(images_NHWC) * numbers:
        raise DeviceError(
            f"{file.name} gave outputs {list(outputs.shape)} for {len(images_NHWC)} images, but"
            f" bundle.json says {numbers} numbers per image: export again."
        )
    return outputs.reshape(len(images_NHWC), -1)


def _numbers(file: BundleFile) -> int | None:
    """The number of values that a file outputs per image; None for older bundles, which
    do not say.
    """
    if file.outputs is None:
        return None
    return sum(int(np.prod(output.shape)) for output in file.outputs)


def app_score(bundle: Bundle, config: ValidateConfig) -> float | None:
    """The threshold of an app, at which post-processing is timed as well; None if it is
    not above the metric's own threshold, or if the task has no threshold.
    """
    min_score = bundle.settings.min_score()
    if min_score is None or config.app_score <= min_score:
        return None
    return config.app_score
