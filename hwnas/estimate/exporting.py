"""The export stage: a network of random weights is written as the trained one will be;
sizes are of weights.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Estimate, Part, peak_memory
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.export.target import Trained, target
from hwnas.nn.network import network_of

CALIBRATED = 4
"""Images that an int8 file is calibrated with here: most of its time goes into the
file, not into them.
"""
BYTES_OF_A_WEIGHT = {"fp32": 4.0, "int8": 1.1}
"""int8 files hold a scale and a bias per channel, too."""


def disk_bytes(experiment: Experiment, arch: Architecture) -> float:
    """The files, and the images that they are compared on."""
    files = sum(
        arch.params * BYTES_OF_A_WEIGHT.get(target(kind).dtype, BYTES_OF_A_WEIGHT["fp32"])
        for kind in experiment.export_formats
    )
    return files + 4.0 * experiment.export.parity_images * arch.in_channels * arch.resolution**2


def of_export(ctx: Context) -> Estimate:
    """Time the writing of every file with random weights, of int8 files with a few
    calibration images.
    """
    experiment, arch, watch = ctx.experiment, ctx.arch, ctx.watch
    network = network_of(arch, generator=torch.Generator().manual_seed(0)).eval()
    images = np.zeros((CALIBRATED, arch.resolution, arch.resolution, arch.in_channels), np.float32)
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
    parts, late = [], []
    for made in map(target, experiment.export_formats):
        if watch.over:
            late.append(made.file)
        else:
            parts.append(Part(made.file, 1, watch.once(partial(made.write, trained))))
    unknown = f"no time was left to write {' and '.join(late)}" if late else ""
    return Estimate(tuple(parts), peak_memory(), disk_bytes(experiment, arch), unknown)
