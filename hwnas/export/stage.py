"""The export stage: a trained network in, a bundle out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.data.images import Images, Portion, evaluation_batches, load_images, sampled_images
from hwnas.devices.device import HOST, connect
from hwnas.document import write_atomic
from hwnas.errors import ConfigError
from hwnas.export import detector_stage, score_calibration
from hwnas.export.bundle import (
    Bundle,
    CalibrationPart,
    describe_file,
    described_input,
    described_output,
    parity,
    preprocessing,
    save_parity,
    tool_versions,
    torch_logits,
    torch_predictions,
    write_labels,
)
from hwnas.export.interface import Interface
from hwnas.export.metadata import LABELS_FILE, ModelCard
from hwnas.export.score_calibration import ScoreCalibration, Transformation
from hwnas.export.target import Trained, target
from hwnas.nn.network import Network, load_network
from hwnas.runs import StageContext
from hwnas.stages import Stage

Predict = Callable[[Path, np.ndarray, Path], np.ndarray]

CALIBRATION_PORTION = 0.5
"""Of the test images, what score calibration is fitted to."""


def outputs(formats: tuple[str, ...]) -> list[str]:
    """The files the stage writes."""
    return ["bundle.json", "parity.npz", LABELS_FILE, *(target(kind).file for kind in formats)]


def run(ctx: StageContext, predict: Predict) -> None:
    """Export every format and compare each with PyTorch; ``predict(file, images, folder)`` runs a file in its runtime."""
    network = load_network(ctx.path("train", "model.safetensors")).eval()
    kind, task = ("classifier", "classify") if isinstance(network, Network) else ("detector", "detect")
    if task != ctx.experiment.task:
        raise ConfigError(f"{network.arch.name!r} is a {kind}, but task = {ctx.experiment.task!r}: set task = {task!r}, or train again.")
    bundle = _classifier(ctx, network, predict) if isinstance(network, Network) else detector_stage.run(ctx, network, predict)
    bundle.save(ctx.folder / "bundle.json")
    same = "top-1" if isinstance(network, Network) else "best detection"
    for file in bundle.files:
        ctx.progress.say(
            f"{file.name}: {file.size_bytes / 1e3:.0f} kB, relative error {file.parity.relative_error:.1e}, "
            f"same {same} on {file.parity.agreement:.1%} of {file.parity.images} images"
        )
    for reason in (refused_by_mediapipe(bundle), stretched_by_apps(bundle)):
        if reason is not None:
            ctx.progress.say(f"note: {reason}")


def refused_by_mediapipe(bundle: Bundle) -> str | None:
    """Why MediaPipe refuses a bundle's TFLite files, and what to set; None where it takes them, or there are none. See ``metadata``."""
    if not _has_tflite(bundle):
        return None
    if bundle.preprocessing.channels != 3:
        return "MediaPipe's tasks take RGB images only, so they refuse these .tflite files; for them, train with data.channels = 3."
    normalisation = bundle.interface.normalisation
    if normalisation is None or normalisation.is_uniform:
        return None
    return (
        "MediaPipe's tasks normalise float32 input with one mean and std for all channels, so they refuse these .tflite files; "
        "for them, set export.input = 'uint8'."
    )


def stretched_by_apps(bundle: Bundle) -> str | None:
    """What to do where the readers of TFLite metadata resize a photograph in another way than the bundle's data; None where they do not.

    Of a plug-in's data nobody knows.
    """
    mode = bundle.preprocessing.mode
    if mode in (None, "squash") or not _has_tflite(bundle):
        return None
    return (
        f"MediaPipe and ML Kit stretch a photograph to the model's square, and these files were made for {mode!r}: "
        "resize it yourself before, or set data.resize = 'squash'."
    )


def _has_tflite(bundle: Bundle) -> bool:
    return any(file.runtime == "litert" for file in bundle.files)


