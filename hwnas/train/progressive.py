"""Progressive resizing: a training that begins with small images.

Tan, Le, "EfficientNetV2: Smaller Models and Faster Training", arXiv 2104.00298, algorithm 1:
the training is divided into M stages of equal length. With S_0 pixels at the start and S_e
at the end, the height and width of the images in stage i = 0 .. M - 1 are

    S_i = S_0 + (S_e - S_0) i / (M - 1)

Early epochs then cost a fraction of the later ones. The last stage has the network's own
resolution, so BN's statistics and the weights are those for it.

*Differences from the paper*: dropout and augmentation do not grow with the size. Images are
loaded and augmented at the full size and then resized on the device, so loading them takes
as long as ever; a teacher sees them at its own resolution. Sizes are rounded to multiples
of the network's total stride, which networks of cells require.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hwnas.config import ProgressiveConfig
from hwnas.core.arch import Architecture
from hwnas.core.size import sides, square
from hwnas.errors import ConfigError


@dataclass(frozen=True)
class Progression:
    """The ``sizes`` of the images in pixels, in stages of equal length over ``steps``
    steps.
    """

    sizes: tuple[int, ...]
    steps: int

    def size(self, step: int) -> int:
        """Height = width of the images in a step, counted from 0."""
        return self.sizes[step * len(self.sizes) // self.steps]

    @property
    def begins(self) -> tuple[int, ...]:
        """The first steps of the stages, of which short trainings may lack some."""
        stages = len(self.sizes)
        begins = {math.ceil(stage * self.steps / stages) for stage in range(stages)}
        return tuple(sorted(begins - {self.steps}))


def progression_of(config: ProgressiveConfig, arch: Architecture, steps: int) -> Progression:
    """The sizes for a training of an architecture."""
    full = square(arch.size, "train.progressive")
    stride = total_stride(arch)
    first = config.start * full
    sizes = []
    for stage in range(config.stages - 1):
        size = first + (full - first) * stage / (config.stages - 1)
        rounded = stride * round(size / stride)
        sizes.append(min(full, max(stride, rounded)))
    if config.start < 1 and set(sizes) == {full}:
        raise ConfigError(
            f"train.progressive.start = {config.start:g} has no effect: images of {full} px are too"
            f" small for several sizes that are multiples of {stride}, the network's stride; remove"
            " it."
        )
    return Progression((*sizes, full), steps)


def total_stride(arch: Architecture) -> int:
    """By how much a classifier shrinks an image before it takes the average: 32 in most
    mobile networks.
    """
    last_map = next(op.size for op in arch.ops() if op.pooled)
    return int(2 ** round(math.log2(max(arch.size_HW) / max(sides(last_map)))))
