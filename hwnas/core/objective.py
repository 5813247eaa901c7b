"""Rewards and loss terms that trade quality for cost: pure functions of quality (or
loss), cost and target.

With the relative cost r = T / T0, the rewards (higher is better) are:

=======================  ===============================  ==============================
``absolute``             Q + beta * |r - 1|               TuNAS, eq. 2 (arXiv
                                                          2008.06120); beta = -0.10
``mnas``                 Q * r^beta                       MnasNet, soft (arXiv
                                                          1807.11626); beta = -0.07
``mnas_hard``            Q * min(r^beta, 1)               MnasNet, hard: no bonus below
                                                          the target
``proxylessnas_reward``  Q * (1 / r)^0.1                  ProxylessNAS, REINFORCE
                                                          (arXiv 1812.00332)
=======================  ===============================  ==============================

and the losses (lower is better; differentiable if T is an expectation):

=======================  ===============================  ==============================
``penalised``            aggregate(loss, f(r - 1))        NNI's unifying form, of which
                                                          all others are cases
``add_linear``           CE + lambda * (r - 1)            ProxylessNAS, add#linear;
                                                          lambda = 0.1
``mul_log``              alpha * CE * (log T / log T0)^b  ProxylessNAS, mul#log;
                                                          alpha = 0.2, b = 0.3
``fbnet``                alpha * CE * (log T)^b           FBNet (arXiv 1812.03443);
                                                          alpha = 0.2, b = 0.6
=======================  ===============================  ==============================

A logarithm depends on the unit of time and is positive only above one unit. ``mul_log``
uses milliseconds, as ProxylessNAS does, whose reference is 80 ms. ``fbnet`` uses
microseconds (our choice), because networks that take less than a millisecond are common
here. Other costs are counted in millions (``core.cost.Unit.scale``), which then take
the place of milliseconds.

``unit_ms`` sets another unit. The unit also changes the weight of latency: if T grows
by a small fraction, the loss grows by beta / log(T / unit) times that fraction. A
latency of one unit or less is an error, because the loss would change its direction or
become NaN.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from hwnas.core.settings import Settings
from hwnas.errors import TargetError

MICROSECOND_MS = 1e-3
"""A microsecond in milliseconds."""

Nonlinear: TypeAlias = Literal["linear", "positive", "negative", "absolute"]


def absolute(quality: float, cost: float, target: float, beta: float = -0.10) -> float:
    """TuNAS's absolute reward. Among architectures of equal quality, it is highest at
    the target itself.

    Example:
        >>> round(absolute(0.75, 92.4, 84.0), 6)
        0.74
    """
    return quality + beta * abs(cost / target - 1)


def mnas(quality: float, cost: float, target: float, beta: float = -0.07) -> float:
    """MnasNet's soft exponential reward."""
    return float(quality * (cost / target) ** beta)


def mnas_hard(quality: float, cost: float, target: float, beta: float = -0.07) -> float:
    """MnasNet's hard exponential reward: as ``mnas`` above the target, the plain
    quality below it.
    """
    return float(quality * min((cost / target) ** beta, 1.0))


def proxylessnas_reward(
    quality: float, cost: float, reference_ms: float, tradeoff: float = 0.1
) -> float:
    """ProxylessNAS's reward for REINFORCE: acc * (ref / lat)^0.1, MnasNet's soft reward
    with beta = -0.1.

    [mit-han-lab/proxylessnas: search/nas_manager.py, rl_tradeoff_ratio]
    """
    return mnas(quality, cost, reference_ms, -tradeoff)


def penalised(
    loss: Any,
    cost: Any,
    baseline: float,
    nonlinear: Nonlinear = "linear",
    aggregate: Literal["add", "mul"] = "add",
    scale: float = 1.0,
) -> Any:
    """NNI's general form: loss + scale * f(cost / baseline - 1) for ``add``, and
    loss * (1 + f(cost / baseline - 1))^scale for ``mul``.

    f is ``linear`` (x), ``positive`` (max(x, 0)), ``negative`` (min(x, 0)) or
    ``absolute`` (|x|). Works on floats and on tensors, so that differentiable methods
    can use it. [microsoft/nni: nni/nas/oneshot/pytorch/profiler.py, ProfilerPenalty]
    """
    x = cost / baseline - 1
    # Products instead of max and min, which differ between floats and tensors.
    if nonlinear == "absolute":
        x = abs(x)
    elif nonlinear == "positive":
        x = x * (x > 0)
    elif nonlinear == "negative":
        x = x * (x < 0)
    if aggregate == "add":
        return loss + scale * x
    return loss * (1 + x) ** scale


