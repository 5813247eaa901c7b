"""The angle that training has turned an architecture's weights by.

Hu, Liang, Guo, Wan, Zhang, Wei, Gu, Sun: "Angle-based Search Space Shrinking for Neural Architecture Search" (ECCV 2020, arXiv
2004.13431); released code megvii-model/AngleNAS. With V(A; W) all weights that architecture A uses of the super-net's weights W, in
one long vector, and W0 what they were at first (equation 2):

    angle(A) = arccos( <V(A; W0), V(A; W)> / (|V(A; W0)| * |V(A; W)|) )

One cosine, and no mean of those of layers. Of a chain, V holds the convolution and linear weights of stem, blocks, head and
classifier; identity contributes nothing, nor do BN and biases. A larger angle is taken for better. It needs no images.

*Differences from the paper*: squeeze-and-excitation's convolutions count as convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.core.space import Option
from hwnas.nn.network import Network
from hwnas.nn.supernet import Supernet

Moments = tuple[float, float, float]
"""<a, b>, <a, a>, <b, b> of two vectors: what an angle is made of. Those of a concatenation are the sums of its parts'."""


@torch.no_grad()
def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Of all pairs of tensors as two long vectors."""
    product = norm_a = norm_b = 0.0
    for before, after in pairs:
        a, b = before.double().flatten(), after.double().flatten()
        product, norm_a, norm_b = product + float(a @ b), norm_a + float(a @ a), norm_b + float(b @ b)
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


def angle(initial: Network, trained: Network) -> float:
    """The angle between the weights of two networks of one architecture, in radians."""
    return arc(moments(zip(weights(initial), weights(trained), strict=True)))


class Angles:
    """The angles of the architectures of two super-nets of classifiers, of one space and one way to share weights.

    Slot by slot the moments are kept, so that the angle of a further architecture costs next to nothing.

    Example:
        >>> Angles(initial, trained).of(picks) == angle(initial.extract(picks), trained.extract(picks))   # doctest: +SKIP
        True
    """

    def __init__(self, initial: Supernet, trained: Supernet) -> None:
        self.initial, self.trained = initial.eval(), trained.eval()  # random channels are for training
        self._known: dict[Any, Moments] = {}

    def of(self, picks: Mapping[str, Option]) -> float:
        """The angle of an architecture, in radians."""
        path = self.trained.path(picks)
        parts = [self._slot(*step) for step in path]
        product, norm_a, norm_b = (math.fsum(column) for column in zip(*parts, self._classifier(path[-1][2].out_ch), strict=True))
        return arc((product, norm_a, norm_b))

    def _slot(self, position: int, option: str, op: Any, source: int) -> Moments:
        key = (position, option, op, source)
        if key not in self._known:
            before, after = (self._tensors(supernet, *key) for supernet in (self.initial, self.trained))
            self._known[key] = moments((before[name], after[name]) for name in after if name.endswith("conv.weight"))
        return self._known[key]

    @staticmethod
    def _tensors(supernet: Supernet, position: int, option: str, op: Any, source: int) -> dict[str, Tensor]:
        slot: Any = supernet.slots[position]
        tensors: dict[str, Tensor] = slot.weights(option, op, source)
        return tensors

    def _classifier(self, width: int) -> Moments:
        if width not in self._known:
            self._known[width] = moments([(self.initial.classifier.weight[:, :width], self.trained.classifier.weight[:, :width])])
        return self._known[width]


def initial_supernet(supernet: Supernet, seed: int) -> Supernet:
    """A trained super-net as it was when ``seed`` initialised it."""
    fresh = Supernet(supernet.space, torch.Generator().manual_seed(seed), supernet.config)
    return fresh.to(next(supernet.parameters()).device).eval()


def weights(network: Network) -> Iterator[Tensor]:
    """Convolution and linear weights, input to output: no BN, no biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield module.weight
