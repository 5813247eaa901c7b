"""TuNAS: reinforcement learning on a weight-shared super-net with an absolute latency reward.

Bender, Liu, Chen, Chu, Cheng, Kindermans, Le: "Can weight sharing outperform random
architecture search? An investigation with TuNAS" (CVPR 2020, arXiv 2008.06120);
released code google-research:tunas/. The constants are the code's.

Every decision d (skip or not, kernel, expansion, width) has its own categorical
distribution pi_d = softmax(logits_d), logits 0 at the start. Per step:

1. an architecture a ~ pi; one update of the weights of a on a training batch;
2. Q(a): accuracy on a *different*, held-out batch, 4 times as large, with the updated
   weights and batch-statistics BN;
3. reward  R = Q + beta * |T(a) / T0 - 1|, beta = -0.10  (the objective; the paper's equation 2);
4. REINFORCE  loss = -(R - b) * log pi(a), where b is an exponential moving average of R
   (momentum 0.95, zero-debiased) and log pi is *hierarchical*: kernel and expansion of
   a skipped slot do not count;
5. Adam with beta1 = 0, beta2 = 0.999, eps 1e-8; its rate is 0 for the first 25 % of the
   steps (RL delay), then rl_lr rising exponentially to 10 * rl_lr.

Warm-up, over the first 25 % with probability p(t) = 1 - t / (0.25 T), independently per
decision: a kernel or skip decision uses *all* its options, averaged (op warm-up); an
expansion or width decision uses its largest option (filter warm-up).

*Differences from the paper*:

- ``architectures`` defaults to 1; TuNAS samples one per accelerator core, 32 at a time,
  each on its core's part of the batch, and averages their gradients: ``architectures =
  32`` does the same.
- No held-out forward during the RL delay, where nothing would read its reward; the
  baseline starts after the delay.
- The final architecture: the paper takes the most likely option of every decision. A
  short search has not converged so far that this hits the target, so the argmax is one
  of the proposals; the others are drawn from the final policy, all within the target's
  tolerance, and the search stage ranks them by recalibrated held-out accuracy.
  ``candidates = 1`` is the paper's rule, where the argmax lies within the tolerance.
- ``rl_lr``: the paper's 3e-4 per 256 images is for 27,000 steps of 32 samples; short
  searches need a larger one (ours).
- Rematerialisation is the super-net's (``search.supernet.remat``): it recomputes the
  options of a mixture, as in op warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from hwnas.core.arch import Picks
from hwnas.core.option import Factors, factorise
from hwnas.core.space import Choice, SearchSpace
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

FILTER_AXES = ("expansion",)
"""Axes whose warm-up uses the largest option, and so do widths, depths and resolutions;
kernel, skip, SE and groups use the average.
"""


class TuNASConfig(BaseModel):
    """TuNAS's constants; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rl_lr: float | None = Field(
        None,
        gt=0,
        description="controller rate at the end of the delay; default 3e-4 * batch_size / 256",
    )
    rl_lr_ramp: float = Field(
        10.0, ge=1, description="factor by which the rate has grown at the end"
    )
    rl_delay: float = Field(
        0.25, ge=0, lt=1, description="part of the steps before the controller learns"
    )
    warmup: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="part of the steps with op and filter warm-up; at most rl_delay",
    )
    baseline_momentum: float = Field(0.95, ge=0, lt=1)
    entropy: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    held_out_multiple: int = Field(
        4, ge=1, description="held-out batch size as a multiple of the training batch"
    )
    architectures: int = Field(
        1,
        ge=1,
        description=(
            "architectures per step, each on its part of the batches; the paper: one per core, 32"
        ),
    )

    @model_validator(mode="after")
    def _warm_first(self) -> Self:
        if self.warmup > self.rl_delay:
            raise ValueError(
                f"warmup ({self.warmup}) must not outlast rl_delay ({self.rl_delay}): rewards of"
                " averaged ops mean nothing"
            )
        return self


@dataclass(frozen=True)
class Sample:
    """A drawn architecture: gates for the super-net and the decisions that were made by the policy.

    ``decided`` maps decision names to the option index; decisions of skipped slots and
    those replaced by a warm-up are not in it. ``picks`` is None while a warm-up
    averages options.
    """

    gates: dict[str, np.ndarray]
    decided: dict[str, int]
    picks: Picks | None


