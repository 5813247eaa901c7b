"""Weights of options under gates: plain numbers, or scalar tensors with a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def differentiable(gate: Any) -> bool:
    """Whether a gate vector wants a gradient."""
    return isinstance(gate, Tensor) and gate.requires_grad


def option_weights(gate: Any, values: list[float]) -> Any:
    """The weights of all options, from a gate vector and its ``values``: scalar tensors
    if the gate wants a gradient, else plain numbers.
    """
    if differentiable(gate):
        return gate
    # plain numbers allow shortcuts for 0 and 1, which is_number finds
    return values


def is_number(weight: Any, value: float) -> bool:
    """Whether a weight is a plain number equal to ``value``. False for tensors, which
    carry a gradient.
    """
    return not isinstance(weight, Tensor) and float(weight) == value


def weighted(x_NCHW: Tensor, weight: Any) -> Tensor:
    """``x_NCHW`` times a weight, without a copy if the weight is 1."""
    if is_number(weight, 1.0):
        return x_NCHW
    y_NCHW: Tensor = x_NCHW * weight
    return y_NCHW
