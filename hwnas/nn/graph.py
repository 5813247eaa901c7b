"""Runs the graph of a network of cells, or of a detector's neck (``hwnas.core.graph``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hwnas.core.graph import Step


def run_graph(
    graph: Sequence[Step],
    blocks: Iterable[Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    outputs: Sequence[int],
) -> list[Tensor]:
    """The points ``outputs`` of a graph whose first points are the ``inputs`` [N, C, size,
    size]. Each point is freed after its last use.
    """
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
        result = _run_step(step, read, remaining_blocks, inputs[0])
        points[len(inputs) + position] = result
        for point in set(step.of):
            if last_use.get(point) == position:
                del points[point]
    return [points[point] for point in outputs]


def _run_step(
    step: Step,
    read: list[Tensor],
    blocks: Iterator[Callable[[Tensor], Tensor]],
    x_NCHW: Tensor,
) -> Tensor:
    """The output of one step. An ``op`` step takes the next one of ``blocks``."""
    if step.kind == "op":
        return next(blocks)(read[0])
    if step.kind == "concat":
        return torch.cat(read, dim=1)
    if step.kind == "cut":
        return read[0][:, : step.channels]
    if step.kind == "zero":
        zeros = x_NCHW.new_zeros(x_NCHW.shape[0], step.channels, step.size, step.size)
        return zeros.contiguous(memory_format=torch.channels_last)

    total = read[0]
    for term in read[1:]:
        total = total + term
    return total
