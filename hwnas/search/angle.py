"""The angle that training has turned an architecture's weights by.

Hu, Liang, Guo, Wan, Zhang, Wei, Gu, Sun: "Angle-based Search Space Shrinking for Neural
Architecture Search" (ECCV 2020, arXiv 2004.13431); released code megvii-model/AngleNAS.
With V(A; W) all weights that architecture A uses of the super-net's weights W, in one
long vector, and W0 what they were at first (equation 2):

    angle(A) = arccos( <V(A; W0), V(A; W)> / (|V(A; W0)| * |V(A; W)|) )

W0 may also be the weights after some training: in the released code after the first
epoch on NAS-Bench-201, after the fifth on DARTS's cells (``study.base_epochs``,
``shrink.base_epochs``).

One cosine, and no mean of those of layers. Of a chain, V holds the convolution and
linear weights of stem, blocks, head and classifier; identity contributes nothing, nor
do BN and biases. Of cells, V goes along every path from a cell's inputs to its output
(``CellSupernet.angle_parts``). A larger angle is taken for better. It needs no images.

*Differences from the paper*: squeeze-and-excitation's convolutions count as
convolutions. In DARTS's cells only the edges that a node keeps count, and a path ends
at every node, as all of them are the output; the paper's code has one operator on every
edge there, and 16 paths, which end at the last node.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hwnas.core.space import Option
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import Supernet, make_supernet

Moments = tuple[float, float, float]
"""<a, b>, <a, a>, <b, b> of two vectors: what an angle is made of. Those of a
concatenation are the sums of its parts'.
"""


@torch.no_grad()
def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Of all pairs of tensors as two long vectors."""
    product = norm_a = norm_b = 0.0
    for before, after in pairs:
        a, b = before.double().flatten(), after.double().flatten()
        product, norm_a, norm_b = (
            product + float(a @ b),
            norm_a + float(a @ a),
            norm_b + float(b @ b),
        )
    return product, norm_a, norm_b


def arc(found: Moments) -> float:
    """The angle in radians, 0 to pi; nan where a vector is 0 or not finite.

    Example:
        >>> round(arc((1.0, 1.0, 2.0)), 4)  # (1, 0) and (1, 1)
        0.7854
    """
    product, norm_a, norm_b = found
    scale = math.sqrt(norm_a * norm_b) if norm_a * norm_b > 0 else math.nan
    cosine = product / scale
    return math.acos(max(-1.0, min(1.0, cosine))) if math.isfinite(cosine) else math.nan


class Angles:
    """The angles of the architectures of two super-nets of classifiers, of one space
    and one way to share weights.

    Part by part the moments are kept, so that the angle of a further architecture costs
    next to nothing.

    Example:
        >>> Angles(initial, trained).of(picks)   # doctest: +SKIP
        0.4171
    """

    def __init__(self, initial: Supernet, trained: Supernet) -> None:
        # random channels are for training
        self.initial, self.trained = initial.eval(), trained.eval()
        self._known: dict[Hashable, Moments] = {}

    def of(self, picks: Mapping[str, Option]) -> float:
        """The angle of an architecture, in radians."""
        parts = self.trained.angle_parts(picks)
        counted = ([times * number for number in self._part(part)] for part, times in parts)
        product, norm_a, norm_b = (math.fsum(column) for column in zip(*counted, strict=True))
        return arc((product, norm_a, norm_b))

    def _part(self, part: Hashable) -> Moments:
        if part not in self._known:
            self._known[part] = moments(
                zip(self.initial.angle_weights(part), self.trained.angle_weights(part), strict=True)
            )
        return self._known[part]


def initial_supernet(supernet: Supernet, seed: int) -> Supernet:
    """A trained super-net as it was when ``seed`` initialised it."""
    fresh = make_supernet(supernet.space, torch.Generator().manual_seed(seed), supernet.config)
    return fresh.to(next(supernet.parameters()).device).eval()


def weights(network: ClassificationNetwork) -> Iterator[Tensor]:
    """Convolution and linear weights, input to output: no BN, no biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield module.weight
