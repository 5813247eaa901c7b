"""From DARTS's mixture over the edges of a cell to one cell, as DARTS derives it.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055), section 2.4; released code quark0/darts. While searching, every edge of a
cell runs, all with weight 1: which edges a node keeps is no part of alpha. In the end

1. the strength of an edge is its largest probability of an option other than ``none``;
2. every node keeps the two edges of greatest strength, each with that option.

Here the pairs of edges that a node may keep are a choice like any other, so 2. is the
argmax of a policy: a pair's probability is taken to be proportional to the product of
its edges' strengths (ours), which is largest for the two strongest.

Spaces without such pairs stay as they are: of NAS-Bench-201's edges, as in the
benchmark's code, the argmax may well be ``none``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from hwnas.core.cell_plan import NONE, edge_key, sources_of
from hwnas.core.cells import CellSpace
from hwnas.core.search_space import SearchSpace

Policy = Mapping[str, np.ndarray]
"""Choice key -> probabilities [options] of independent choices."""


def all_edges(space: SearchSpace, mixture: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates of a search: the given ones, but for the pairs of edges, whose gates
    are such that every edge has weight 1.
    """
    gates = dict(mixture)
    for choice in space.choices:
        if choice.kind == "inputs":
            sources = [source for pair in choice.options for source in sources_of(str(pair))]
            weight = 1 / max(sources.count(source) for source in set(sources))
            gates[choice.key] = torch.full((len(choice.options),), weight, dtype=torch.float64)
    return gates


def any_pair(space: SearchSpace, mixture: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The probabilities that a search's expected cost is of: the given ones, and any
    pair of edges alike.
    """
    likely = dict(mixture)
    for choice in space.choices:
        if choice.kind == "inputs":
            likely[choice.key] = torch.full(
                (len(choice.options),), 1 / len(choice.options), dtype=torch.float64
            )
    return likely


@singledispatch
def derive_cell(space: SearchSpace, policy: Policy) -> dict[str, np.ndarray]:
    """The policy whose argmax is the network that DARTS derives. See the module."""
    del space
    return {key: np.array(p, dtype=float) for key, p in policy.items()}


@derive_cell.register
def _derived_cell(space: CellSpace, policy: Policy) -> dict[str, np.ndarray]:
    """The edges that its nodes keep, with their options.

    Example:
        >>> from hwnas.core.spaces import darts
        >>> space = darts()
        >>> policy = {choice.key: np.ones(len(choice.options)) / len(choice.options) for choice in space.choices}
        >>> policy["normal.e1-3"][4] = policy["normal.e2-3"][5] = 0.5
        >>> found = derive_cell(space, policy)
        >>> [space.inputs["normal.n3.inputs"][found["normal.n3.inputs"].argmax()], found["normal.e2-3"].argmax()]
        ['1+2', 5]
    """
    found = {key: np.array(p, dtype=float) for key, p in policy.items()}
    if not space.inputs:
        return found
    strength: dict[str, float] = {}
    for key, options in space.edges.items():
        probabilities = found.get(key, np.ones(1))
        connected = np.array([option != NONE for option in options])
        strength[key] = float(probabilities[connected].max(initial=0.0))
        if key in found and strength[key] > 0:
            found[key] = np.where(connected, probabilities, 0.0)
            found[key] /= found[key].sum()
    for choice in space.choices:
        if choice.kind == "inputs":
            cell, node = choice.address.part, choice.address.node
            pairs = [
                [strength[edge_key(cell, source, node)] for source in sources_of(str(pair))]
                for pair in choice.options
            ]
            product = np.array([np.prod(pair) for pair in pairs]) + 1e-30
            found[choice.key] = product / product.sum()
    return found
