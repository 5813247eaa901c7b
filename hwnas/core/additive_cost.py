"""Costs that add up over the ops of a network, compiled to small arrays for a whole
space. Latency, MACs, size and activation memory all build on this.

    value(picks)  = fixed + sum over terms of costs[op of the term under the picks]
    E[value](p)   = fixed + sum over terms of <costs of the term, outer product of p over the term's choices>
    dE/dp_c       = sum over the terms with choice c of <costs of the term, outer product of p over its *other* choices>

For a peak, a maximum replaces the sum, and no expectation is available. Expectations are
exact for independent choices, coupled widths included, because each term is contracted
with all the choices it depends on. An empty slot costs 0.

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

Factor: TypeAlias = tuple[tuple[int, ...], np.ndarray]
"""Positions of choices in the space, and costs with one axis per choice."""


@dataclass(frozen=True)
class Stack:
    """Terms with K choices each, padded to one shape.

    ``costs`` is [terms, n_1, ..., n_K]. ``index`` holds one int64 [terms, n_k] per axis:
    the position of each option's weight in the concatenated gates of all choices.
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
        >>> from hwnas.core.spaces import mobile32, published
        >>> from hwnas.core.ops import Op
        >>> macs = AdditiveCost.of_ops(mobile32(), lambda op: op.macs)
        >>> picks = mobile32().sample(np.random.default_rng(0))
        >>> macs.cost(picks) == mobile32().decode(picks).macs
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
        self._factors: list[Factor] = []
        self._converted: dict[Any, list[Stack]] = {}

        position = {choice.key: i for i, choice in enumerate(space.choices)}
        for term in space.terms():
            costs = term_costs(term)
            if term.keys:
                self._factors.append((tuple(position[key] for key in term.keys), costs))
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
        """Build from a cost per op. ``op_cost`` is called once for each distinct op;
        with ``reduce="max"`` it must not return negative values.
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
        """The cost of ``picks``. Raises SpaceError if they do not belong to the space."""
        return float(self.costs(self.space.index(picks)[None])[0])

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The costs of many architectures at once.

        ``index_NC`` holds option positions, int [N, choices]; returns float64 [N].
        """
        index_CN = np.ascontiguousarray(np.asarray(index_NC).T)
        total = np.full(index_CN.shape[1], self.fixed)
        for positions, costs in self._factors:
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
        if not self._factors:
            return self.fixed
        weights = xp.concatenate([gates[key] for key in self._keys])
        total: Any = self.fixed
        for stack in self._stacks_like(weights, xp):
            value = stack.costs
            for index in reversed(stack.index):
                value = _contract_last(value, weights[index])
            total = total + value.sum()
        return total

    def marginals(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The derivatives of ``expected`` with respect to the gates, without autograd:
        choice key -> float64 [options].

        An option's marginal is the expected cost of all terms that depend on the choice
        if that option is taken for certain and all other choices follow ``gates``.
        Differences between marginals are therefore the cost of switching options.
        """
        assert self.reduce == "sum", "the expectation of a maximum is not a contraction"
        marginals = {choice.key: np.zeros(len(choice.options)) for choice in self.space.choices}
        if not self._factors:
            return marginals

        weights = np.concatenate([np.asarray(gates[key], dtype=float) for key in self._keys])
        slopes = np.zeros(len(weights))
        for stack in self._stacks:
            # ``partial`` is contracted with the gates of all axes after the current one.
            # Going from the last axis to the first shares that work between the axes.
            partial = stack.costs
            for axis in reversed(range(len(stack.index))):
                slope = partial
                for index in stack.index[:axis]:
                    slope = _contract_first(slope, weights[index])
                # Several terms may share a choice, so their slopes are summed by position.
                slopes += np.bincount(
                    stack.index[axis].ravel(), slope.ravel(), minlength=len(slopes)
                )
                partial = _contract_last(partial, weights[stack.index[axis]])

        ends = np.cumsum([len(marginals[key]) for key in self._keys])[:-1]
        return marginals | dict(zip(self._keys, np.split(slopes, ends), strict=True))

    def range(self) -> tuple[float, float]:
        """The lowest and the highest cost of any architecture. Exact: choices are
        eliminated one after another.
        """
        return self._extreme(np.min), self._extreme(np.max)

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        """The choices that costs depend on, in the order of the space."""
        used = _choices_in(self._factors)
        return tuple(choice.key for i, choice in enumerate(self.space.choices) if i in used)

    @cached_property
    def _offsets(self) -> dict[int, int]:
        """Position of a choice -> where its options begin in the concatenated gates."""
        offsets: dict[int, int] = {}
        begin = 0
        used = _choices_in(self._factors)
        for i, choice in enumerate(self.space.choices):
            if i in used:
                offsets[i] = begin
                begin += len(choice.options)
        return offsets

    @cached_property
    def _stacks(self) -> list[Stack]:
        by_axes: dict[int, list[Factor]] = {}
        for factor in self._factors:
            by_axes.setdefault(len(factor[0]), []).append(factor)
        return [self._stack(by_axes[axes]) for axes in sorted(by_axes)]

    def _stack(self, factors: list[Factor]) -> Stack:
        """Pad factors with equally many choices to one shape."""
        shape = tuple(np.max([costs.shape for _, costs in factors], axis=0).tolist())
        stacked = np.zeros((len(factors), *shape))
        index = tuple(np.zeros((len(factors), count), dtype=np.int64) for count in shape)
        for row, (positions, costs) in enumerate(factors):
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
            # Only torch gets a device. Newer numpy arrays also have a ``device``, so
            # ``new_tensor`` identifies torch, without importing it.
            where = {"device": weights.device} if hasattr(weights, "new_tensor") else {}
            converted = []
            for stack in self._stacks:
                costs = xp.asarray(stack.costs, dtype=weights.dtype, **where)
                index = tuple(xp.asarray(positions, **where) for positions in stack.index)
                converted.append(Stack(costs, index))
            self._converted[kind] = converted
        return self._converted[kind]

    def _extreme(self, best: Callable[..., Any]) -> float:
        """``best`` (np.min or np.max) over all architectures, by variable elimination.

        The next choice to eliminate is the one whose terms depend on the fewest
        combinations: a choice that every term shares, such as the resolution, goes last.
        """
        factors = list(self._factors)
        constant = self.fixed
        remaining = _choices_in(factors)
        while remaining:
            choice = min(remaining, key=lambda i: (self._combinations(_neighbours(i, factors)), i))
            axes = _neighbours(choice, factors)
            reduced = best(self._joint(choice, axes, factors), axis=axes.index(choice))
            factors = [factor for factor in factors if choice not in factor[0]]
            remaining.remove(choice)
            others = tuple(i for i in axes if i != choice)
            if others:
                factors.append((others, reduced))
            else:
                constant = float(self._combine(constant, reduced))
        return constant

    def _joint(self, choice: int, axes: tuple[int, ...], factors: list[Factor]) -> Any:
        """All factors with ``choice``, combined into one array with these ``axes``."""
        joint: Any = None
        for positions, costs in factors:
            if choice not in positions:
                continue
            # Axes that the factor lacks get length 1, so that it broadcasts over them.
            shape = [1] * len(axes)
            for position in positions:
                shape[axes.index(position)] = len(self.space.choices[position].options)
            aligned = np.transpose(costs, np.argsort(positions)).reshape(shape)
            joint = aligned if joint is None else self._combine(joint, aligned)
        return joint

    def _combinations(self, axes: Iterable[int]) -> int:
        # As a Python integer: numbers of combinations can exceed 64 bits.
        return math.prod(len(self.space.choices[i].options) for i in axes)


def _choices_in(factors: Iterable[Factor]) -> set[int]:
    """Positions of the choices that these factors depend on."""
    return set[int]().union(*(positions for positions, _ in factors))


def _neighbours(choice: int, factors: list[Factor]) -> tuple[int, ...]:
    """All choices that share a factor with ``choice``, itself included, in order."""
    return tuple(sorted(_choices_in(factor for factor in factors if choice in factor[0])))


def _contract_last(values: Any, weights: Any) -> Any:
    """[terms, ..., n] and [terms, n] -> [terms, ...]."""
    flat = values.reshape(len(weights), -1, weights.shape[-1]) @ weights[:, :, None]
    return flat.reshape(values.shape[:-1])


def _contract_first(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[terms, n, ...] and [terms, n] -> [terms, ...]."""
    flat: np.ndarray = weights[:, None, :] @ values.reshape(*weights.shape, -1)
    return flat.reshape(len(weights), *values.shape[2:])
