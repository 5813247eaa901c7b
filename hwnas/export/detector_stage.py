"""Exporting a detector: its files, what PyTorch finds in the test images, and how near each file comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hwnas.core.detector import PostProcessing
from hwnas.data.coco import CocoImages
from hwnas.data.images import load_images, sampled_images
from hwnas.detection import average_precision, detect
from hwnas.document import write_atomic
from hwnas.errors import ConfigError
from hwnas.export.bundle import (
    Bundle,
    DetectorFile,
    DetectorPart,
    Output,
    Parity,
    describe_file,
    described_input,
    preprocessing,
    save_parity,
    tool_versions,
    write_labels,
)
from hwnas.export.detector import Decoded, columns
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.export.names import CHOSEN, DETECTIONS, TASK_OUTPUTS
from hwnas.export.post_processing import NMS_COLUMNS, READERS, Found, iou
from hwnas.export.target import Graph, Trained, target
from hwnas.nn.detector import DetectionNetwork
from hwnas.runs import StageContext

Predict = Callable[[Path, np.ndarray, Path], np.ndarray]

ROWS_BYTES = 16 * 2**20
"""What PyTorch's rows of the parity images take in a bundle, at most."""
BATCH = 16
BEST = 10
"""Detections of PyTorch's per image that a file with NMS in its graph has to find."""


