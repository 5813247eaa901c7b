"""Objectives: each paper's formula, on floats and tensors, as a case of one form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hwnas.core.objective import (
    AbsoluteObjective,
    MnasObjective,
    Objective,
    PenalisedObjective,
    absolute,
    add_linear,
    fbnet,
    mnas,
    mnas_hard,
    mul_log,
    penalised,
    proxylessnas_reward,
)
from hwnas.errors import TargetError

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
    assert penalised(quality, cost, target, "absolute", "add", beta) == pytest.approx(
        absolute(quality, cost, target, beta)
    )
    assert absolute(quality, cost, target, beta) == pytest.approx(
        quality + beta * math.fabs(cost / target - 1)
    )


@FAST
@given(QUALITY, COST, COST, BETA)
def test_mnasnet_soft_is_linear_and_mul(
    quality: float, cost: float, target: float, beta: float
) -> None:
    assert penalised(quality, cost, target, "linear", "mul", beta) == pytest.approx(
        mnas(quality, cost, target, beta)
    )
    assert mnas(quality, cost, target, beta) == pytest.approx(
        quality * math.exp(beta * math.log(cost / target))
    )


@FAST
@given(QUALITY, COST, COST, BETA)
def test_mnasnet_hard_is_positive_and_mul(
    quality: float, cost: float, target: float, beta: float
) -> None:
    paper = quality * (1.0 if cost <= target else (cost / target) ** beta)
    assert mnas_hard(quality, cost, target, beta) == pytest.approx(paper)
    assert penalised(quality, cost, target, "positive", "mul", beta) == pytest.approx(paper)


@FAST
@given(st.floats(0.1, 10), COST, COST, st.floats(0, 1))
def test_proxylessnas_is_linear_and_add_on_a_loss(
    loss: float, cost: float, reference: float, scale: float
) -> None:
    assert add_linear(loss, cost, reference, scale) == pytest.approx(
        loss + scale * (cost - reference) / reference
    )


def test_the_papers_losses_by_hand() -> None:
    assert add_linear(2.0, 96.0, 80.0) == pytest.approx(2.02)  # 2 + 0.1 * 16 / 80
    assert mul_log(2.0, 80.0, 80.0) == pytest.approx(0.4)  # at the reference: alpha * CE
    assert mul_log(2.0, 81.0, 9.0) == pytest.approx(0.4 * 2**0.3)  # log 81 = 2 log 9
    # the fallback values in ProxylessNAS's code
    assert mul_log(2.0, 9.0, 81.0, alpha=1.0, beta=0.6) == pytest.approx(2 * 0.5**0.6)
    assert mul_log(2.0, 81e-3, 9e-3, unit_ms=1e-3) == pytest.approx(0.4 * 2**0.3)
    assert fbnet(2.0, math.exp(10) / 1000) == pytest.approx(0.4 * 10**0.6)  # exp(10) microseconds
    assert fbnet(2.0, math.e**4, unit_ms=1.0) == pytest.approx(0.4 * 4**0.6)
    # not alpha * beta * log LAT, a known mistake
    assert fbnet(2.0, math.e**4, unit_ms=1.0) != pytest.approx(0.4 * 0.6 * 4)
    assert proxylessnas_reward(0.75, 160.0, 80.0) == pytest.approx(0.75 * 0.5**0.1)
    assert proxylessnas_reward(0.75, 40.0, 80.0) == pytest.approx(0.75 * 2**0.1)


@FAST
@given(
    st.floats(0.1, 10),
    st.floats(1.5, 500),
    st.floats(1.5, 500),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
def test_the_papers_losses_on_floats_tensors_and_arrays(
    loss: float, cost: float, reference: float, alpha: float, beta: float
) -> None:
    expected = [
        (
            mul_log,
            (reference, alpha, beta),
            alpha * loss * (math.log(cost) / math.log(reference)) ** beta,
        ),
        (fbnet, (alpha, beta), loss * alpha * math.log(1000 * cost) ** beta),
        (add_linear, (reference, alpha), loss + alpha * (cost - reference) / reference),
    ]
    for form, others, value in expected:
        assert form(loss, cost, *others) == pytest.approx(value, rel=1e-9)
        assert type(form(loss, cost, *others)) is float
        assert form(loss, np.array([cost, cost]), *others) == pytest.approx(
            np.array([value, value]), rel=1e-9
        )
        assert float(
            form(
                torch.tensor(loss, dtype=torch.float64),
                torch.tensor(cost, dtype=torch.float64),
                *others,
            )
        ) == pytest.approx(value)


@pytest.mark.parametrize(
    "form", [lambda ce, ms: mul_log(ce, ms, 70.0), fbnet, lambda ce, ms: add_linear(ce, ms, 70.0)]
)
@pytest.mark.parametrize("cost", [1.5, 60.0, 130.0])
def test_the_papers_losses_favour_fast_networks_by_the_right_amount(form: Any, cost: float) -> None:
    inputs = (
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(cost, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(form, inputs)
    form(*inputs).backward()
    assert float(inputs[0].grad) > 0
    assert float(inputs[1].grad) > 0


def test_the_logarithm_of_one_unit_or_less_is_refused() -> None:
    assert mul_log(2.0, 0.4, 0.5, unit_ms=1e-3) == pytest.approx(
        0.4 * (math.log(400) / math.log(500)) ** 0.3
    )
    for cost, reference in (
        (80.0, 0.5),
        (0.5, 80.0),
        (1.0, 80.0),
        (torch.tensor([80.0, 0.5]), 80.0),
        (np.array(0.5), 80.0),
    ):
        with pytest.raises(
            TargetError,
            match=r"above its unit of 1 ms .*: set unit_ms = 0\.001 \(microseconds\) or less",
        ):
            mul_log(2.0, cost, reference)
    with pytest.raises(TargetError, match=r"above its unit of 0\.001 ms"):
        fbnet(2.0, 0.0009)


NONLINEAR = {
    "linear": lambda x: x,
    "positive": lambda x: max(x, 0.0),
    "negative": lambda x: min(x, 0.0),
    "absolute": abs,
}


@FAST
@given(st.floats(0.1, 10), COST, COST, st.floats(-1, 1), st.sampled_from(sorted(NONLINEAR)))
def test_every_form_on_floats_and_tensors(
    loss: float, cost: float, baseline: float, scale: float, nonlinear: str
) -> None:
    x = NONLINEAR[nonlinear](cost / baseline - 1)
    for aggregate, expected in (("add", loss + scale * x), ("mul", loss * (1 + x) ** scale)):
        assert penalised(loss, cost, baseline, nonlinear, aggregate, scale) == pytest.approx(
            expected
        )
        tensors = (
            torch.tensor([loss, loss], dtype=torch.float64),
            torch.tensor([cost, baseline], dtype=torch.float64),
        )
        values = penalised(*tensors, baseline, nonlinear, aggregate, scale)
        assert values.tolist() == pytest.approx([expected, loss])


@pytest.mark.parametrize("nonlinear", sorted(NONLINEAR))
@pytest.mark.parametrize("aggregate", ["add", "mul"])
@pytest.mark.parametrize("cost", [60.0, 130.0])
def test_gradients_match_finite_differences(nonlinear: str, aggregate: str, cost: float) -> None:
    inputs = (
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(cost, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda loss, cost: penalised(loss, cost, 100.0, nonlinear, aggregate, 0.6), inputs
    )
    over = cost > 100
    penalised(*inputs, 100.0, nonlinear, aggregate, 0.6).backward()
    slope = float(inputs[1].grad)
    sign = {"linear": 1, "positive": over, "negative": not over, "absolute": 1 if over else -1}[
        nonlinear
    ]
    assert (slope > 0) - (slope < 0) == sign


def test_the_absolute_reward_of_equal_networks_is_best_at_the_target() -> None:
    rewards = {cost: absolute(0.7, cost, 80.0) for cost in range(40, 121)}
    assert max(rewards, key=rewards.get) == 80
    assert mnas(0.7, 40.0, 80.0) > mnas(0.7, 80.0, 80.0)  # which TuNAS's reward is meant to avoid


def test_objectives_are_read_from_a_configuration() -> None:
    read = TypeAdapter(Objective).validate_python
    assert read({"name": "absolute"}).reward(0.75, 92.4, 84.0) == pytest.approx(0.74)
    assert read({"name": "absolute", "beta": -0.5}) == AbsoluteObjective(beta=-0.5)
    assert read({"name": "mnas"}).reward(0.75, 42.0, 84.0) == pytest.approx(0.75 * 2**0.07)
    assert read({"name": "mnas_hard"}).reward(0.75, 42.0, 84.0) == 0.75
    assert read({"name": "mnas_hard"}) == MnasObjective(name="mnas_hard", beta=-0.07)
    assert read({"name": "penalised"}).reward(0.75, 92.4, 84.0) == pytest.approx(0.74)
    tuned = PenalisedObjective(name="penalised", nonlinear="positive", aggregate="mul", scale=-0.07)
    assert tuned.reward(0.75, 168.0, 84.0) == pytest.approx(
        MnasObjective(name="mnas_hard").reward(0.75, 168.0, 84.0)
    )
    for wrong in (
        {"name": "abs"},
        {"name": "absolute", "beta": 0.1},
        {"name": "mnas", "gamma": 1},
        {},
    ):
        with pytest.raises(ValidationError):
            read(wrong)
