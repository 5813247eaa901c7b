"""The work of the export stage: writes the files of a trained network, and compares each
with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.data.images import Images, Portion, evaluation_batches, load_images, sampled_images
from hwnas.document import write_atomic
from hwnas.errors import ConfigError, ExportError
from hwnas.export import score_calibration
from hwnas.export.bundle import (
    Bundle,
    CalibrationPart,
    DetectorPart,
    describe_file,
    described_input,
    preprocessing,
    tool_versions,
    write_labels,
    write_parity,
)
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.export.score_calibration import ScoreCalibration, Transformation
from hwnas.export.target import Trained, target
from hwnas.nn.checkpoint import load_network
from hwnas.nn.network import Network
from hwnas.runs import StageContext
from hwnas.task import Task, task_named, task_of

Predict = Callable[[Path, np.ndarray, Path], np.ndarray]

CALIBRATION_PORTION = 0.5
"""The share of the test images that score calibration is fitted to."""


def run(ctx: StageContext, predict: Predict) -> None:
    """Export every format, and compare each with PyTorch. ``predict(file, images,
    folder)`` runs a file in its runtime.
    """
    network = load_network(ctx.path("train", "model.safetensors")).eval()
    task = task_of(ctx.experiment)
    _check_kind(network, task)
    bundle = _exported(ctx, network, task, predict)
    bundle.save(ctx.folder / "bundle.json")
    ctx.progress.info(f"PyTorch: {task.describe_result(dict(bundle.metrics), bundle.test_images)}")
    for file in bundle.files:
        ctx.progress.info(
            f"{file.name}: {file.size_bytes / 1e3:.0f} kB, relative error"
            f" {file.parity.relative_error:.1e}, same {task.words.answer} on"
            f" {file.parity.agreement:.1%} of {file.parity.images} images"
        )
    for reason in (refused_by_mediapipe(bundle), stretched_by_apps(bundle)):
        if reason is not None:
            ctx.progress.info(f"note: {reason}")


def _check_kind(network: Network, task: Task) -> None:
    """Raise ConfigError if the network was trained for another task."""
    arch = network.arch
    if arch.task != task.network_kind:
        kind = task_named(arch.task).words.network
        raise ConfigError(
            f"{arch.name!r} is a {kind}, but task = {task.name!r}: set task = {arch.task!r}, or"
            " train again."
        )


def refused_by_mediapipe(bundle: Bundle) -> str | None:
    """Why MediaPipe refuses the TFLite files of a bundle, and the setting that fixes it.
    None if it accepts them, or if there are none. See ``metadata``.
    """
    if not _has_tflite(bundle):
        return None
    if bundle.preprocessing.channels != 3:
        return (
            "MediaPipe's tasks take RGB images only, so they refuse these .tflite files; to use"
            " MediaPipe, train with data.channels = 3."
        )
    normalisation = bundle.interface.normalisation
    if normalisation is None or normalisation.is_uniform:
        return None
    return (
        "MediaPipe's tasks normalise float32 input with one mean and std for all channels, so they"
        " refuse these .tflite files; to use MediaPipe, set export.input = 'uint8'."
    )


def stretched_by_apps(bundle: Bundle) -> str | None:
    """What to do if the readers of TFLite metadata resize photographs differently from
    the bundle's data. None if they do not, and for the data of plug-ins, whose resizing
    is unknown.
    """
    mode = bundle.preprocessing.mode
    if mode in (None, "squash") or not _has_tflite(bundle):
        return None
    return (
        "MediaPipe and ML Kit stretch photographs to the model's square, but these files were made"
        f" for {mode!r}: resize photographs yourself first, or set data.resize = 'squash'."
    )


def _has_tflite(bundle: Bundle) -> bool:
    return any(file.runtime == "litert" for file in bundle.files)


def _exported(ctx: StageContext, network: Network, task: Task, predict: Predict) -> Bundle:
    """Write the files and ``parity.npz``. Returns the content of ``bundle.json``."""
    config = ctx.experiment.export
    formats = ctx.experiment.export_formats
    arch = network.arch
    data = ctx.experiment.data.at(arch.size)
    train = load_images(data, "train")
    test = load_images(data, "test")
    task.check_images(test, data.name, arch)

    answers = task.torch_answers(network, test, data.workers)
    interface = Interface(config.input, config.softmax, data.mean, data.std)
    count = min(config.parity_images, task.reference_images(network) or len(test))
    images = interface.fed(sampled_images(test, count))
    # PyTorch gets the same rounded pixels as the files, so rounding is no difference.
    reference = task.torch_outputs(network, interface.seen(images))
    arrays = {"images": images, task.reference: reference, **answers.arrays()}
    parity_file = write_parity(ctx.folder, arrays)

    calibrated = None
    if config.score_calibration:
        calibrated = _score_calibration(network, task, test, interface, data.workers)
    card = ModelCard(
        name=arch.name,
        channels=data.channels,
        labels=test.names,
        output=interface.output,
        normalisation=interface.normalisation,
        resizing=test.resizing,
        calibration=None if calibrated is None else calibrated.fitted,
    )
    calibration_NHWC = sampled_images(train, config.calibration_images)
    trained = Trained(network, interface, calibration_NHWC, card, task.post_processing)

    files = []
    with ctx.progress.task("exporting", len(formats)) as progress:
        for kind in formats:
            format_target = target(kind)
            path = ctx.folder / format_target.file
            write_atomic(path, format_target.write(trained))
            predicted = predict(path, images, ctx.folder)
            expected = interface.outputs_of(reference)
            parity = task.parity(format_target.graph, predicted, expected, arch)
            if not math.isfinite(parity.relative_error):
                raise ExportError(
                    f"{path.name} and PyTorch cannot be compared, because their outputs for test"
                    " images are not finite or all 0: train again, with a lower train.optimizer.lr"
                    f" or more train.epochs, or leave {kind} out of export.formats."
                )
            entry = described_input(format_target, interface, arch)
            exits = task.outputs(format_target.graph, arch, interface.output)
            files.append(describe_file(ctx.folder, kind, parity, entry, exits))
            progress.advance(note=path.name)
    return Bundle(
        architecture=arch,
        task=task.name,
        labels=test.names,
        preprocessing=preprocessing(data, test),
        macs=arch.macs,
        params=arch.params,
        metric=task.metric,
        metrics=answers.metrics(test, None),
        test_images=len(test),
        files=tuple(files),
        detector=DetectorPart.of(arch, task.post_processing),
        labels_file=write_labels(ctx.folder, test.names),
        parity_file=parity_file,
        score_calibration=None if calibrated is None else calibrated.part(),
        versions=tool_versions(),
    )


@dataclass(frozen=True)
class _Calibrated:
    """A score calibration, and the number of images that it was fitted to."""

    fitted: ScoreCalibration
    images: int

    def part(self) -> CalibrationPart:
        """The entry in ``bundle.json``."""
        return CalibrationPart(
            images=self.images,
            source=(
                "a fixed random half of the test images; judge it by the others (training has seen"
                " all images that are not for tests)"
            ),
            transformation=self.fitted.transformation,
            slopes=self.fitted.slopes,
            offsets=self.fitted.offsets,
        )


def _score_calibration(
    network: Network, task: Task, test: Images, interface: Interface, workers: int
) -> _Calibrated:
    """Fit a score calibration to PyTorch's outputs for half of the test images. Training
    images would be useless: the final training has seen all of them, so their scores are
    too good.
    """
    half = Portion(test, CALIBRATION_PORTION)
    logits = []
    labels = []
    for x_NCHW, y in evaluation_batches(half, 256, workers=workers):
        logits.append(task.torch_outputs(network, x_NCHW.permute(0, 2, 3, 1).numpy()))
        labels.append(y.numpy())
    scores = interface.outputs_of(np.concatenate(logits))
    correct = np.concatenate(labels)
    transformation: Transformation = "INVERSE_LOGISTIC" if interface.softmax else "IDENTITY"
    fitted = score_calibration.fit(scores, correct, transformation)
    return _Calibrated(fitted, len(correct))