def run(ctx: StageContext, network: DetectionNetwork, predict: Predict) -> Bundle:
    """Write the files and ``parity.npz``; return what ``bundle.json`` has to say. ``predict(file, images, folder)`` runs a file."""
    experiment, arch = ctx.experiment, network.arch
    config, formats, data = experiment.export, experiment.export_formats, experiment.data.at(network.arch.resolution)
    settings = experiment.detector.post_processing
    train, test = load_images(data, "train"), load_images(data, "test")
    if not isinstance(test, CocoImages):
        raise ConfigError(f"data.name = {data.name!r} has no boxes, but {arch.name!r} is a detector: name the data it was trained on.")
    found = detect(network, test, settings, batch_size=BATCH, workers=data.workers)
    ap = average_precision(test, found).AP
    interface = Interface(config.input, False, data.mean, data.std)
    card = ModelCard(arch.name, data.channels, test.names, "decoded", interface.normalisation, test.resizing)
    trained = Trained(network, interface, sampled_images(train, config.calibration_images), card, settings)
    decoded = Decoded(network).eval()
    anchors, width = len(decoded.get_buffer("centres_A4")), columns(network)
    count = min(config.parity_images, max(1, ROWS_BYTES // (4 * anchors * width)))
    images = interface.fed(sampled_images(test, count))
    rows = torch_rows(decoded, interface.seen(images))
    kept = [torch.cat((each.boxes_D4, each.scores_D[:, None], each.classes_D[:, None]), dim=1).numpy() for each in found.values()]
    counts = np.array([len(each) for each in kept])
    save_parity(ctx.folder / "parity.npz", images=images, rows=rows, found=np.concatenate(kept).astype(np.float32), counts=counts)
    files = []
    with ctx.progress.task("exporting", len(formats)) as task:
        for kind in formats:
            made = target(kind)
            path = ctx.folder / made.file
            write_atomic(path, made.write(trained))
            measured = detector_parity(made.graph, predict(path, images, ctx.folder), rows, settings, arch.resolution)
            files.append(describe_file(ctx.folder, kind, measured, described_input(made, interface, arch)))
            task.advance(note=path.name)
    ctx.progress.say(f"PyTorch: AP {ap:.1%} on {len(test)} test images")
    return Bundle(
        architecture=arch,
        labels=test.names,
        preprocessing=preprocessing(data, test),
        macs=arch.macs,
        params=arch.params,
        torch_ap=ap,
        test_images=len(test),
        files=tuple(files),
        detector=DetectorPart(
            anchors=anchors,
            post_processing=settings,
            files={target(kind).file: described(target(kind).graph, anchors, width, settings.detections) for kind in formats},
        ),
        labels_file=write_labels(ctx.folder, test.names),
        versions=tool_versions(),
    )


@torch.inference_mode()
def torch_rows(decoded: Decoded, images_NHWC: np.ndarray) -> np.ndarray:
    """PyTorch's float32 [N, anchors, 4 + classes] for channels-last images, on the CPU."""
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    rows: np.ndarray = torch.cat([decoded(x_NCHW[at : at + BATCH]) for at in range(0, len(x_NCHW), BATCH)]).numpy()
    return rows


def described(graph: Graph, anchors: int, width: int, detections: int) -> DetectorFile:
    """What comes out of a file with this in its graph, in words and shapes."""
    if graph == "decoded":
        row = "per anchor: x1, y1, x2, y2 in pixels of the model's input, cut off at its edges; then a score in 0..1 per label"
        return DetectorFile(graph=graph, outputs=(Output(name=DETECTIONS, shape=(1, anchors, width), meaning=row),))
    if graph == "nms":
        row = (
            "best first: x1, y1, x2, y2 in pixels of the model's input, cut off at its edges; score in 0..1; position of the label; "
            "rows after the last detection are 0"
        )
        return DetectorFile(graph=graph, outputs=(Output(name=CHOSEN, shape=(1, detections, NMS_COLUMNS), meaning=row),))
    shapes = ((1, detections, 4), (1, detections), (1, detections), (1,))
    meanings = (
        "best first: ymin, xmin, ymax, xmax in parts of the model's input, not cut off at its edges",
        "position of the label",
        "score in 0..1",
        "number of detections; what follows them is undefined",
    )
    named = zip(TASK_OUTPUTS, shapes, meanings, strict=True)
    return DetectorFile(graph=graph, outputs=tuple(Output(name=name, shape=shape, meaning=meaning) for name, shape, meaning in named))


def detector_parity(graph: Graph, outputs: np.ndarray, rows: np.ndarray, settings: PostProcessing, resolution: int) -> Parity:
    """Compare a file's outputs [N, ...] with PyTorch's rows [N, anchors, 4 + classes].

    ``relative_error`` is the largest difference of a coordinate, in parts of the input, or of a score: over all anchors, and where the
    graph chooses the detections, over PyTorch's best of each image and what is nearest to them; a missing one counts 1, and so does
    a file with an output that is no number.
    ``agreement`` is the part of images whose best detection is of the same class, and overlaps PyTorch's with an IoU of 0.5 or more.
    """
    if not np.isfinite(outputs).all():
        return Parity(images=len(rows), relative_error=1.0, agreement=0.0)
    classes, options = rows.shape[-1] - 4, settings.model_dump()
    wanted = [READERS["decoded"](row, options, resolution, classes) for row in rows]
    found = [READERS[graph](row, options, resolution, classes) for row in outputs]
    if graph == "decoded":
        differences = np.abs(outputs.reshape(rows.shape) - rows)
        error = max(float(differences[..., :4].max()) / resolution, float(differences[..., 4:].max()))
    else:
        error = max(_furthest(one, other, resolution) for one, other in zip(wanted, found, strict=True))
    agreement = float(np.mean([_same_best(one, other) for one, other in zip(wanted, found, strict=True)]))
    return Parity(images=len(rows), relative_error=error, agreement=agreement)


def _furthest(wanted: Found, found: Found, resolution: int) -> float:
    errors = [0.0]
    for box, score, label in zip(*(part[:BEST] for part in wanted), strict=True):
        same = found[2] == label
        distances = np.maximum(np.abs(found[0][same] - box).max(axis=1) / resolution, np.abs(found[1][same] - score))
        errors.append(float(distances.min(initial=1.0)))
    return max(errors)


def _same_best(one: Found, other: Found) -> bool:
    if not len(one[1]) or not len(other[1]):
        return len(one[1]) == len(other[1])
    return bool(one[2][0] == other[2][0] and iou(np.stack([one[0][0], other[0][0]]))[0, 1] >= 0.5)


def torch_found(counts: Sequence[int], found: np.ndarray) -> list[Found]:
    """What PyTorch found in each test image, of a bundle's ``parity.npz``, in ``evaluation_order``."""
    parts = np.split(found, np.cumsum(counts)[:-1])
    return [(part[:, :4], part[:, 4], part[:, 5].astype(np.int64)) for part in parts]
