"""Objectives: each paper's formula, on floats and tensors, as a case of the one form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hwnas.core.objective import AbsoluteObjective, MnasObjective, Objective, PenalisedObjective, absolute, mnas, mnas_hard, penalised

FAST = settings(deadline=None, derandomize=True, max_examples=200)
QUALITY = st.floats(0.01, 1.0)
COST = st.floats(1.0, 500.0)
BETA = st.floats(-0.5, 0.0)


def test_values_by_hand() -> None:
    assert absolute(0.75, 92.4, 84.0) == pytest.approx(0.74)
    assert absolute(0.75, 75.6, 84.0) == pytest.approx(0.74)
    assert absolute(0.75, 84.0, 84.0) == 0.75
    assert mnas(0.75, 168.0, 84.0) == pytest.approx(0.75 * 2**-0.07)
    assert mnas(0.75, 42.0, 84.0) == pytest.approx(0.75 * 2**0.07)
    assert mnas_hard(0.75, 168.0, 84.0) == pytest.approx(0.75 * 2**-0.07)
    assert mnas_hard(0.75, 42.0, 84.0) == 0.75


@FAST
@given(QUALITY, COST, COST, BETA)
def test_tunas_is_absolute_and_add(quality: float, cost: float, target: float, beta: float) -> None:
    assert penalised(quality, cost, target, "absolute", "add", beta) == pytest.approx(absolute(quality, cost, target, beta))
    assert absolute(quality, cost, target, beta) == pytest.approx(quality + beta * math.fabs(cost / target - 1))


@FAST
@given(QUALITY, COST, COST, BETA)
def test_mnasnet_soft_is_linear_and_mul(quality: float, cost: float, target: float, beta: float) -> None:
    assert penalised(quality, cost, target, "linear", "mul", beta) == pytest.approx(mnas(quality, cost, target, beta))
    assert mnas(quality, cost, target, beta) == pytest.approx(quality * math.exp(beta * math.log(cost / target)))


@FAST
@given(QUALITY, COST, COST, BETA)
def test_mnasnet_hard_is_positive_and_mul(quality: float, cost: float, target: float, beta: float) -> None:
    paper = quality * (1.0 if cost <= target else (cost / target) ** beta)
    assert mnas_hard(quality, cost, target, beta) == pytest.approx(paper)
    assert penalised(quality, cost, target, "positive", "mul", beta) == pytest.approx(paper)


@FAST
@given(st.floats(0.1, 10), COST, COST, st.floats(0, 1))
def test_proxylessnas_is_linear_and_add_on_a_loss(loss: float, cost: float, reference: float, scale: float) -> None:
    assert penalised(loss, cost, reference, "linear", "add", scale) == pytest.approx(loss + scale * (cost - reference) / reference)


NONLINEAR = {"linear": lambda x: x, "positive": lambda x: max(x, 0.0), "negative": lambda x: min(x, 0.0), "absolute": abs}


@FAST
@given(st.floats(0.1, 10), COST, COST, st.floats(-1, 1), st.sampled_from(sorted(NONLINEAR)))
def test_every_form_on_floats_and_tensors(loss: float, cost: float, baseline: float, scale: float, nonlinear: str) -> None:
    x = NONLINEAR[nonlinear](cost / baseline - 1)
    for aggregate, expected in (("add", loss + scale * x), ("mul", loss * (1 + x) ** scale)):
        assert penalised(loss, cost, baseline, nonlinear, aggregate, scale) == pytest.approx(expected)
        tensors = torch.tensor([loss, loss], dtype=torch.float64), torch.tensor([cost, baseline], dtype=torch.float64)
        found = penalised(*tensors, baseline, nonlinear, aggregate, scale)
        assert found.tolist() == pytest.approx([expected, loss])


@pytest.mark.parametrize("nonlinear", sorted(NONLINEAR))
@pytest.mark.parametrize("aggregate", ["add", "mul"])
@pytest.mark.parametrize("cost", [60.0, 130.0])
def test_gradients_are_those_of_finite_differences(nonlinear: str, aggregate: str, cost: float) -> None:
    inputs = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.tensor(cost, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda loss, cost: penalised(loss, cost, 100.0, nonlinear, aggregate, 0.6), inputs)
    over = cost > 100
    penalised(*inputs, 100.0, nonlinear, aggregate, 0.6).backward()
    slope = float(inputs[1].grad)
    sign = {"linear": 1, "positive": over, "negative": not over, "absolute": 1 if over else -1}[nonlinear]
    assert (slope > 0) - (slope < 0) == sign


def test_the_absolute_reward_of_equal_networks_is_best_at_the_target() -> None:
    rewards = {cost: absolute(0.7, cost, 80.0) for cost in range(40, 121)}
    assert max(rewards, key=rewards.get) == 80
    assert mnas(0.7, 40.0, 80.0) > mnas(0.7, 80.0, 80.0)  # what TuNAS's reward was made to avoid


def test_the_objectives_of_a_configuration() -> None:
    read = TypeAdapter(Objective).validate_python
    assert read({"name": "absolute"}).reward(0.75, 92.4, 84.0) == pytest.approx(0.74)
    assert read({"name": "absolute", "beta": -0.5}) == AbsoluteObjective(beta=-0.5)
    assert read({"name": "mnas"}).reward(0.75, 42.0, 84.0) == pytest.approx(0.75 * 2**0.07)
    assert read({"name": "mnas_hard"}).reward(0.75, 42.0, 84.0) == 0.75
    assert read({"name": "mnas_hard"}) == MnasObjective(name="mnas_hard", beta=-0.07)
    assert read({"name": "penalised"}).reward(0.75, 92.4, 84.0) == pytest.approx(0.74)
    tuned = PenalisedObjective(name="penalised", nonlinear="positive", aggregate="mul", scale=-0.07)
    assert tuned.reward(0.75, 168.0, 84.0) == pytest.approx(MnasObjective(name="mnas_hard").reward(0.75, 168.0, 84.0))
    for wrong in ({"name": "abs"}, {"name": "absolute", "beta": 0.1}, {"name": "mnas", "gamma": 1}, {}):
        with pytest.raises(ValidationError):
            read(wrong)
