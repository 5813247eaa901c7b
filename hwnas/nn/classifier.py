"""Standalone classifiers: the blocks of an architecture in sequence, or wired as its
graph says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from timm.layers import drop_path as timm_drop_path
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.graph import Step
from hwnas.nn.blocks import build, initialise
from hwnas.nn.freezing import Freezable


class ClassificationNetwork(Freezable):
    """The torch module of an architecture without a detector.

    Example:
        >>> from hwnas.core.spaces import published
        >>> arch = published("mobilenet_v2", resolution=64)
        >>> ClassificationNetwork(arch).eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    drop_path: float = 0.0
    """In a graph of cells: the probability that an image loses the op of an edge in
    training. See ``edge_points``.
    """

    def __init__(
        self, arch: Architecture, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        assert arch.detector is None, f"{arch.name} has a detector: build a DetectionNetwork"
        self.arch = arch
        self.blocks = nn.Sequential(
            *(build(op, bn_eps=arch.bn_eps, dropout=dropout) for op in arch.ops())
        )
        if generator is not None:
            initialise(self, generator)

    @property
    def backbone_blocks(self) -> int:
        """All blocks but the classifier."""
        return len(self.blocks) - 1

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): the classifier's,
        as in TuNAS's code.
        """
        return {f"blocks.{len(self.blocks) - 1}.linear.weight"}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> logits [N, classes]."""
        if self.arch.graph:
            drop_path = self.drop_path if self.training else 0.0
            return run_graph(self.arch, self.blocks, x_NCHW, drop_path)
        logits: Tensor = self.blocks(x_NCHW)
        return logits


def edge_points(graph: Sequence[Step]) -> frozenset[int]:
    """The points of a graph that the ops on the edges of its cells make, for drop-path
    (Larsson et al., arXiv 1605.07648) as in DARTS's code: all terms of sums but those that
    are passed on unchanged (skip connections).

    Such a point is read once, by a sum. So may be a cell's preprocessed input, if a skip
    connection is all that reads it; one that reads the concatenation of another cell is
    told apart by that.

    *Difference from the code*: in the first two cells, such an input counts as an edge.
    """
    readers: dict[int, list[Step]] = {}
    for step in graph:
        for point in step.of:
            readers.setdefault(point, []).append(step)
    edges = set()
    for position, step in enumerate(graph):
        read_by = [reader.kind for reader in readers.get(position + 1, ())]
        # point 0 is the image
        is_preprocessed = any(point > 0 and graph[point - 1].kind == "concat" for point in step.of)
        if step.kind == "op" and read_by == ["sum"] and not is_preprocessed:
            edges.add(position + 1)
    return frozenset(edges)


def run_graph(
    arch: Architecture, blocks: Iterable[nn.Module], x_NCHW: Tensor, drop_path: float = 0.0
) -> Tensor:
    """The last point of an architecture's graph (``hwnas.core.graph``) for the images
    ``x_NCHW``. Each point is freed after its last use. Images lose each of the
    ``edge_points`` with the probability ``drop_path``.
    """
    graph = arch.graph
    edges = edge_points(graph) if drop_path else frozenset()
    last_use: dict[int, int] = {}
    for position, step in enumerate(graph):
        for point in step.of:
            last_use[point] = position

    points: dict[int, Tensor] = {0: x_NCHW}
    remaining_blocks = iter(blocks)
    for position, step in enumerate(graph):
        inputs = [points[point] for point in step.of]
        if step.kind == "zero":
            # training may begin with smaller images than the architecture is for
            size = step.size * x_NCHW.shape[-1] // arch.resolution
            zeros = x_NCHW.new_zeros(x_NCHW.shape[0], step.channels, size, size)
            points[position + 1] = zeros.contiguous(memory_format=torch.channels_last)
        else:
            points[position + 1] = _run_step(step, inputs, remaining_blocks)
        if position + 1 in edges:
            points[position + 1] = timm_drop_path(points[position + 1], drop_path, True)
        for point in set(step.of):
            if last_use[point] == position:
                del points[point]
    return points[len(graph)]


def _run_step(step: Step, inputs: list[Tensor], blocks: Iterator[nn.Module]) -> Tensor:
    """The output of a step that reads ``inputs``. An ``op`` step takes the next one of
    ``blocks``.
    """
    if step.kind == "op":
        y_NCHW: Tensor = next(blocks)(inputs[0])
        return y_NCHW
    if step.kind == "concat":
        return torch.cat(inputs, dim=1)
    if step.kind == "cut":
        return inputs[0][:, : step.channels]
    total = inputs[0]
    for term in inputs[1:]:
        total = total + term
    return total
