"""The angle by which training has turned the weights of an architecture.

Hu, Liang, Guo, Wan, Zhang, Wei, Gu, Sun: "Angle-based Search Space Shrinking for Neural
Architecture Search" (ECCV 2020, arXiv 2004.13431); released code megvii-model/AngleNAS.
V(A; W) is a single long vector of all weights that architecture A uses of the super-net
weights W, and W0 are the initial weights. Then (equation 2):

    angle(A) = arccos( <V(A; W0), V(A; W)> / (|V(A; W0)| * |V(A; W)|) )

W0 may also be the weights after some training: in the released code, after the first
epoch on NAS-Bench-201 and after the fifth on DARTS's cells (``study.base_epochs``,
``shrink.base_epochs``).

It is the cosine of the whole vector rather than a mean over layers. On a chain, V
consists of the convolution and linear weights of stem, blocks, head and classifier;
identity, BN and biases contribute nothing. On cells, V follows every path from a cell's
inputs to its output (``CellSupernet.angle_parts``). A larger angle is considered
better. No images are needed.

*Differences from the paper*: the convolutions of squeeze-and-excitation count. In
DARTS's cells, only the edges that a node keeps count, and a path ends at every node,
because all nodes make up the output; there the paper's code has an operator on every
edge, and 16 paths, which end at the last node.
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
"""<a, b>, <a, a> and <b, b> of two vectors, which determine their angle. The moments of
concatenated vectors are the sums of the moments of the parts.
"""


@torch.no_grad()
def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """The moments of two vectors, made of all (before, after) pairs of tensors."""
    product = 0.0
    norm_a = 0.0
    norm_b = 0.0
    for before, after in pairs:
        # double: float32 loses small angles, whose cosine is almost 1
        a = before.double().flatten()
        b = after.double().flatten()
        product += float(a @ b)
        norm_a += float(a @ a)
        norm_b += float(b @ b)
    return product, norm_a, norm_b


def arc(vector_moments: Moments) -> float:
    """The angle in radians, 0 to pi; nan if a vector is 0 or not finite.

    Example:
        >>> round(arc((1.0, 1.0, 2.0)), 4)  # (1, 0) and (1, 1)
        0.7854
    """
    product, norm_a, norm_b = vector_moments
    if not norm_a * norm_b > 0:
        return math.nan
    cosine = product / math.sqrt(norm_a * norm_b)
    if not math.isfinite(cosine):
        return math.nan
    # rounding may carry the cosine beyond 1
    return math.acos(max(-1.0, min(1.0, cosine)))


class Angles:
    """The angles of architectures between two super-nets of classifiers, which have the
    same space and share weights in the same way.

    The moments of every part are cached, so the angle of another architecture costs
    almost nothing.

    Example:
        >>> Angles(initial, trained).of(picks)   # doctest: +SKIP
        0.4171
    """

    def __init__(self, initial: Supernet, trained: Supernet) -> None:
        # eval: random channels are only for training
        self.initial = initial.eval()
        self.trained = trained.eval()
        self._known: dict[Hashable, Moments] = {}

    def of(self, picks: Mapping[str, Option]) -> float:
        """The angle of an architecture, in radians."""
        products = []
        norms_a = []
        norms_b = []
        for part, times in self.trained.angle_parts(picks):
            product, norm_a, norm_b = self._part_moments(part)
            products.append(times * product)
            norms_a.append(times * norm_a)
            norms_b.append(times * norm_b)
        # fsum is exact, so the order of the parts does not matter
        return arc((math.fsum(products), math.fsum(norms_a), math.fsum(norms_b)))

    def _part_moments(self, part: Hashable) -> Moments:
        """The moments of the weights of a part, cached."""
        if part not in self._known:
            self._known[part] = moments(
                zip(self.initial.angle_weights(part), self.trained.angle_weights(part), strict=True)
            )
        return self._known[part]


def initial_supernet(supernet: Supernet, seed: int) -> Supernet:
    """The super-net that ``seed`` initialises, with the options of ``supernet``."""
    fresh = make_supernet(supernet.space, torch.Generator().manual_seed(seed), supernet.config)
    return fresh.to(next(supernet.parameters()).device).eval()


def weights(network: ClassificationNetwork) -> Iterator[Tensor]:
    """Convolution and linear weights from input to output, without BN and biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield module.weight