def add_linear(loss: Any, expected_ms: Any, reference_ms: float, weight: float = 0.1) -> Any:
    """ProxylessNAS's ``add#linear``: CE + lambda * (E[lat] - ref) / ref, on floats or
    tensors. ``weight`` is lambda.

    [mit-han-lab/proxylessnas: search/nas_manager.py]
    """
    return penalised(loss, expected_ms, reference_ms, "linear", "add", weight)


def mul_log(
    loss: Any,
    expected_ms: Any,
    reference_ms: float,
    alpha: float = 0.2,
    beta: float = 0.3,
    unit_ms: float = 1.0,
) -> Any:
    """ProxylessNAS's ``mul#log``: alpha * CE * (log E[lat] / log ref)^beta, on floats
    or tensors.

    Latencies are in units of ``unit_ms`` milliseconds. Raises TargetError if one of
    them is a unit or less. [mit-han-lab/proxylessnas: search/nas_manager.py]

    Example:
        >>> round(mul_log(1.0, 80.0, 80.0), 12)
        0.2
    """
    return penalised(
        alpha * loss, _log(expected_ms, unit_ms), _log(reference_ms, unit_ms), "linear", "mul", beta
    )


def fbnet(
    loss: Any,
    latency_ms: Any,
    alpha: float = 0.2,
    beta: float = 0.6,
    unit_ms: float = MICROSECOND_MS,
) -> Any:
    """FBNet's loss: CE * alpha * (log LAT)^beta, on floats or tensors. It has no
    target: alpha and beta set the trade-off.

    LAT is the latency under the Gumbel-softmax mask, in units of ``unit_ms``
    milliseconds. Raises TargetError if it is a unit or less. Beta is an exponent, not a
    factor: alpha * beta * log LAT is a common mistake.

    Example:
        >>> round(fbnet(1.0, 22.026465794806718), 6)  # log(22026 us) = 10
        0.796214
    """
    return penalised(alpha * loss, _log(latency_ms, unit_ms), 1.0, "linear", "mul", beta)


def _log(latency_ms: Any, unit_ms: float) -> Any:
    """Logarithm of a latency in units of ``unit_ms``. Raises TargetError if it would
    not be positive.
    """
    is_number = isinstance(latency_ms, float | int)
    too_low = latency_ms <= unit_ms
    if not is_number:
        too_low = too_low.any()
    if too_low:
        raise TargetError(
            f"a loss with the logarithm of latency needs latencies above its unit of {unit_ms:g}"
            f" ms (for MACs or parameters: {unit_ms:g} million), and this search has a lower one:"
            f" set unit_ms = {MICROSECOND_MS:g} (microseconds) or less, or use another latency"
            " loss."
        )
    units = latency_ms / unit_ms
    if is_number:
        return math.log(units)
    # A torch tensor, else a numpy array. This module does not import torch.
    return units.log() if hasattr(units, "log") else np.log(units)


class AbsoluteObjective(Settings):
    """TuNAS's absolute reward."""

    name: Literal["absolute"] = "absolute"
    beta: float = Field(default=-0.10, ge=-1000, le=0)

    def reward(self, quality: float, cost: float, target: float) -> float:
        """Reward of an architecture; higher is better."""
        return absolute(quality, cost, target, self.beta)


class MnasObjective(Settings):
    """MnasNet's rewards: soft (``mnas``) and hard (``mnas_hard``)."""

    name: Literal["mnas", "mnas_hard"]
    beta: float = Field(default=-0.07, ge=-1000, le=0)

    def reward(self, quality: float, cost: float, target: float) -> float:
        """Reward of an architecture; higher is better."""
        formula = mnas if self.name == "mnas" else mnas_hard
        return formula(quality, cost, target, self.beta)


class PenalisedObjective(Settings):
    """NNI's general form as a reward, so ``scale`` is negative."""

    name: Literal["penalised"]
    nonlinear: Nonlinear = "absolute"
    aggregate: Literal["add", "mul"] = "add"
    scale: float = Field(default=-0.10, ge=-1000, le=0)

    def reward(self, quality: float, cost: float, target: float) -> float:
        """Reward of an architecture; higher is better."""
        return float(penalised(quality, cost, target, self.nonlinear, self.aggregate, self.scale))


Objective = Annotated[
    AbsoluteObjective | MnasObjective | PenalisedObjective, Field(discriminator="name")
]
