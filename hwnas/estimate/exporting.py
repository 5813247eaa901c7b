"""The export stage: one block is converted as the whole network will be; sizes are of weights."""

from __future__ import annotations

from functools import partial

import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.estimate.parts import Estimate, Part, Stopwatch, peak_memory
from hwnas.export.bundle import FILES
from hwnas.export.onnx import onnx_file
from hwnas.export.tflite import to_tflite
from hwnas.export.tflite_writer import write_heads
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import network_of

BLOCKS = 2
"""Blocks that are converted: the time of a conversion grows with their number."""
BYTES_OF_A_WEIGHT = {"fp32": 4.0, "int8": 1.1}
"""int8 files hold a scale and a bias per channel, too."""


def disk_bytes(experiment: Experiment, arch: Architecture) -> float:
    """The files, and the images that they are compared on."""
    files = sum(arch.params * BYTES_OF_A_WEIGHT[FILES[kind][2]] for kind in experiment.export_formats)
    return files + 4.0 * experiment.export.parity_images * arch.in_channels * arch.resolution**2


def of_export(experiment: Experiment, arch: Architecture, watch: Stopwatch) -> Estimate:
    """Time the conversion of a short network; an int8 file is a float file first.

    A detector's TFLite files are written without a converter, and from one graph: the whole is timed.
    """
    few = Architecture(name="timing", in_channels=arch.in_channels, blocks=arch.blocks[:BLOCKS])
    made = network_of(few, generator=torch.Generator().manual_seed(0)).eval()
    shape = (1, arch.in_channels, arch.resolution, arch.resolution)
    formats = experiment.export_formats
    factor = len(arch.ops()) / len(few.ops())
    runtimes = [FILES[kind][1] for kind in formats]
    parts, late = [], []
    for runtime, title in (("litert", "TFLite files"), ("onnxruntime", "ONNX files")):
        count = runtimes.count(runtime)
        if count and watch.over:
            late.append(title)
        elif count and runtime == "litert" and arch.detector is not None:
            parts.append(Part(title, count, watch.once(partial(write_heads, _detector(arch)))))
        elif count:
            convert = partial(to_tflite, made, shape) if runtime == "litert" else partial(onnx_file, made, shape, metadata={})
            first = watch.once(convert)  # imports the converter
            each = watch.once(convert) if not watch.over else first
            parts.append(Part(title, 1, max(0.0, first - each) + count * factor * each))
    unknown = f"no time was left to convert a network to {' and '.join(late)}" if late else ""
    return Estimate(tuple(parts), peak_memory(), disk_bytes(experiment, arch), unknown)


def _detector(arch: Architecture) -> DetectionNetwork:
    network = network_of(arch, generator=torch.Generator().manual_seed(0)).eval()
    assert isinstance(network, DetectionNetwork)
    return network
