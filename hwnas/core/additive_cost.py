"""Costs that add up over the ops of a network, compiled to small arrays for a whole
space. Latency, MACs, size and activation memory all build on this.

A *term* is what one slot adds to the cost. It depends on a few choices; its array
``costs`` has one axis for each. With p_c, a probability vector over the options of
choice c:

    cost(picks)  = fixed + sum over all terms of costs[picks of the term's choices]
    E[cost](p)   = fixed + sum over all terms of
                   <costs, outer product of p_c over the term's choices c>
    dE / dp_c    = sum over the terms that depend on c of
                   <costs, outer product of p_d over the term's other choices d>

With ``reduce="max"`` (peak activation memory), a maximum replaces the sum, and there is
no expectation. Expectations are exact for independent choices, even if terms share
them (as neighbouring slots share a width), because each term is contracted with all
the choices it depends on. An empty slot costs 0.

The call overhead of one einsum per term would slow down a super-net step by several
percent. Terms with the same number of choices are therefore padded with zeros to one
shape, stacked and contracted together: a handful of array operations for a whole space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from hwnas.core.ops import Op
from hwnas.core.space import Option, SearchSpace, Term

CostArray: TypeAlias = tuple[tuple[int, ...], np.ndarray]
"""Positions of choices in the space, and costs [options, ...] with one axis per choice.
"""


@dataclass(frozen=True)
class Stack:
    """Terms with K choices each, padded to one shape.

    ``costs`` is [terms, n_1, ..., n_K]. ``index`` holds one int64 [terms, n_k] per
    axis: the position of each option's weight in the concatenated gates of all choices.
    Padding has cost 0, so the weight it points to does not matter.
    """

    costs: Any
    index: tuple[Any, ...]


class AdditiveCost:
    """The cost of every architecture of a space, from a cost for each term or for each
    op (``of_ops``).

    ``reduce`` combines the costs of the terms; ``fixed`` is the cost that every
    architecture has.

    Example:
        >>> from hwnas.core.spaces import mobile32
        >>> space = mobile32()
        >>> macs = AdditiveCost.of_ops(space, lambda op: op.macs)
        >>> picks = space.sample(np.random.default_rng(0))
        >>> macs.cost(picks) == space.decode(picks).macs
        True
    """

    def __init__(
        self,
        space: SearchSpace,
        term_costs: Callable[[Term], np.ndarray],
        *,
        reduce: Literal["sum", "max"] = "sum",
        fixed: float = 0.0,
    ) -> None:
        self.space = space
        self.reduce = reduce
        self.fixed = fixed
        self._combine: np.ufunc = np.add if reduce == "sum" else np.maximum
        self._arrays: list[CostArray] = []
        self._converted: dict[Any, list[Stack]] = {}

        position = {choice.key: i for i, choice in enumerate(space.choices)}
        for term in space.terms():
            costs = term_costs(term)
            if term.keys:
                self._arrays.append((tuple(position[key] for key in term.keys), costs))
            else:
                # A term without choices costs the same in every architecture.
                self.fixed = float(self._combine(self.fixed, float(costs)))

    @classmethod
    def of_ops(
        cls,
        space: SearchSpace,
        op_cost: Callable[[Op], float],
        *,
        reduce: Literal["sum", "max"] = "sum",
        fixed: float = 0.0,
    ) -> AdditiveCost:
        """Build from a cost per op. ``op_cost`` is called once for each distinct op.
        With ``reduce="max"``, costs must not be negative, because an empty slot costs
        0.
        """
        known: dict[Op, float] = {}

        def cost_of(op: Op | None) -> float:
            if op is None:  # an empty slot
                return 0.0
            if op not in known:
                known[op] = float(op_cost(op))
            return known[op]

        def term_costs(term: Term) -> np.ndarray:
            return np.array([cost_of(op) for op in term.ops]).reshape(term.shape)

        return cls(space, term_costs, reduce=reduce, fixed=fixed)

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The cost of ``picks``. Raises SpaceError if they do not belong to
        the space.
        """
        return float(self.costs(self.space.index(picks)[None])[0])

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The costs of many architectures at once.

        ``index_NC`` holds option positions, int [N, choices]; returns float64 [N].
        """
        index_CN = np.ascontiguousarray(np.asarray(index_NC).T)
        total = np.full(index_CN.shape[1], self.fixed)
        for positions, costs in self._arrays:
            # One row-major offset per architecture: a single lookup in the flattened
            # costs is faster than indexing with a tuple of arrays.
            flat = index_CN[positions[0]]
            for position, count in zip(positions[1:], costs.shape[1:], strict=True):
                flat = flat * count + index_CN[position]
            self._combine(total, costs.ravel()[flat], out=total)
        return total

    def expected(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """The expected cost under independent choices: exact, and differentiable any
        number of times. Only for ``reduce="sum"``.

        ``gates`` maps each choice key to a probability vector [options] of the array
        library ``xp`` (numpy or torch).
        """
        assert self.reduce == "sum", "the expectation of a maximum is not a contraction"
        if not self._arrays:
            return self.fixed
        weights = xp.concatenate([gates[key] for key in self._keys])
        total: Any = self.fixed
        for stack in self._stacks_like(weights, xp):
            value = stack.costs
            # from the last axis to the first, until [terms] remains
            for index in reversed(stack.index):
                value = _contract_last(value, weights[index])
            total = total + value.sum()
        return total

    def marginals(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The derivatives of ``expected`` with respect to the gates, without autograd:
        choice key -> float64 [options]. Only for ``reduce="sum"``.

        The marginal of an option is the expected cost of all terms that depend on its
        choice, if that option is chosen with certainty and all other choices follow
        ``gates``. The difference between two marginals is therefore the change of the
        expected cost when one option replaces the other.
        """
        assert self.reduce == "sum", "the expectation of a maximum is not a contraction"
        marginals = {choice.key: np.zeros(len(choice.options)) for choice in self.space.choices}
        if not self._arrays:
            return marginals

        weights = np.concatenate([np.asarray(gates[key], dtype=float) for key in self._keys])
        slopes = np.zeros(len(weights))
        for stack in self._stacks:
            # The slope at an axis contracts all other axes. ``partial`` is already
            # contracted over the axes after the current one, work that all earlier axes
            # share; ``slope`` also contracts those before it.
            partial = stack.costs
            for axis in reversed(range(len(stack.index))):
                slope = partial
                for index in stack.index[:axis]:
                    slope = _contract_first(slope, weights[index])
                # bincount as a scatter-add: several terms may share a choice, and their
                # slopes add up at the position of each option.
                slopes += np.bincount(
                    stack.index[axis].ravel(), slope.ravel(), minlength=len(slopes)
                )
                partial = _contract_last(partial, weights[stack.index[axis]])

        ends = np.cumsum([len(marginals[key]) for key in self._keys])[:-1]
        return marginals | dict(zip(self._keys, np.split(slopes, ends), strict=True))

    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest cost of any architecture, exact."""
        return self._extreme(np.min), self._extreme(np.max)

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        """The choices that costs depend on, in the order of the space."""
        used = _choices_in(self._arrays)
        return tuple(choice.key for i, choice in enumerate(self.space.choices) if i in used)

    @cached_property
    def _offsets(self) -> dict[int, int]:
        """Position of a choice in the space -> index of its first option in the
        concatenated gates of ``_keys``.
        """
        offsets: dict[int, int] = {}
        begin = 0
        used = _choices_in(self._arrays)
        for i, choice in enumerate(self.space.choices):
            if i in used:
                offsets[i] = begin
                begin += len(choice.options)
        return offsets

    @cached_property
    def _stacks(self) -> list[Stack]:
        by_axes: dict[int, list[CostArray]] = {}
        for array in self._arrays:
            by_axes.setdefault(len(array[0]), []).append(array)
        return [self._stack(by_axes[axes]) for axes in sorted(by_axes)]

    def _stack(self, arrays: list[CostArray]) -> Stack:
        """Pad cost arrays with the same number of axes to one shape, and stack them."""
        shape = tuple(np.max([costs.shape for _, costs in arrays], axis=0).tolist())
        stacked = np.zeros((len(arrays), *shape))
        index = tuple(np.zeros((len(arrays), count), dtype=np.int64) for count in shape)
        for row, (positions, costs) in enumerate(arrays):
            stacked[row][tuple(slice(count) for count in costs.shape)] = costs
            for axis, (position, count) in enumerate(zip(positions, costs.shape, strict=True)):
                index[axis][row, :count] = self._offsets[position] + np.arange(count)
        return Stack(stacked, index)

    def _stacks_like(self, weights: Any, xp: Any) -> list[Stack]:
        """The stacks as arrays of ``xp``, in the precision and on the device of the
        gates. Converted once per kind of gates.
        """
        kind = (xp, weights.dtype, getattr(weights, "device", None))
        if kind not in self._converted:
            # numpy before version 2 does not know the argument ``device``
            where = {} if xp is np else {"device": weights.device}
            converted = []
            for stack in self._stacks:
                costs = xp.asarray(stack.costs, dtype=weights.dtype, **where)
                index = tuple(xp.asarray(positions, **where) for positions in stack.index)
                converted.append(Stack(costs, index))
            self._converted[kind] = converted
        return self._converted[kind]

    def _extreme(self, extremum: Callable[..., Any]) -> float:
        """The lowest or highest cost of all architectures, by variable elimination.
        ``extremum`` is np.min or np.max.

        Eliminating a choice combines all arrays that depend on it into one, and reduces
        that array over the options of the choice. The order affects only the time: the
        next choice is always the one with the smallest combined array. A choice that
        every term shares, such as the resolution, therefore tends to go last.
        """
        arrays = list(self._arrays)
        constant = self.fixed
        remaining = _choices_in(arrays)
        while remaining:
            choice = min(remaining, key=lambda i: (self._combinations(_neighbours(i, arrays)), i))
            axes = _neighbours(choice, arrays)
            reduced = extremum(self._joint(choice, axes, arrays), axis=axes.index(choice))
            arrays = [array for array in arrays if choice not in array[0]]
            remaining.remove(choice)
            others = tuple(i for i in axes if i != choice)
            if others:
                arrays.append((others, reduced))
            else:
                constant = float(self._combine(constant, reduced))
        return constant

    def _joint(self, choice: int, axes: tuple[int, ...], arrays: list[CostArray]) -> Any:
        """All arrays that depend on ``choice``, combined into one array with one axis
        for each of the choices ``axes``, which ascend.
        """
        joint: Any = None
        for positions, costs in arrays:
            if choice not in positions:
                continue
            # Axes that the array lacks get length 1, so that it broadcasts over them.
            # The transpose puts its own axes into ascending order, as in ``axes``.
            shape = [1] * len(axes)
            for position in positions:
                shape[axes.index(position)] = len(self.space.choices[position].options)
            aligned = np.transpose(costs, np.argsort(positions)).reshape(shape)
            joint = aligned if joint is None else self._combine(joint, aligned)
        return joint

    def _combinations(self, axes: Iterable[int]) -> int:
        # math.prod, not np.prod: the count can exceed 64 bits
        return math.prod(len(self.space.choices[i].options) for i in axes)


def _choices_in(arrays: Iterable[CostArray]) -> set[int]:
    """Positions of the choices that these arrays depend on."""
    return {position for positions, _ in arrays for position in positions}


def _neighbours(choice: int, arrays: list[CostArray]) -> tuple[int, ...]:
    """All choices that share an array with ``choice``, itself included, in order."""
    return tuple(sorted(_choices_in(array for array in arrays if choice in array[0])))


def _contract_last(values: Any, weights: Any) -> Any:
    """The weighted sum over the last axis: values [terms, ..., n] and weights [terms,
    n] -> [terms, ...].
    """
    flat = values.reshape(len(weights), -1, weights.shape[-1]) @ weights[:, :, None]
    return flat.reshape(values.shape[:-1])


def _contract_first(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum over the first axis after the terms: values [terms, n, ...] and
    weights [terms, n] -> [terms, ...].
    """
    flat: np.ndarray = weights[:, None, :] @ values.reshape(*weights.shape, -1)
    return flat.reshape(len(weights), *values.shape[2:])
