"""Knowledge distillation: a trained network as the teacher of another one.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531: the
student also learns the probabilities that the teacher gives to all classes, at a
temperature T that makes them softer. With the share s, the loss is

    2 ((1 - s) CE(labels, student) + s T^2 CE(softmax(teacher / T), softmax(student / T)))

*Differences from the paper*: T = 1 and s = 1/2 by default, as in once-for-all's code, which
adds the two cross-entropies; hence the factor 2. The first one is that of ``train.loss``.
The teacher sees the images that the student sees, augmented and mixed, at its own
resolution; it is in evaluation mode, gets no gradient and is not part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from hwnas.config import DataConfig, TrainConfig
from hwnas.core.arch import Architecture
from hwnas.core.size import Size, each_side, sides
from hwnas.document import file_sha256
from hwnas.engine import Distillation
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network
from hwnas.nn.pretrained import is_own_network, load_timm_model, pretrained_file, timm_model_of
from hwnas.nn.shared import resized

KEY = "train.teacher"


def _in_the_shape_of(resolution: Size, side: int) -> Size:
    """The size in the shape of ``resolution`` whose smaller side is ``side``."""
    smaller = min(sides(resolution))
    return each_side(resolution, lambda pixels: round(pixels * side / smaller))


class Teacher:
    """The network of ``train.teacher``, on ``device``.

    Raises ConfigError if it is not a classifier of the classes of ``data`` for images of
    its channels, or if its file or its model is unknown; CheckpointError if the file is
    damaged.
    """

    def __init__(
        self, config: TrainConfig, data: DataConfig, device: torch.device | None = None
    ) -> None:
        assert config.teacher is not None
        self.distillation = Distillation(config.teacher_share, config.teacher_temperature)
        self.resolution = data.resolution
        self.renormalise: v2.Normalize | None = None
        """Turns images that are normalised for the student into those for the teacher."""
        path = pretrained_file(config.teacher, KEY)
        network: nn.Module
        if is_own_network(path):
            network = load_network(path)
            _check_fits(config.teacher, network.arch, data)
            self.resolution = network.arch.size
        else:
            network = load_timm_model(config.teacher, config.teacher_model, data, KEY)
            name = timm_model_of(config.teacher, config.teacher_model, path)
            trained = None if name is None else timm.get_pretrained_cfg(name)
            if trained is not None:
                self.resolution = _in_the_shape_of(data.resolution, trained.input_size[-1])
                self.renormalise = _renormalisation(data, trained.mean, trained.std)
        network.to(device or torch.device("cpu"))
        network.to(memory_format=torch.channels_last)
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def probabilities(self, x_NCHW: Tensor) -> Tensor:
        """What the teacher says of a batch of images, at the temperature: probabilities
        [N, classes].
        """
        if self.renormalise is not None:
            x_NCHW = self.renormalise(x_NCHW)
        sized_NCHW = resized(x_NCHW, self.resolution)
        logits: Tensor = self.network(sized_NCHW.contiguous(memory_format=torch.channels_last))
        return torch.softmax(logits.float() / self.distillation.temperature, 1)


def _renormalisation(
    data: DataConfig, mean: Sequence[float], std: Sequence[float]
) -> v2.Normalize | None:
    """Turns images that are normalised as ``data`` says into those for ``mean`` and ``std``
    per channel; None if they are the same.
    """
    own_mean_C, own_std_C = np.array(data.mean), np.array(data.std)
    mean_C, std_C = np.array(mean), np.array(std)
    if len(mean_C) != data.channels:
        # grey images have the averages over the colours, as in timm
        mean_C, std_C = mean_C.mean(keepdims=True), std_C.mean(keepdims=True)
    if np.allclose((mean_C, std_C), (own_mean_C, own_std_C), rtol=0, atol=1e-3):
        return None
    # (x own_std + own_mean - mean) / std
    shift_C, scale_C = (mean_C - own_mean_C) / own_std_C, std_C / own_std_C
    return v2.Normalize(shift_C.tolist(), scale_C.tolist())


def _check_fits(teacher: str, arch: Architecture, data: DataConfig) -> None:
    """Raise ConfigError if an earlier run's network is not a classifier of the data."""
    classes, channels = data.classes, data.channels
    if arch.task != "classify" or arch.classes != classes or arch.in_channels != channels:
        raise ConfigError(
            f"{KEY} = {teacher!r} is {arch.name!r} for {arch.classes} classes and"
            f" {arch.in_channels} channels, but the data has {classes} and {channels}: name a"
            " network that was trained on the same classes."
        )


def teacher_hashes(teacher: str, model: str | None) -> dict[str, str]:
    """What a training with a teacher depends on, as inputs of its stage: the content of the
    file, and the model by which it is read, unless the file says it.
    """
    path = pretrained_file(teacher, KEY)
    hashes = {"teacher": file_sha256(path)}
    if not is_own_network(path):
        hashes["teacher model"] = timm_model_of(teacher, model, path) or "unknown"
    return hashes
