"""P-DARTS's limit on skips: how many skips a proposal may have, which are deleted, and
how many an architecture has.

On a space of blocks, the skips of all slots count; on cells, those that the normal cell
keeps. See ``hwnas.search.pdarts``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import singledispatch

import numpy as np

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.cell_steps import SKIP_CONNECT
from hwnas.core.cells import CellSpace
from hwnas.core.choice import Address
from hwnas.core.option import SKIP
from hwnas.core.search_space import SearchSpace, Term
from hwnas.search.genotype import Policy, derive_cell

SKIPS_OF_A_CELL = 2
"""Most skips of a normal cell in the paper."""


@singledispatch
def published_skip_limit(space: SearchSpace) -> int:
    """The default limit on the skips of a proposal. On blocks, a quarter of the slots
    that offer skip, rounded up (ours).
    """
    return math.ceil(len(_skip_positions(space)) / 4)


@published_skip_limit.register
def _published_skip_limit_of_a_cell(space: CellSpace) -> int:
    del space
    return SKIPS_OF_A_CELL


@singledispatch
def with_few_skips(space: SearchSpace, policy: Policy, most: int) -> dict[str, np.ndarray]:
    """The policy whose argmax has at most ``most`` skips: the weakest skips are
    deleted, so that the next best options of their slots become the argmax.
    """
    limited = {key: p.copy() for key, p in policy.items()}
    positions = _skip_positions(space)
    skipped = [key for key, i in positions.items() if policy[key].argmax() == i]
    weakest_first = sorted(skipped, key=lambda key: policy[key][positions[key]])
    for key in weakest_first[: max(0, len(skipped) - most)]:
        others = limited[key]
        others[positions[key]] = 0.0
        if not others.any():
            # skip was the only option that the slot had kept: take the others as equals
            others = np.arange(len(others)) != positions[key]
        limited[key] = others / others.sum()
    return limited


@with_few_skips.register
def _with_few_skips_in_a_cell(space: CellSpace, policy: Policy, most: int) -> dict[str, np.ndarray]:
    """The policy of the derived cell. As long as more than ``most`` edges of its normal
    cell are skips, the weakest skip gets probability 0 and the cell is derived again.
    """
    limited = {key: np.array(p, dtype=float) for key, p in policy.items()}

    def skip_probability(key: str) -> float:
        return float(limited[key][space.edges[key].index(SKIP_CONNECT)])

    while True:
        derived = derive_cell(space, limited)
        picks = space.at([int(derived[choice.key].argmax()) for choice in space.choices])
        skipped = []
        for key in _limited_edges(space):
            if space.is_kept(key, picks) and picks.get(key) == SKIP_CONNECT:
                skipped.append(key)
        if len(skipped) <= most:
            return derived

        # one at a time: without it, the nodes may keep other edges
        weakest = min(skipped, key=skip_probability)
        limited[weakest][space.edges[weakest].index(SKIP_CONNECT)] = 0.0


@singledispatch
def count_of_skips(space: SearchSpace) -> AdditiveCost:
    """The number of skipped slots, or of skips among the edges of the normal cell, as a
    cost. (A skip in a slot that a depth leaves out counts as well.)
    """
    positions = _skip_positions(space)

    def skips(term: Term) -> np.ndarray:
        count = np.zeros(term.shape)
        if term.slot in positions:
            # the slot's own choice is the first axis of its term
            count[positions[term.slot]] = 1.0
        return count

    return AdditiveCost(space, skips)


@count_of_skips.register
def _count_of_skips_in_a_cell(space: CellSpace) -> AdditiveCost:
    slots = {}
    for key in _limited_edges(space):
        # an edge has a step in every copy of the cell; count its skip once
        first_step = next(step for step in space.steps if step.key == key)
        slots[first_step.slot] = first_step

    def skips(term: Term) -> np.ndarray:
        step = slots.get(term.slot)
        if step is None:
            return np.zeros(term.shape)
        is_skip = [option == SKIP_CONNECT for option in step.options]
        # ``kept`` is empty if the node has no choice of edges: it keeps all of them
        kept = np.array(step.kept or (True,), dtype=float)
        return np.outer(is_skip, kept).reshape(term.shape)

    return AdditiveCost(space, skips)


def _skip_positions(space: SearchSpace) -> Mapping[str, int]:
    """Slot key -> position of skip, for every slot that offers it."""
    positions = {}
    for choice in space.choices:
        if SKIP in choice.options:
            positions[choice.key] = choice.options.index(SKIP)
    return positions


def _limited_edges(space: CellSpace) -> list[str]:
    """Keys of the normal cell's edges that offer skip among other options."""
    normal = space.kinds[0]
    edges = []
    for key, options in space.edges.items():
        in_normal_cell = Address.parse(key).part == normal
        if in_normal_cell and SKIP_CONNECT in options and len(options) > 1:
            edges.append(key)
    return edges
