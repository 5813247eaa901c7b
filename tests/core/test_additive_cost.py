"""Priced spaces: stacked contractions against one einsum per term, marginals against
autograd, maxima against trying everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture, Picks
from hwnas.core.space import Choice, MacroSpace, Option, SearchSpace, SpaceStage, Term
from hwnas.core.spaces import mobile32
from hwnas.errors import SpaceError

FAST = settings(deadline=None, derandomize=True, max_examples=60)


class AnySpace(SearchSpace):
    """Choices and terms as given: terms may share, skip and reorder choices as no chain
    of stages does.
    """

    options: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(
            Choice(f"c{i}", tuple(map(str, range(count))), "op")
            for i, count in enumerate(self.options)
        )

    def terms(self) -> tuple[Term, ...]:
        shapes = [tuple(self.options[i] for i in axes) for axes in self.axes]
        return tuple(
            Term(str(t), tuple(f"c{i}" for i in axes), shape, ())
            for t, (axes, shape) in enumerate(zip(self.axes, shapes, strict=True))
        )

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        raise NotImplementedError

    def encode(self, arch: Architecture) -> Picks:
        raise NotImplementedError

    def restrict(
        self, allowed: Mapping[str, Sequence[Option]], name: str | None = None
    ) -> AnySpace:
        raise NotImplementedError


@st.composite
def spaces(draw: st.DrawFn) -> AnySpace:
    count = draw(st.integers(1, 5))
    options = draw(st.lists(st.integers(2, 4), min_size=count, max_size=count))
    axes = st.lists(st.integers(0, count - 1), max_size=min(count, 4), unique=True).map(tuple)
    return AnySpace(
        name="any",
        resolution=8,
        classes=2,
        options=tuple(options),
        axes=tuple(draw(st.lists(axes, min_size=1, max_size=6))),
    )


def prices_of(space: SearchSpace, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {term.slot: rng.uniform(0.1, 5.0, term.shape) for term in space.terms()}


def additive_cost(space: SearchSpace, prices: Mapping[str, np.ndarray], **how: Any) -> AdditiveCost:
    return AdditiveCost(space, lambda term: prices[term.slot], **how)


def gates_of(space: SearchSpace, seed: int = 1) -> dict[str, np.ndarray]:
    """Any weights, not only probabilities: contractions do not care."""
    rng = np.random.default_rng(seed)
    return {choice.key: rng.uniform(0.0, 1.0, len(choice.options)) for choice in space.choices}


def every_index(space: SearchSpace) -> np.ndarray:
    return np.array(list(product(*(range(len(choice.options)) for choice in space.choices))))


def term_values(
    space: SearchSpace, prices: Mapping[str, np.ndarray], index: np.ndarray
) -> list[float]:
    at = {choice.key: int(i) for choice, i in zip(space.choices, index, strict=True)}
    return [float(prices[term.slot][tuple(at[key] for key in term.keys)]) for term in space.terms()]


def plain_expectation(
    space: SearchSpace, prices: Mapping[str, np.ndarray], gates: Mapping[str, Any], xp: Any
) -> Any:
    """One einsum per term: the definition."""
    total = 0.0
    for term in space.terms():
        letters = ascii_lowercase[: len(term.keys)]
        array = xp.asarray(prices[term.slot])
        total = (
            total
            + xp.einsum(
                f"{letters},{','.join(letters)}->", array, *(gates[key] for key in term.keys)
            )
            if term.keys
            else total + array
        )
    return total


@FAST
@given(spaces(), st.sampled_from(("sum", "max")))
def test_values_and_their_range_are_those_of_every_architecture(
    space: AnySpace, reduce: str
) -> None:
    prices = prices_of(space)
    found = additive_cost(space, prices, reduce=reduce, fixed=0.3)
    index_NC = every_index(space)
    combine = (
        (lambda values: 0.3 + sum(values))
        if reduce == "sum"
        else (lambda values: max(0.3, *values))
    )
    expected = np.array([combine(term_values(space, prices, index)) for index in index_NC])
    assert found.costs(index_NC) == pytest.approx(expected, rel=1e-12)
    assert found.cost(space.at(index_NC[-1])) == pytest.approx(expected[-1], rel=1e-12)
    assert found.bounds() == pytest.approx((expected.min(), expected.max()), rel=1e-12)


@FAST
@given(spaces())
def test_stacked_contractions_are_one_einsum_per_term(space: AnySpace) -> None:
    prices, gates = prices_of(space), gates_of(space)
    found = additive_cost(space, prices, fixed=0.3)
    expected = 0.3 + float(plain_expectation(space, prices, gates, np))
    assert float(found.expected(gates)) == pytest.approx(expected, rel=1e-12)
    assert float(
        found.expected({key: torch.tensor(gate) for key, gate in gates.items()}, torch)
    ) == pytest.approx(expected, rel=1e-12)


@FAST
@given(spaces())
def test_marginals_are_the_gradient_of_the_definition(space: AnySpace) -> None:
    prices, gates = prices_of(space), gates_of(space)
    leaves = {key: torch.tensor(gate, requires_grad=True) for key, gate in gates.items()}
    total = plain_expectation(space, prices, leaves, torch)
    if total.requires_grad:
        total.backward()
    marginals = additive_cost(space, prices).marginals(gates)
    assert marginals.keys() == gates.keys()
    for key, leaf in leaves.items():
        expected = np.zeros(len(leaf)) if leaf.grad is None else leaf.grad.numpy()
        assert marginals[key] == pytest.approx(expected, rel=1e-10, abs=1e-12)


def coupled() -> MacroSpace:
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16, 24),
            slots=(("ir_k3_e3", "ir_k5_e3"), ("ir_k3_e6", "skip")),
            residual="matching",
        ),
        SpaceStage(widths=(16, 24), stride=2, slots=(("ir_k3_e3", "ir_k5_e6"),)),
    )
    return MacroSpace(name="coupled", resolution=16, classes=4, stages=stages)


def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    space = coupled()
    macs = AdditiveCost.of_ops(space, lambda op: op.macs / 1e5)
    keys = [choice.key for choice in space.choices]
    leaves = [torch.tensor(gate, requires_grad=True) for gate in gates_of(space).values()]

    def expectation(*gates: torch.Tensor) -> torch.Tensor:
        return macs.expected(dict(zip(keys, gates, strict=True)), torch)

    assert torch.autograd.gradcheck(expectation, leaves, eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(expectation, leaves, eps=1e-6, atol=1e-7)


def test_marginals_are_what_taking_an_option_for_certain_changes() -> None:
    space = coupled()
    macs = AdditiveCost.of_ops(space, lambda op: op.macs)
    gates = {
        choice.key: np.full(len(choice.options), 1 / len(choice.options))
        for choice in space.choices
    }
    marginals = macs.marginals(gates)
    base = float(macs.expected(gates))
    for choice in space.choices:
        certain = [
            float(macs.expected({**gates, choice.key: np.eye(len(choice.options))[i]}))
            for i in range(len(choice.options))
        ]
        assert marginals[choice.key] - marginals[choice.key].mean() == pytest.approx(
            np.array(certain) - base, rel=1e-9, abs=1e-6
        )


@pytest.mark.parametrize("make", [coupled, mobile32])
def test_any_function_of_an_op_is_what_the_walk_over_the_architecture_gives(make: Any) -> None:
    space, rng = make(), np.random.default_rng(0)
    calls: list[str] = []

    def params(op: Any) -> int:
        calls.append(op.key)
        return int(op.params)

    total, largest = (
        AdditiveCost.of_ops(space, params),
        AdditiveCost.of_ops(space, lambda op: op.params, reduce="max"),
    )
    assert sorted(calls) == sorted(op.key for op in space.ops)  # each op once
    for _ in range(50):
        picks = space.sample(rng)
        arch = space.decode(picks)
        assert total.cost(picks) == arch.params
        assert largest.cost(picks) == max(op.params for op in arch.ops())


def test_a_choice_that_every_term_shares_is_eliminated_last() -> None:
    """The terms of forty choices meet in one shared choice: eliminating that first
    would take 4^40 numbers, more than 64 bits count.
    """
    space = AnySpace(
        name="star",
        resolution=8,
        classes=2,
        options=(3, *[4] * 40),
        axes=tuple((i, 0) for i in range(1, 41)),
    )
    prices = prices_of(space)
    each = np.stack([prices[term.slot] for term in space.terms()])  # [terms, 4, 3]
    expected = each.min(axis=1).sum(axis=0).min(), each.max(axis=1).sum(axis=0).max()
    assert additive_cost(space, prices).bounds() == pytest.approx(expected, rel=1e-12)


def test_a_peak_has_no_expectation_and_foreign_picks_no_price() -> None:
    space = coupled()
    peak = AdditiveCost.of_ops(space, lambda op: op.macs, reduce="max")
    for work in (peak.expected, peak.marginals):
        with pytest.raises(AssertionError, match="maximum"):
            work(gates_of(space))
    with pytest.raises(SpaceError, match=r"lack s0\.width"):
        peak.cost({})
