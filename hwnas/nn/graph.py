"""Runs the graph of a network of cells, or of a detector's neck (``hwnas.core.graph``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from timm.layers import drop_path as timm_drop_path
from torch import Tensor

from hwnas.core.graph import Step


def edge_points(graph: Sequence[Step]) -> frozenset[int]:
    """The points of a graph that the ops on the edges of its cells make, for drop-path
    (Larsson et al., arXiv 1605.07648) as in DARTS's code: all terms of sums but those that
    are passed on unchanged (skip connections).

    Such a point is read once, by a sum. So may be a cell's preprocessed input, if a skip
    connection is all that reads it; one that reads the concatenation of another cell is
    told apart by that.

    *Differences from the code*: in the first two cells, such an input counts as an edge;
    and a node with a single edge makes no sum, so that its op is never dropped (the second
    node of NAS-Bench-201's cells).
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
    graph: Sequence[Step],
    blocks: Iterable[Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    outputs: Sequence[int],
    *,
    side: int | None = None,
    drop_path: float = 0.0,
) -> list[Tensor]:
    """The points ``outputs`` of a graph whose first points are the ``inputs`` [N, C, H,
    W]. Each point is freed after its last use.

    ``side`` is the height = width of the images that the graph is for; training may begin
    with smaller ones. Images lose each of the ``edge_points`` with the probability
    ``drop_path``.
    """
    assert not drop_path or len(inputs) == 1, "edge_points are those of graphs with one input"
    edges = edge_points(graph) if drop_path else frozenset()
    last_use: dict[int, int] = {}
    for position, step in enumerate(graph):
        for point in step.of:
            last_use[point] = position
    for point in outputs:
        last_use.pop(point, None)

    points = dict(enumerate(inputs))
    remaining_blocks = iter(blocks)
    for position, step in enumerate(graph):
        read = [points[point] for point in step.of]
        if step.kind == "zero":
            assert side is not None, "only images have a size from which zeros follow"
            result = _zeros(step, inputs[0], side)
        else:
            result = _run_step(step, read, remaining_blocks)
        point_made = len(inputs) + position
        if point_made in edges:
            result = timm_drop_path(result, drop_path, True)
        points[point_made] = result
        for point in set(step.of):
            if last_use.get(point) == position:
                del points[point]
    return [points[point] for point in outputs]


def _zeros(step: Step, x_NCHW: Tensor, side: int) -> Tensor:
    """The zeros of a step for the images ``x_NCHW`` of a graph for images of ``side``."""
    size = step.size * x_NCHW.shape[-1] // side
    zeros = x_NCHW.new_zeros(x_NCHW.shape[0], step.channels, size, size)
    return zeros.contiguous(memory_format=torch.channels_last)


def _run_step(
    step: Step, read: list[Tensor], blocks: Iterator[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The output of a step that ``read`` these points. An ``op`` step takes the next one
    of ``blocks``.
    """
    if step.kind == "op":
        return next(blocks)(read[0])
    if step.kind == "concat":
        return torch.cat(read, dim=1)
    if step.kind == "cut":
        return read[0][:, : step.channels]
    total = read[0]
    for term in read[1:]:
        total = total + term
    return total
