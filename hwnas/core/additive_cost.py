"""A space with a price for every op, compiled to small arrays: what latency, MACs, size
and memory have in common.

    value(picks)  = fixed + sum over terms of price[op of the term under the picks]
    E[value](p)   = fixed + sum over terms of <prices of the term, outer product of p over the term's choices>
    dE/dp_c       = sum over the terms with choice c of <prices of the term, outer product of p over its *other* choices>

For a peak, the sum is a maximum, and there is no expectation. Expectations are exact
for independent choices, coupled widths included, because each term is contracted with
all the choices it depends on. A slot that is left out costs 0.

A term per einsum would cost a super-net step several percent in calls alone. Terms with
equally many choices are therefore stacked, padded with zeros to one shape, and
contracted together: a handful of array operations for a whole space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from hwnas.core.ops import Op
from hwnas.core.space import Option, SearchSpace, Term


@dataclass(frozen=True)
class Stack:
    """Terms with K choices each, padded to one shape.

    ``prices`` is [terms, n_1, ..., n_K]; ``index`` holds one int64 [terms, n_k] per
    axis: where in the concatenated gates of all choices an option's weight is. Padding
    points anywhere, as its prices are 0.
    """

    prices: Any
    index: tuple[Any, ...]


class AdditiveCost:
    """A space priced by any function of a term, or of an op (``of_ops``).

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
        price: Callable[[Term], np.ndarray],
        *,
        reduce: Literal["sum", "max"] = "sum",
        fixed: float = 0.0,
    ) -> None:
        self.space = space
        self.reduce = reduce
        self.fixed = fixed
        self._combine: np.ufunc = np.add if reduce == "sum" else np.maximum
        self._arrays: list[tuple[tuple[int, ...], np.ndarray]] = []
        self._converted: dict[Any, list[Stack]] = {}
        position = {choice.key: i for i, choice in enumerate(space.choices)}
        for term in space.terms():
            prices = price(term)
            if term.keys:
                self._arrays.append((tuple(position[key] for key in term.keys), prices))
            else:
                self.fixed = float(self._combine(self.fixed, float(prices)))

    @classmethod
    def of_ops(
        cls,
        space: SearchSpace,
        price: Callable[[Op], float],
        *,
        reduce: Literal["sum", "max"] = "sum",
        fixed: float = 0.0,
    ) -> AdditiveCost:
        """A space priced op by op. Each op is priced once; prices must not be below 0
        where ``reduce`` is ``"max"``.
        """
        known: dict[Op, float] = {}

        def term_costs(term: Term) -> np.ndarray:
            for op in term.ops:
                if op is not None and op not in known:
                    known[op] = float(price(op))
            return np.array([0.0 if op is None else known[op] for op in term.ops]).reshape(
                term.shape
            )

        return cls(space, term_costs, reduce=reduce, fixed=fixed)

    def cost(self, picks: Mapping[str, Option]) -> float:
        """The value of picks. Raises SpaceError where they are none of the space."""
        return float(self.costs(self.space.index(picks)[None])[0])

    def costs(self, index_NC: np.ndarray) -> np.ndarray:
        """The values of many picks at once: option positions int [N, choices] -> float64 [N]."""
        index_CN = np.ascontiguousarray(np.asarray(index_NC).T)
        total = np.full(index_CN.shape[1], self.fixed)
        for positions, prices in self._arrays:
            flat = index_CN[positions[0]]
            for position, count in zip(positions[1:], prices.shape[1:], strict=True):
                flat = flat * count + index_CN[position]
            self._combine(total, prices.ravel()[flat], out=total)
        return total

    def expected(self, gates: Mapping[str, Any], xp: Any = np) -> Any:
        """The expectation under independent choices, exact and differentiable as often
        as one likes. For sums only.

        ``gates`` maps each choice key to a probability vector [options] of the array
        library ``xp`` (numpy or torch).
        """
        assert self.reduce == "sum", "the expectation of a maximum is no contraction"
        if not self._arrays:
            return self.fixed
        weights = xp.concatenate([gates[key] for key in self._keys])
        total: Any = self.fixed
        for stack in self._stacks_like(weights, xp):
            value = stack.prices
            for index in reversed(stack.index):
                value = _contract_last(value, weights[index])
            total = total + value.sum()
        return total

    def marginals(self, gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The derivatives of ``expected`` by the gates, without autograd: choice key ->
        float64 [options].

        An option's marginal is what the whole costs, beyond what does not depend on the
        choice, when that option is taken for certain and all other choices are as in
        ``gates``; differences of marginals are therefore what changing one's mind
        costs.
        """
        assert self.reduce == "sum", "the expectation of a maximum is no contraction"
        found = {choice.key: np.zeros(len(choice.options)) for choice in self.space.choices}
        if not self._arrays:
            return found
        weights = np.concatenate([np.asarray(gates[key], dtype=float) for key in self._keys])
        slopes = np.zeros(len(weights))
        for stack in self._stacks:
            after = stack.prices  # contracted with the gates of all axes after the current one
            for axis in reversed(range(len(stack.index))):
                alone = after
                for index in stack.index[:axis]:
                    alone = _contract_first(alone, weights[index])
                slopes += np.bincount(
                    stack.index[axis].ravel(), alone.ravel(), minlength=len(slopes)
                )
                after = _contract_last(after, weights[stack.index[axis]])
        ends = np.cumsum([len(found[key]) for key in self._keys])[:-1]
        return found | dict(zip(self._keys, np.split(slopes, ends), strict=True))

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of any architecture, exact, by eliminating
        one choice after another.
        """
        return self._extreme(np.min), self._extreme(np.max)

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        """The choices that prices depend on, in the space's order."""
        used = {i for positions, _ in self._arrays for i in positions}
        return tuple(choice.key for i, choice in enumerate(self.space.choices) if i in used)

    @cached_property
    def _stacks(self) -> list[Stack]:
        options = {choice.key: len(choice.options) for choice in self.space.choices}
        offset = dict(
            zip(self._keys, np.cumsum([0, *(options[key] for key in self._keys)]), strict=False)
        )
        stacks = []
        for axes in sorted({len(positions) for positions, _ in self._arrays}):
            members = [
                (positions, prices) for positions, prices in self._arrays if len(positions) == axes
            ]
            shape = tuple(max(prices.shape[k] for _, prices in members) for k in range(axes))
            stacked = np.zeros((len(members), *shape))
            index = tuple(np.zeros((len(members), count), dtype=np.int64) for count in shape)
            for row, (positions, prices) in enumerate(members):
                stacked[row][tuple(slice(count) for count in prices.shape)] = prices
                for k, position in enumerate(positions):
                    index[k][row, : prices.shape[k]] = offset[
                        self.space.choices[position].key
                    ] + np.arange(prices.shape[k])
            stacks.append(Stack(stacked, index))
        return stacks

    def _stacks_like(self, weights: Any, xp: Any) -> list[Stack]:
        """The stacks as arrays of ``xp``, in the precision and on the device of the
        gates; converted once.
        """
        kind = (xp, weights.dtype, getattr(weights, "device", None))
        if kind not in self._converted:
            # torch: where the gates are
            where = {"device": weights.device} if hasattr(weights, "new_tensor") else {}
            self._converted[kind] = [
                Stack(
                    xp.asarray(stack.prices, dtype=weights.dtype, **where),
                    tuple(xp.asarray(index, **where) for index in stack.index),
                )
                for stack in self._stacks
            ]
        return self._converted[kind]

    def _extreme(self, best: Callable[..., Any]) -> float:
        """``best`` (np.min or np.max) over all architectures.

        The next choice to go is the one whose terms depend on the fewest combinations:
        a choice that every term shares, such as the resolution, goes last.
        """
        factors = list(self._arrays)
        constant = self.fixed
        open_choices = {i for positions, _ in factors for i in positions}
        while open_choices:
            choice = min(open_choices, key=lambda i: (self._combinations(_around(i, factors)), i))
            axes = _around(choice, factors)
            combined: Any = None
            for positions, prices in factors:
                if choice in positions:
                    shape = [
                        len(self.space.choices[i].options) if i in positions else 1 for i in axes
                    ]
                    aligned = np.transpose(prices, np.argsort(positions)).reshape(shape)
                    combined = aligned if combined is None else self._combine(combined, aligned)
            factors = [factor for factor in factors if choice not in factor[0]]
            open_choices.remove(choice)
            left = best(combined, axis=axes.index(choice))
            rest = tuple(i for i in axes if i != choice)
            if rest:
                factors.append((rest, left))
            else:
                constant = float(self._combine(constant, left))
        return constant

    def _combinations(self, axes: Iterable[int]) -> int:
        # as a Python integer: spaces are larger than 64 bits
        return math.prod(len(self.space.choices[i].options) for i in axes)


def _around(choice: int, factors: list[tuple[tuple[int, ...], np.ndarray]]) -> tuple[int, ...]:
    """All choices that occur in a factor together with ``choice``, itself included."""
    return tuple(sorted({i for positions, _ in factors if choice in positions for i in positions}))


def _contract_last(values: Any, weights: Any) -> Any:
    """[terms, ..., n] and [terms, n] -> [terms, ...]."""
    flat = values.reshape(len(weights), -1, weights.shape[-1]) @ weights[:, :, None]
    return flat.reshape(values.shape[:-1])


def _contract_first(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[terms, n, ...] and [terms, n] -> [terms, ...]."""
    flat: np.ndarray = weights[:, None, :] @ values.reshape(*weights.shape, -1)
    return flat.reshape(len(weights), *values.shape[2:])
