"""P-DARTS's limit on skips: how many a proposal may have, which of them go, and how
many an architecture has.

As ``hwnas.search.pdarts`` says, the skips of a space of blocks are those of all its
slots, and of cells those that a normal cell keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import singledispatch

import numpy as np

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.cell_plan import SKIP_CONNECT
from hwnas.core.cells import CellSpace
from hwnas.core.choice import Address
from hwnas.core.option import SKIP
from hwnas.core.search_space import SearchSpace, Term
from hwnas.search.genotype import Policy, derive_cell

SKIPS_OF_A_CELL = 2
"""Skips of a normal cell in the paper."""


@singledispatch
def usual_skips(space: SearchSpace) -> int:
    """How many skips a proposal has at most where nothing is set: of blocks, a quarter
    of the slots that offer one, rounded up (ours).
    """
    return math.ceil(len(_skips(space)) / 4)


@usual_skips.register
def _usual_skips_of_a_cell(space: CellSpace) -> int:
    del space
    return SKIPS_OF_A_CELL


@singledispatch
def with_few_skips(space: SearchSpace, policy: Policy, most: int) -> dict[str, np.ndarray]:
    """The policy whose argmax has at most ``most`` skips: the weakest are deleted, so
    that their slots' next best options come up.
    """
    limited = {key: p.copy() for key, p in policy.items()}
    skips = [(key, i) for key, i in _skips(space).items() if policy[key].argmax() == i]
    for key, i in sorted(skips, key=lambda skip: policy[skip[0]][skip[1]])[
        : max(0, len(skips) - most)
    ]:
        limited[key][i] = 0.0
        others = limited[key] if limited[key].any() else np.arange(len(limited[key])) != i
        limited[key] = others / others.sum()
    return limited


@with_few_skips.register
def _with_few_skips_in_a_cell(space: CellSpace, policy: Policy, most: int) -> dict[str, np.ndarray]:
    """As long as more than ``most`` edges of the derived normal cell are skips, the
    weakest skip is made impossible.
    """
    limited = {key: np.array(p, dtype=float) for key, p in policy.items()}
    while True:
        choice = derive_cell(space, limited)
        picks = space.at([int(choice[each.key].argmax()) for each in space.choices])
        kept = [
            key
            for key in _limited_edges(space)
            if space.kept(key, picks) and picks.get(key) == SKIP_CONNECT
        ]
        if len(kept) <= most:
            return choice
        weakest = min(
            kept, key=lambda key: float(limited[key][space.edges[key].index(SKIP_CONNECT)])
        )
        limited[weakest][space.edges[weakest].index(SKIP_CONNECT)] = 0.0


@singledispatch
def count_of_skips(space: SearchSpace) -> AdditiveCost:
    """How many slots are skips, or how many edges of the normal cell, as a price. (A
    slot that a depth leaves out counts, too.)
    """
    positions = _skips(space)

    def skips(term: Term) -> np.ndarray:
        count = np.zeros(term.shape)
        if term.slot in positions:  # an open slot's own choice is the first axis of its term
            count[positions[term.slot]] = 1.0
        return count

    return AdditiveCost(space, skips)


@count_of_skips.register
def _count_of_skips_in_a_cell(space: CellSpace) -> AdditiveCost:
    first = {
        key: next(place for place in space.places if place.key == key)
        for key in _limited_edges(space)
    }
    slots = {place.slot: place for place in first.values()}

    def skips(term: Term) -> np.ndarray:
        place = slots.get(term.slot)
        if place is None:
            return np.zeros(term.shape)
        kept = np.array(place.kept or (True,), dtype=float)
        return np.outer([option == SKIP_CONNECT for option in place.options], kept).reshape(
            term.shape
        )

    return AdditiveCost(space, skips)


def _skips(space: SearchSpace) -> Mapping[str, int]:
    """Where each slot that offers skip has it."""
    return {
        choice.key: choice.options.index(SKIP) for choice in space.choices if SKIP in choice.options
    }


def _limited_edges(space: CellSpace) -> list[str]:
    """The edges of the cell that is no reduction which may be a skip and something else."""
    cell = space.kinds[0]
    own = {key: options for key, options in space.edges.items() if Address.parse(key).part == cell}
    return [key for key, options in own.items() if SKIP_CONNECT in options and len(options) > 1]
