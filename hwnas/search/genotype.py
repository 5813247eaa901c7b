"""From DARTS's mixture over the edges of a cell to a single cell, derived as in DARTS.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055), section 2.4; released code quark0/darts. During the search every edge of a
cell runs, with weight 1: alpha does not say which edges a node keeps. Finally,

1. the strength of an edge is the largest probability of its options other than
   ``none``;
2. every node keeps the two edges of greatest strength, each with that option.

Here the pairs of edges that a node may keep are a choice like any other, so step 2 is
the argmax of a policy: the probability of a pair is taken to be proportional to the
product of the strengths of its edges (ours), which is largest for the two strongest.

The policies of spaces without such pairs are left unchanged: on NAS-Bench-201, as in
the code of that benchmark, the argmax of an edge may be ``none``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import TYPE_CHECKING

import numpy as np

from hwnas.core.cell_steps import NONE, edge_key, sources_of
from hwnas.core.cells import CellSpace
from hwnas.core.search_space import SearchSpace
from hwnas.lazy import torch

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

Policy = Mapping[str, np.ndarray]
"""Choice key -> probabilities [options] of independent choices."""


def all_edges(space: SearchSpace, mixture: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates during the search: those of ``mixture``, except that the gates of pairs
    of edges give every edge weight 1.
    """
    gates = dict(mixture)
    for choice in space.choices:
        if choice.kind == "inputs":
            sources: list[int] = []
            for pair in choice.options:
                sources.extend(sources_of(str(pair)))
            # the weight of an edge is the sum of the gates of its pairs
            pairs_per_edge = max(sources.count(source) for source in set(sources))
            gates[choice.key] = torch.full(
                (len(choice.options),), 1 / pairs_per_edge, dtype=torch.float64
            )
    return gates


def any_pair(space: SearchSpace, mixture: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The probabilities for the expected cost during the search: those of ``mixture``,
    with all pairs of edges of a node equally likely.
    """
    probabilities = dict(mixture)
    for choice in space.choices:
        if choice.kind == "inputs":
            count = len(choice.options)
            probabilities[choice.key] = torch.full((count,), 1 / count, dtype=torch.float64)
    return probabilities


@singledispatch
def derive_cell(space: SearchSpace, policy: Policy) -> dict[str, np.ndarray]:
    """The policy whose argmax is the network that DARTS derives (see the module)."""
    del space
    return {key: np.array(p, dtype=float) for key, p in policy.items()}


@derive_cell.register
def _derived_cell(space: CellSpace, policy: Policy) -> dict[str, np.ndarray]:
    """The edges that the nodes of a cell keep, with their options.

    Example:
        >>> from hwnas.core.spaces import darts
        >>> space = darts()
        >>> policy = {}
        >>> for choice in space.choices:
        ...     count = len(choice.options)
        ...     policy[choice.key] = np.full(count, 1 / count)
        >>> policy["normal.e1-3"][4] = policy["normal.e2-3"][5] = 0.5
        >>> derived = derive_cell(space, policy)
        >>> space.inputs["normal.n3.inputs"][derived["normal.n3.inputs"].argmax()]
        '1+2'
        >>> int(derived["normal.e2-3"].argmax())
        5
    """
    derived = {key: np.array(p, dtype=float) for key, p in policy.items()}
    if not space.inputs:
        return derived

    # 1. strength of the edges, and their policies without ``none``
    strength: dict[str, float] = {}
    for key, options in space.edges.items():
        # an edge with a single option is not a choice: it has this option for certain
        probabilities = derived.get(key, np.ones(1))
        connected = np.array([option != NONE for option in options])
        strength[key] = float(probabilities[connected].max(initial=0.0))
        if key in derived and strength[key] > 0:
            derived[key] = np.where(connected, probabilities, 0.0)
            derived[key] /= derived[key].sum()

    # 2. pairs of edges
    for choice in space.choices:
        if choice.kind == "inputs":
            cell = choice.address.part
            node = choice.address.node
            products = []
            for pair in choice.options:
                product = 1.0
                for source in sources_of(str(pair)):
                    product *= strength[edge_key(cell, source, node)]
                products.append(product)
            # 1e-30 keeps the sum above 0 if every pair has an edge of strength 0
            weights = np.array(products) + 1e-30
            derived[choice.key] = weights / weights.sum()
    return derived
