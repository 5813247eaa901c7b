"""Rewards and penalties: pure functions of quality (or loss), cost and target.

With the relative cost r = T / T0:

========================  =================================  ==========================================
``absolute``              Q + beta * |r - 1|                 TuNAS, eq. 2 (arXiv 2008.06120); beta = -0.10
``mnas``                  Q * r^beta                         MnasNet, soft (arXiv 1807.11626); beta = -0.07
``mnas_hard``             Q * min(r^beta, 1)                 MnasNet, hard: no bonus below the target
``penalised``             aggregate(loss, f(r - 1))          NNI's unifying form, of which the rest are cases
========================  =================================  ==========================================
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Nonlinear: TypeAlias = Literal["linear", "positive", "negative", "absolute"]


def absolute(quality: float, cost_ms: float, target_ms: float, beta: float = -0.10) -> float:
    """TuNAS's absolute reward. Its maximum over equal qualities is at the target itself.

    Example:
        >>> round(absolute(0.75, 92.4, 84.0), 6)
        0.74
    """
    return quality + beta * abs(cost_ms / target_ms - 1)


def mnas(quality: float, cost_ms: float, target_ms: float, beta: float = -0.07) -> float:
    """MnasNet's soft exponential reward."""
    return float(quality * (cost_ms / target_ms) ** beta)


def mnas_hard(quality: float, cost_ms: float, target_ms: float, beta: float = -0.07) -> float:
    """MnasNet's hard exponential reward: the same above the target, the plain quality below it."""
    return float(quality * min((cost_ms / target_ms) ** beta, 1.0))


def penalised(
    loss: Any, cost: Any, baseline: float, nonlinear: Nonlinear = "linear", aggregate: Literal["add", "mul"] = "add", scale: float = 1.0
) -> Any:
    """NNI's form: ``add``: loss + scale * f(cost / baseline - 1); ``mul``: loss * (1 + f(cost / baseline - 1))^scale.

    f is ``linear`` (x), ``positive`` (max(x, 0)), ``negative`` (min(x, 0)) or ``absolute`` (|x|). Works on floats and on
    tensors, so that differentiable methods can use it. [microsoft/nni: nni/nas/oneshot/pytorch/profiler.py, ProfilerPenalty]
    """
    x = cost / baseline - 1
    if nonlinear == "absolute":
        x = abs(x)
    elif nonlinear == "positive":
        x = x * (x > 0)
    elif nonlinear == "negative":
        x = x * (x < 0)
    return loss + scale * x if aggregate == "add" else loss * (1 + x) ** scale


class _Objective(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AbsoluteObjective(_Objective):
    """TuNAS's absolute reward."""

    name: Literal["absolute"] = "absolute"
    beta: float = Field(default=-0.10, le=0)

    def reward(self, quality: float, cost_ms: float, target_ms: float) -> float:
        """Reward of an architecture; higher is better."""
        return absolute(quality, cost_ms, target_ms, self.beta)


class MnasObjective(_Objective):
    """MnasNet's rewards: soft (``mnas``) and hard (``mnas_hard``)."""

    name: Literal["mnas", "mnas_hard"]
    beta: float = Field(default=-0.07, le=0)

    def reward(self, quality: float, cost_ms: float, target_ms: float) -> float:
        """Reward of an architecture; higher is better."""
        return (mnas if self.name == "mnas" else mnas_hard)(quality, cost_ms, target_ms, self.beta)


class PenalisedObjective(_Objective):
    """NNI's unifying form, as a reward (``scale`` is then negative)."""

    name: Literal["penalised"]
    nonlinear: Nonlinear = "absolute"
    aggregate: Literal["add", "mul"] = "add"
    scale: float = Field(default=-0.10, le=0)

    def reward(self, quality: float, cost_ms: float, target_ms: float) -> float:
        """Reward of an architecture; higher is better."""
        return float(penalised(quality, cost_ms, target_ms, self.nonlinear, self.aggregate, self.scale))


Objective = Annotated[AbsoluteObjective | MnasObjective | PenalisedObjective, Field(discriminator="name")]
