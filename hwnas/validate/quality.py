"""How good the files are on the device, and how near their outputs are to PyTorch's, as
the bundle's task says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwnas.config import DataConfig, ValidateConfig
from hwnas.data.images import Images, evaluation_batches, evaluation_order, load_images
from hwnas.devices.session import Bench
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import Bundle, BundleFile
from hwnas.export.target import target
from hwnas.task import Answers, FileAnswers, Parity
from hwnas.validate.exported import Exported

IMAGES_AT_ONCE = 512
OUTPUT_BYTES = 64 * 2**20
"""Outputs of a file that are in memory at once."""


@dataclass(frozen=True)
class FileQuality:
    """How good a file is, by name; what it loses of the task's metric; what its answers
    took; how near its outputs are.
    """

    metrics: dict[str, float]
    loss: float
    timings_ms: dict[str, float]
    parity: Parity


@dataclass(frozen=True)
class Quality:
    """How good PyTorch and the files, by their names, are on the same images."""

    torch: dict[str, float]
    files: dict[str, FileQuality]
    images: int


def quality_of(
    exported: Exported, bench: Bench, data: DataConfig, config: ValidateConfig
) -> Quality:
    """The quality of every file that the device runs, on all test images or
    ``config.images`` of them.
    """
    bundle, task = exported.bundle, exported.bundle.settings
    test = load_images(data.at(bundle.architecture.resolution), "test")
    task.check_images(test, data.name, bundle.architecture)
    answers = _torch_answers(exported)
    if len(answers) != len(test):
        raise DocumentError(
            f"the bundle was made with {len(answers)} test images, and the data have {len(test)}:"
            " export again."
        )
    torch, parities = answers.metrics(test, config.images), _parities(exported, bench)
    files = {}
    for name, found in _answers(exported, bench, test, data.workers, config).items():
        metrics = found.metrics(test, config.images)
        files[name] = FileQuality(
            metrics,
            torch[bundle.metric] - metrics[bundle.metric],
            found.timings_ms(),
            parities[name],
        )
    return Quality(torch, files, len(evaluation_order(test, config.images)))


def _parities(exported: Exported, bench: Bench) -> dict[str, Parity]:
    """Each file's outputs for the bundle's images, computed on the device, against PyTorch's."""
    bundle, task = exported.bundle, exported.bundle.settings
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        images_NHWC, reference = (
            arrays["images"],
            bundle.interface.outputs_of(arrays[task.reference]),
        )
    return {
        file.name: task.parity(
            target(file.format).graph,
            _outputs(exported, file, images_NHWC, bench),
            reference,
            bundle.architecture,
        )
        for file in exported.files
    }


def _torch_answers(exported: Exported) -> Answers:
    with np.load(exported.folder / "parity.npz", allow_pickle=False) as arrays:
        return exported.bundle.settings.kept(arrays)


def _answers(
    exported: Exported, bench: Bench, test: Images, workers: int, config: ValidateConfig
) -> dict[str, FileAnswers]:
    """What each file answers on the device, by its name. Images go in parts, to bound memory."""
    bundle, task, limit = exported.bundle, exported.bundle.settings, config.images
    app = app_score(bundle, config)
    answers = {
        file.name: task.answers(target(file.format).graph, bundle.architecture, app)
        for file in exported.files
    }
    at_once = max(
        1,
        min(
            IMAGES_AT_ONCE,
            OUTPUT_BYTES // max(4 * (_numbers(file) or 1) for file in exported.files),
        ),
    )
    with bench.progress.task(
        "running the test images on the device", len(evaluation_order(test, limit))
    ) as shown:
        for x_NCHW, _ in evaluation_batches(test, at_once, limit=limit, workers=workers):
            images_NHWC = bundle.interface.fed(
                np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy())
            )
            for file in exported.files:
                answers[file.name].add(_outputs(exported, file, images_NHWC, bench))
            shown.advance(len(images_NHWC))
    return answers


def _outputs(
    exported: Exported, file: BundleFile, images_NHWC: np.ndarray, bench: Bench
) -> np.ndarray:
    """One row per image, [N, numbers of all outputs]."""
    outputs, numbers = exported.predict(file, images_NHWC, bench), _numbers(file)
    if numbers is not None and outputs.size != len(images_NHWC) * numbers:
        raise DeviceError(
            f"{file.name} gave outputs {list(outputs.shape)} for {len(images_NHWC)} images, but"
            f" bundle.json says {numbers} numbers an image: export again."
        )
    return outputs.reshape(len(images_NHWC), -1)


def _numbers(file: BundleFile) -> int | None:
    """How many numbers a file puts out for an image; None where an older bundle does not say."""
    return (
        None if file.outputs is None else sum(int(np.prod(output.shape)) for output in file.outputs)
    )


def app_score(bundle: Bundle, config: ValidateConfig) -> float | None:
    """The threshold at which answering is timed beside the metric's; None where that is
    not below it, or where there are none.
    """
    least = bundle.settings.min_score()
    return None if least is None or config.app_score <= least else config.app_score