def _classifier(ctx: StageContext, network: Network, predict: Predict) -> Bundle:
    """Write the files of a classifier and ``parity.npz``; return what ``bundle.json`` has to say."""
    config, formats = ctx.experiment.export, ctx.experiment.export_formats
    data = ctx.experiment.data.at(network.arch.resolution)
    train, test = load_images(data, "train"), load_images(data, "test")
    calibration = sampled_images(train, config.calibration_images)
    interface = Interface(config.input, config.softmax, data.mean, data.std)
    images = interface.fed(sampled_images(test, config.parity_images))
    reference = torch_logits(network, interface.seen(images))
    predictions, labels = torch_predictions(network, evaluation_batches(test, 256, workers=data.workers))
    save_parity(ctx.folder / "parity.npz", images=images, logits=reference, predictions=predictions)
    calibrated = _score_calibration(network, test, interface, data.workers) if config.score_calibration else None
    card = ModelCard(
        name=network.arch.name,
        channels=data.channels,
        labels=test.names,
        output=interface.output,
        normalisation=interface.normalisation,
        resizing=test.resizing,
        calibration=None if calibrated is None else calibrated.fitted,
    )
    trained = Trained(network, interface, calibration, card)
    files = []
    with ctx.progress.task("exporting", len(formats)) as task:
        for kind in formats:
            made = target(kind)
            path = ctx.folder / made.file
            write_atomic(path, made.write(trained))
            measured = parity(predict(path, images, ctx.folder), interface.outputs_of(reference))
            described = described_input(made, interface, network.arch), (described_output(interface, network.arch),)
            files.append(describe_file(ctx.folder, kind, measured, *described))
            task.advance(note=path.name)
    return Bundle(
        architecture=network.arch,
        labels=test.names,
        preprocessing=preprocessing(data, test),
        macs=network.arch.macs,
        params=network.arch.params,
        torch_accuracy=float((predictions == labels).mean()),
        test_images=len(test),
        files=tuple(files),
        labels_file=write_labels(ctx.folder, test.names),
        score_calibration=None if calibrated is None else calibrated.part(),
        versions=tool_versions(),
    )


@dataclass(frozen=True)
class _Calibrated:
    """A score calibration, and the images that it was fitted to."""

    fitted: ScoreCalibration
    images: int

    def part(self) -> CalibrationPart:
        """What the bundle says of it."""
        return CalibrationPart(
            images=self.images,
            source="a fixed random half of the test images; judge it by the others (training has seen all images that are not for tests)",
            transformation=self.fitted.transformation,
            slopes=self.fitted.slopes,
            offsets=self.fitted.offsets,
        )


def _score_calibration(network: Network, test: Images, interface: Interface, workers: int) -> _Calibrated:
    """Fitted to PyTorch's outputs for half of the test images: the final training has seen all others."""
    half = Portion(test, CALIBRATION_PORTION)
    pairs = [
        (torch_logits(network, x_NCHW.permute(0, 2, 3, 1).numpy()), y.numpy())
        for x_NCHW, y in evaluation_batches(half, 256, workers=workers)
    ]
    logits, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    transformation: Transformation = "INVERSE_LOGISTIC" if interface.softmax else "IDENTITY"
    return _Calibrated(score_calibration.fit(interface.outputs_of(logits), labels, transformation), len(labels))


class Export(Stage):
    """Writes the trained network's files, and compares each with PyTorch on this computer."""

    name = "export"
    result = "bundle.json"

    @property
    def outputs(self) -> list[str]:
        """The bundle and its files."""
        return outputs(self.at.experiment.export_formats)

    def inputs(self) -> dict[str, str]:
        """The weights, the data and the settings."""
        sections = ("export", "detector") if self.at.experiment.task == "detect" else ("export",)
        trained = self.at.hash_of(self.at.path("train", "model.safetensors"), "train")
        return {**trained, **self.at.hashes_of_data(), **self.at.hashes_of_config(*sections)}

    def summary(self) -> str:
        """The formats."""
        return ", ".join(self.at.experiment.export_formats)

    def run(self, ctx: StageContext) -> None:
        """Write them."""
        run(ctx, connect(HOST).predict)
