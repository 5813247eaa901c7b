"""The export stage: a network of random weights is written as the trained one will be; sizes are of weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.estimate.parts import Estimate, Part, Stopwatch, peak_memory
from hwnas.export.bundle import FILES
from hwnas.export.onnx_writer import write_onnx
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_writer import write_heads, write_tflite
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import AnyNetwork, network_of

CALIBRATED = 4
"""Images that an int8 file is calibrated with here: most of its time goes into the file, not into them."""
BYTES_OF_A_WEIGHT = {"fp32": 4.0, "int8": 1.1}
"""int8 files hold a scale and a bias per channel, too."""


def disk_bytes(experiment: Experiment, arch: Architecture) -> float:
    """The files, and the images that they are compared on."""
    files = sum(arch.params * BYTES_OF_A_WEIGHT[FILES[kind][2]] for kind in experiment.export_formats)
    return files + 4.0 * experiment.export.parity_images * arch.in_channels * arch.resolution**2


def of_export(experiment: Experiment, arch: Architecture, watch: Stopwatch) -> Estimate:
    """Time the writing of each kind of file with random weights, and the quantisation with a few calibration images."""
    network = network_of(arch, generator=torch.Generator().manual_seed(0)).eval()
    images = np.zeros((CALIBRATED, arch.resolution, arch.resolution, arch.in_channels), np.float32)
    seconds: dict[str, Callable[[], object]] = {
        "onnxruntime-fp32": lambda: write_onnx(network),
        "litert-fp32": lambda: _tflite(network),
        "litert-int8": lambda: quantize_int8(_tflite(network), [images], float_io=True),
    }
    made = ["-".join(FILES[kind][1:]) for kind in experiment.export_formats]
    parts, late = [], []
    for kind in dict.fromkeys(made):
        if watch.over:
            late.append(kind)
        else:
            parts.append(Part(f"{kind} files", made.count(kind), watch.once(seconds[kind])))
    unknown = f"no time was left to write a network for {' and '.join(late)}" if late else ""
    return Estimate(tuple(parts), peak_memory(), disk_bytes(experiment, arch), unknown)


def _tflite(network: AnyNetwork) -> bytes:
    return write_heads(network) if isinstance(network, DetectionNetwork) else write_tflite(network)