class Controller:
    """Independent categorical distributions over the decisions of a space, and REINFORCE on them.

    A slot's choice is taken apart into skip, kernel, expansion, ... (``factorise``); a
    width is one decision.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.factors = {choice.key: _factors(choice) for choice in space.choices}
        self.logits: dict[str, Tensor] = {}
        for key, factors in self.factors.items():
            if factors.skippable:
                self.logits[f"{key}.skip"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            for axis, values in factors.axes:
                self.logits[f"{key}.{axis}"] = torch.zeros(
                    len(values), dtype=torch.float64, requires_grad=True
                )
        self.optimizer = torch.optim.Adam(
            list(self.logits.values()), lr=1.0, betas=(0.0, 0.999), eps=1e-8
        )
        self.reward_sum, self.reward_weight = 0.0, 0.0

    def probabilities(self) -> dict[str, np.ndarray]:
        """Decision name -> probabilities [options]."""
        return {
            name: torch.softmax(logits.detach(), 0).numpy() for name, logits in self.logits.items()
        }

    def sample(self, rng: np.random.Generator, warmup_probability: float = 0.0) -> Sample:
        """Draw an architecture. Each decision is replaced by its warm-up with the given
        probability.
        """
        probabilities = self.probabilities()
        gates, decided = {}, {}
        picks: Picks | None = {}
        for choice in self.space.choices:
            factors = self.factors[choice.key]
            weights = {}
            for name, axis in _decisions(choice.key, factors):
                p = probabilities[name]
                drawn = int(rng.choice(len(p), p=p))
                if rng.random() < warmup_probability:
                    weights[name] = (
                        np.eye(len(p))[-1]
                        if axis in (*FILTER_AXES, "width")
                        else np.full(len(p), 1 / len(p))
                    )
                else:
                    decided[name] = drawn
                    weights[name] = np.eye(len(p))[drawn]
            gates[choice.key] = _joint(choice.key, factors, weights)
            # hierarchical: nothing below a skip counts
            if weights.get(f"{choice.key}.skip", np.zeros(2))[1] == 1.0:
                for axis, _ in factors.axes:
                    decided.pop(f"{choice.key}.{axis}", None)
            if picks is not None and gates[choice.key].max() == 1.0:
                picks[choice.key] = choice.options[int(gates[choice.key].argmax())]
            else:
                picks = None
        return Sample(gates, decided, picks)

    def update(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        lr: float,
        baseline_momentum: float = 0.95,
        entropy: float = 0.0,
    ) -> list[float]:
        """One REINFORCE step on the mean over samples; returns their advantages R - b.
        The first rewards are their own baseline.
        """
        self.reward_sum = baseline_momentum * self.reward_sum + (1 - baseline_momentum) * float(
            np.mean(rewards)
        )
        self.reward_weight = baseline_momentum * self.reward_weight + (1 - baseline_momentum)
        advantages = [reward - self.reward_sum / self.reward_weight for reward in rewards]
        loss = -entropy * self.entropy() if entropy else torch.zeros((), dtype=torch.float64)
        for sample, advantage in zip(samples, advantages, strict=True):
            terms = [
                torch.log_softmax(self.logits[name], 0)[i] for name, i in sample.decided.items()
            ]
            loss = loss - advantage / len(samples) * torch.stack(terms).sum() if terms else loss
        self.optimizer.param_groups[0]["lr"] = lr
        # zeros, not None, for what was not decided: Adam then treats all alike, also after a resume
        for logits in self.logits.values():
            logits.grad = torch.zeros_like(logits)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return advantages

    def entropy(self) -> Tensor:
        """Entropy of the policy in nats, hierarchical: what lies below a skip counts by
        the probability of not skipping.
        """
        total = torch.zeros((), dtype=torch.float64)
        for key, factors in self.factors.items():
            kept: Any = 1.0
            for name, axis in _decisions(key, factors):
                log_p = torch.log_softmax(self.logits[name], 0)
                entropy = -(log_p.exp() * log_p).sum()
                total = total + (entropy if axis == "skip" else kept * entropy)
                kept = log_p.exp()[0] if axis == "skip" else kept
        return total

    def best(self) -> Picks:
        """The most likely option of every decision."""
        decided = {name: int(p.argmax()) for name, p in self.probabilities().items()}
        picks: Picks = {}
        for choice in self.space.choices:
            factors = self.factors[choice.key]
            weights = {
                name: np.eye(len(self.logits[name]))[decided[name]]
                for name, _ in _decisions(choice.key, factors)
            }
            picks[choice.key] = choice.options[int(_joint(choice.key, factors, weights).argmax())]
        return picks

    def option_probabilities(self) -> dict[str, np.ndarray]:
        """Choice key -> probabilities of its options, as gates for the expected latency."""
        p = self.probabilities()
        return {key: _joint(key, factors, p) for key, factors in self.factors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Logits, optimiser state and baseline."""
        logits = {name: tensor.detach().clone() for name, tensor in self.logits.items()}
        return {
            "logits": logits,
            "optimizer": self.optimizer.state_dict(),
            "baseline": [self.reward_sum, self.reward_weight],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        with torch.no_grad():
            for name, tensor in state["logits"].items():
                self.logits[name].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.reward_sum, self.reward_weight = state["baseline"]


def _factors(choice: Choice) -> Factors:
    if choice.kind == "op":
        return factorise(tuple(map(str, choice.options)))
    # ascending like all axes, in whatever order the space lists them
    widths = sorted(map(float, choice.options))
    return Factors(
        (("width", tuple(widths)),),
        tuple((widths.index(float(option)),) for option in choice.options),
    )


def _decisions(key: str, factors: Factors) -> list[tuple[str, str]]:
    """(decision name, axis) of a choice, skip first. Index 1 of a skip decision means skip."""
    axes = (["skip"] if factors.skippable else []) + [axis for axis, _ in factors.axes]
    return [(f"{key}.{axis}", axis) for axis in axes]


def _joint(key: str, factors: Factors, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Weights of a choice's options from the weights of its separate decisions: their product."""
    keep, skip = weights.get(f"{key}.skip", np.array([1.0, 0.0]))
    gate = np.empty(len(factors.grid))
    for i, cell in enumerate(factors.grid):
        gate[i] = skip if cell is None else keep
        for (axis, _), position in zip(factors.axes, cell or (), strict=cell is not None):
            gate[i] *= weights[f"{key}.{axis}"][position]
    return gate


class TuNAS(Strategy):
    """The TuNAS strategy: a ``Controller`` trained beside the weights."""

    Config: ClassVar[type[BaseModel]] = TuNASConfig
    sharing = "collapsed"
    rate = "rl_lr"

    def __init__(self, config: TuNASConfig) -> None:
        self.config = config
        self.controller: Controller

    def setup(self, ctx: SearchContext) -> None:
        """Make the controller, uniform over the space."""
        self.controller = Controller(ctx.space)

    def parts(self) -> tuple[int, int]:
        """Every architecture has its part of both batches."""
        return self.config.architectures, self.config.architectures

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The ends of the warm-up and of the delay."""
        return math.ceil(self.config.warmup * ctx.steps), math.ceil(
            self.config.rl_delay * ctx.steps
        )

    def rl_rate(self, ctx: SearchContext) -> float:
        """The controller's learning rate at this step; 0 during the delay."""
        base = self.config.rl_lr if self.config.rl_lr is not None else 3e-4 * ctx.batch_size / 256
        progress = ctx.step / ctx.steps
        if progress < self.config.rl_delay:
            return 0.0
        return float(
            base
            * self.config.rl_lr_ramp
            ** ((progress - self.config.rl_delay) / (1 - self.config.rl_delay))
        )

    def step(self, ctx: SearchContext) -> Metrics:
        """One weight update and, after the delay, one update of the controller with the
        same architectures.
        """
        warmup_steps = self.config.warmup * ctx.steps
        probability = max(0.0, 1 - ctx.step / warmup_steps) if warmup_steps else 0.0
        samples = [
            self.controller.sample(ctx.rng, probability) for _ in range(self.config.architectures)
        ]
        gates = [sample.gates for sample in samples]
        metrics = ctx.train(*gates, split=True)
        rate = self.rl_rate(ctx)
        if rate > 0.0:
            qualities = ctx.qualities(*gates, multiple=self.config.held_out_multiple)
            latencies = [float(ctx.cost_model.expected(each)) for each in gates]
            rewards = [
                ctx.reward(quality, latency)
                for quality, latency in zip(qualities, latencies, strict=True)
            ]
            self.controller.update(
                samples, rewards, rate, self.config.baseline_momentum, self.config.entropy
            )
            means = {
                "quality": qualities,
                ctx.cost_model.unit.quantity: latencies,
                "reward": rewards,
            }
            metrics |= {name: float(np.mean(values)) for name, values in means.items()}
        expected = float(ctx.cost_model.expected(self.controller.option_probabilities()))
        return {
            **metrics,
            "entropy": float(self.controller.entropy().detach()),
            ctx.cost_model.unit.expected: expected,
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax first, where it is within the tolerance, then likely samples of
        the policy that are.
        """
        return propose_feasible(
            ctx, self.controller.option_probabilities(), count, self.controller.best()
        )

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.controller.load_state_dict(state)
