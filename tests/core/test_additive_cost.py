"""Additive costs: stacked contractions against one einsum per term, marginals against
autograd, bounds against brute force.
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
    """A space of the given choices and terms, which may share, skip and reorder choices
    in ways that no chain of stages does.
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


def term_costs_of(space: SearchSpace, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {term.slot: rng.uniform(0.1, 5.0, term.shape) for term in space.terms()}


def additive_cost(
    space: SearchSpace, term_costs: Mapping[str, np.ndarray], **kwargs: Any
) -> AdditiveCost:
    return AdditiveCost(space, lambda term: term_costs[term.slot], **kwargs)


def gates_of(space: SearchSpace, seed: int = 1) -> dict[str, np.ndarray]:
    """Arbitrary weights: contractions do not need them to be probabilities."""
    rng = np.random.default_rng(seed)
    return {choice.key: rng.uniform(0.0, 1.0, len(choice.options)) for choice in space.choices}


def every_index(space: SearchSpace) -> np.ndarray:
    return np.array(list(product(*(range(len(choice.options)) for choice in space.choices))))


def term_values(
    space: SearchSpace, term_costs: Mapping[str, np.ndarray], index: np.ndarray
) -> list[float]:
    at = {choice.key: int(i) for choice, i in zip(space.choices, index, strict=True)}
    return [
        float(term_costs[term.slot][tuple(at[key] for key in term.keys)]) for term in space.terms()
    ]


def plain_expectation(
    space: SearchSpace, term_costs: Mapping[str, np.ndarray], gates: Mapping[str, Any], xp: Any
) -> Any:
    """The expectation by definition: one einsum per term."""
    total = 0.0
    for term in space.terms():
        letters = ascii_lowercase[: len(term.keys)]
        array = xp.asarray(term_costs[term.slot])
        total = (
            total
            + xp.einsum(
                f"{letters},{','.join(letters)}->", array, *(gates[key] for key in term.keys)
            )
            if term.keys
            else total + array
        )
    return total


@pytest.mark.slow
@FAST
@given(spaces(), st.sampled_from(("sum", "max")))
def test_costs_and_bounds_are_those_of_all_architectures(space: AnySpace, reduce: str) -> None:
    term_costs = term_costs_of(space)
    cost = additive_cost(space, term_costs, reduce=reduce, fixed=0.3)
    index_NC = every_index(space)
    combine = (
        (lambda values: 0.3 + sum(values))
        if reduce == "sum"
        else (lambda values: max(0.3, *values))
    )
    expected = np.array([combine(term_values(space, term_costs, index)) for index in index_NC])
    assert cost.costs(index_NC) == pytest.approx(expected, rel=1e-12)
    assert cost.cost(space.at(index_NC[-1])) == pytest.approx(expected[-1], rel=1e-12)
    assert cost.bounds() == pytest.approx((expected.min(), expected.max()), rel=1e-12)


@FAST
@given(spaces())
def test_stacked_contractions_equal_one_einsum_per_term(space: AnySpace) -> None:
    term_costs, gates = term_costs_of(space), gates_of(space)
    cost = additive_cost(space, term_costs, fixed=0.3)
    expected = 0.3 + float(plain_expectation(space, term_costs, gates, np))
    assert float(cost.expected(gates)) == pytest.approx(expected, rel=1e-12)
    assert float(
        cost.expected({key: torch.tensor(gate) for key, gate in gates.items()}, torch)
    ) == pytest.approx(expected, rel=1e-12)


@FAST
@given(spaces())
def test_marginals_are_the_gradient_of_the_definition(space: AnySpace) -> None:
    term_costs, gates = term_costs_of(space), gates_of(space)
    leaves = {key: torch.tensor(gate, requires_grad=True) for key, gate in gates.items()}
    total = plain_expectation(space, term_costs, leaves, torch)
    if total.requires_grad:
        total.backward()
    marginals = additive_cost(space, term_costs).marginals(gates)
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


def test_first_and_second_derivatives_match_finite_differences() -> None:
    space = coupled()
    macs = AdditiveCost.of_ops(space, lambda op: op.macs / 1e5)
    keys = [choice.key for choice in space.choices]
    leaves = [torch.tensor(gate, requires_grad=True) for gate in gates_of(space).values()]

    def expectation(*gates: torch.Tensor) -> torch.Tensor:
        return macs.expected(dict(zip(keys, gates, strict=True)), torch)

    assert torch.autograd.gradcheck(expectation, leaves, eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(expectation, leaves, eps=1e-6, atol=1e-7)


def test_centred_marginals_are_the_effect_of_fixing_an_option() -> None:
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
def test_costs_of_ops_match_a_walk_over_the_architecture(make: Any) -> None:
    space, rng = make(), np.random.default_rng(0)
    calls: list[str] = []

    def params(op: Any) -> int:
        calls.append(op.key)
        return int(op.params)

    total, largest = (
        AdditiveCost.of_ops(space, params),
        AdditiveCost.of_ops(space, lambda op: op.params, reduce="max"),
    )
    assert sorted(calls) == sorted(op.key for op in space.ops)  # each op is evaluated once
    for _ in range(50):
        picks = space.sample(rng)
        arch = space.decode(picks)
        assert total.cost(picks) == arch.params
        assert largest.cost(picks) == max(op.params for op in arch.ops())


def test_a_choice_that_every_term_shares_is_eliminated_last() -> None:
    """Each of forty choices has a term with one shared choice: eliminating that first
    would take a table of 4^40 numbers, more than 64 bits can count.
    """
    space = AnySpace(
        name="star",
        resolution=8,
        classes=2,
        options=(3, *[4] * 40),
        axes=tuple((i, 0) for i in range(1, 41)),
    )
    term_costs = term_costs_of(space)
    stacked = np.stack([term_costs[term.slot] for term in space.terms()])  # [terms, 4, 3]
    expected = stacked.min(axis=1).sum(axis=0).min(), stacked.max(axis=1).sum(axis=0).max()
    assert additive_cost(space, term_costs).bounds() == pytest.approx(expected, rel=1e-12)


def test_a_maximum_has_no_expectation_and_incomplete_picks_have_no_cost() -> None:
    space = coupled()
    peak = AdditiveCost.of_ops(space, lambda op: op.macs, reduce="max")
    for method in (peak.expected, peak.marginals):
        with pytest.raises(AssertionError, match="maximum"):
            method(gates_of(space))
    with pytest.raises(SpaceError, match=r"lack s0\.width"):
        peak.cost({})
