"""The estimate of the export stage: a network with random weights is written as the
trained one will be. File sizes are estimated from the number of weights.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.size import area
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Part, TimeEstimate, peak_memory
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.export.target import Trained, target
from hwnas.nn.network import network_of

CALIBRATED = 4
"""Images that calibrate an int8 file for the estimate. A few are enough, as most of the
time goes into the file.
"""
BYTES_OF_A_WEIGHT = {"fp32": 4.0, "int8": 1.1}
"""Bytes in a file per weight. int8 files also contain a scale and a bias per channel.
"""


def disk_bytes(experiment: Experiment, arch: Architecture) -> float:
    """Bytes of the exported files, and of the float32 images that they are
    compared on.
    """
    weights_bytes = 0.0
    for kind in experiment.export_formats:
        dtype = target(kind).dtype
        weights_bytes += arch.params * BYTES_OF_A_WEIGHT.get(dtype, BYTES_OF_A_WEIGHT["fp32"])
    values = experiment.export.parity_images * arch.in_channels * area(arch.size)
    return weights_bytes + 4.0 * values


def of_export(ctx: Context) -> TimeEstimate:
    """Time writing every file, with random weights; int8 files with a few calibration
    images.
    """
    experiment = ctx.experiment
    arch = ctx.arch
    network = network_of(arch, generator=torch.Generator().manual_seed(0)).eval()
    images = np.zeros((CALIBRATED, *arch.size_HW, arch.in_channels), np.float32)
    interface = Interface("float32", False, (0.0,) * arch.in_channels, (1.0,) * arch.in_channels)
    card = ModelCard(
        arch.name,
        arch.in_channels,
        ("",) * arch.classes,
        interface.output,
        interface.normalisation,
        "",
    )
    trained = Trained(network, interface, images, card)
    parts = []
    skipped = []
    for kind in experiment.export_formats:
        exporter = target(kind)
        if ctx.watch.over:
            skipped.append(exporter.file)
        else:
            seconds = ctx.watch.once(partial(exporter.write, trained))
            parts.append(Part(exporter.file, 1, seconds))
    unknown = ""
    if skipped:
        unknown = f"no time was left to write {' and '.join(skipped)}"
    return TimeEstimate(tuple(parts), peak_memory(), disk_bytes(experiment, arch), unknown)
