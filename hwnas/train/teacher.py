"""Knowledge distillation: a trained network as the teacher of another one.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531: the
student also learns the probabilities that the teacher gives to all classes. As in
once-for-all's training, the loss is

    CE(labels, student) + CE(softmax(teacher), student)

*Differences from the paper*: temperature 1 and equal weights, as in once-for-all's code.
The teacher sees the images that the student sees, augmented and mixed, at its own
resolution; it is in evaluation mode, gets no gradient and is not part of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network
from hwnas.nn.shared import resized
from hwnas.train.initial_weights import trained_weights


class Teacher:
    """The network of ``train.teacher``, on ``device``. Raises ConfigError if it is not a
    classifier of ``classes`` for images of ``channels``, CheckpointError if its file is
    damaged.
    """

    def __init__(
        self, teacher: str, classes: int, channels: int, device: torch.device | None = None
    ) -> None:
        network = load_network(trained_weights(teacher, "train.teacher"))
        arch = network.arch
        if arch.task != "classify" or arch.classes != classes or arch.in_channels != channels:
            raise ConfigError(
                f"train.teacher = {teacher!r} is {arch.name!r} for {arch.classes} classes and"
                f" {arch.in_channels} channels, but the data has {classes} and {channels}: name a"
                " network that was trained on the same classes."
            )
        network.to(device or torch.device("cpu"))
        network.to(memory_format=torch.channels_last)
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def probabilities(self, x_NCHW: Tensor) -> Tensor:
        """What the teacher says of a batch of images: probabilities [N, classes]."""
        sized_NCHW = resized(x_NCHW, self.network.arch.resolution)
        logits: Tensor = self.network(sized_NCHW.contiguous(memory_format=torch.channels_last))
        return torch.softmax(logits.float(), 1)
