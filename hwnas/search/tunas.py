"""TuNAS: reinforcement learning on a weight-shared super-net, absolute latency reward.

Bender, Liu, Chen, Chu, Cheng, Kindermans, Le: "Can weight sharing outperform random
architecture search? An investigation with TuNAS" (CVPR 2020, arXiv 2008.06120);
released code google-research:tunas/. The constants are those of the code.

A *choice* of the space is split into *decisions*: skip or not, kernel, expansion, ...;
a width is a single decision. Every decision d has its own categorical distribution
pi_d = softmax(logits_d), and all logits start at 0. Each step:

1. Shared weights: sample an architecture a ~ pi and update the weights that a uses on
   one training batch.
2. Held-out quality Q(a): the accuracy of a on a *different*, held-out batch, 4 times as
   large, with the updated weights; BN uses the statistics of that batch.
3. Reward: R = Q + beta * |T(a) / T0 - 1| with beta = -0.10, where T(a) is the latency
   (or any other cost with a target) and T0 the target (the objective; equation 2 of the
   paper).
4. REINFORCE: loss = -(R - b) * log pi(a). The baseline b is an exponential moving
   average of R (momentum 0.95, zero-debiased). log pi is *hierarchical*: the kernel and
   expansion of a skipped slot do not count.
5. Policy update: Adam with beta1 = 0, beta2 = 0.999, eps 1e-8. Its learning rate is 0
   for the first 25 % of the steps (the RL delay), then starts at rl_lr and rises
   exponentially to 10 * rl_lr.

Warm-up: during the first 25 % of the N steps, each decision of step n is replaced,
independently, with probability p(n) = 1 - n / (0.25 N). A kernel or skip decision then
uses the average of *all* its options (op warm-up); an expansion or width decision uses
its largest option (filter warm-up).

*Differences from the paper*:

- ``architectures`` defaults to 1. TuNAS samples one per accelerator core, 32 at a time,
  each on its core's part of the batch, and averages their gradients; ``architectures =
  32`` does the same.
- There is no held-out forward pass during the RL delay, because nothing would use its
  reward; the baseline starts after the delay.
- Final architecture: the paper takes the most likely option of every decision. A short
  search does not converge far enough for this argmax to hit the target, so the argmax
  is only one of the proposals. The others are drawn from the final policy, all within
  the target's tolerance, and the search stage ranks them by recalibrated held-out
  accuracy. ``search.candidates = 1`` is the paper's rule whenever the argmax is within
  the tolerance.
- ``rl_lr``: the default is the paper's 3e-4 per 256 images, which suits its 27,000
  steps of 32 samples. Short searches need a larger value; our configurations set one.
- Rematerialisation (recomputing the activations of averaged options in the backward
  pass to save memory) is a setting of the super-net, ``search.supernet.remat``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.core.option import Factors, factorise
from hwnas.core.space import Choice, SearchSpace
from hwnas.lazy import torch
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

FILTER_AXES = ("expansion", "width")
"""Axes with filter warm-up (the largest option). All other axes (kernel, skip, SE,
groups) have op warm-up (the average). Depths and resolutions have filter warm-up,
because ``_factors`` also names their only axis "width".
"""


class TuNASConfig(Section):
    """TuNAS's constants. The defaults are those of the released code, except
    ``architectures`` (paper: 32 per step).
    """

    rl_lr: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description=(
            "learning rate of the policy when the RL delay ends; default 3e-4 * batch_size / 256"
        ),
    )
    rl_lr_ramp: float = Field(
        10.0, ge=1, le=1e6, description="factor by which rl_lr has grown at the end of the search"
    )
    rl_delay: float = Field(
        0.25, ge=0, lt=1, description="fraction of the steps before the policy starts to learn"
    )
    warmup: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="fraction of the steps with op and filter warm-up; at most rl_delay",
    )
    baseline_momentum: float = Field(
        0.95, ge=0, lt=1, description="momentum of the moving average of the rewards"
    )
    entropy: float = Field(0.0, ge=0, le=1e6, description="weight of an entropy bonus")
    held_out_multiple: int = Field(
        4,
        ge=1,
        le=1_000_000,
        description="held-out batch size as a multiple of the training batch size",
    )
    architectures: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description=(
            "architectures per step, each on its own part of the batches; the paper has one"
            " per core, 32"
        ),
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup > self.rl_delay:
            raise ValueError(
                f"warmup ({self.warmup}) must not outlast rl_delay ({self.rl_delay}): the reward"
                " of averaged ops is not the reward of any architecture"
            )
        return self


@dataclass(frozen=True)
class Sample:
    """One draw from the policy.

    ``gates`` run the super-net: choice key -> weights [options]. ``decided`` maps the
    decisions that the policy made to the index of the drawn option; it leaves out the
    decisions of skipped slots and those replaced by a warm-up. ``picks`` is the
    architecture, or None while a warm-up averages options.
    """

    gates: dict[str, np.ndarray]
    decided: dict[str, int]
    picks: Picks | None


class Controller:
    """The policy, trained by REINFORCE: one categorical distribution per decision.

    A slot's choice is split into decisions on skip, kernel, expansion, ...
    (``factorise``); a width is a single decision.
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
        # lr is a placeholder: update() sets the rate of every step
        self.optimizer = torch.optim.Adam(
            list(self.logits.values()), lr=1.0, betas=(0.0, 0.999), eps=1e-8
        )
        # the baseline is reward_sum / reward_weight, see update()
        self.reward_sum = 0.0
        self.reward_weight = 0.0

    def probabilities(self) -> dict[str, np.ndarray]:
        """The policy pi: decision name -> probabilities [options]."""
        probabilities = {}
        for name, logits in self.logits.items():
            probabilities[name] = torch.softmax(logits.detach(), 0).numpy()
        return probabilities

    def sample(self, rng: np.random.Generator, warmup_probability: float = 0.0) -> Sample:
        """Draw an architecture from the policy, replacing each decision by its warm-up
        with the given probability.
        """
        probabilities = self.probabilities()
        gates: dict[str, np.ndarray] = {}
        decided: dict[str, int] = {}
        picks: Picks | None = {}
        for choice in self.space.choices:
            factors = self.factors[choice.key]
            weights: dict[str, np.ndarray] = {}
            for name, axis in _decisions(choice.key, factors):
                p = probabilities[name]
                # Drawn even if a warm-up replaces it, so that every decision uses the
                # same random numbers whatever happens to the others.
                option = int(rng.choice(len(p), p=p))
                if rng.random() < warmup_probability:
                    weights[name] = _warmup_weights(axis, len(p))
                else:
                    decided[name] = option
                    weights[name] = np.eye(len(p))[option]
            gate = _joint(choice.key, factors, weights)
            gates[choice.key] = gate

            # Option 1 skips the block. Hierarchical: the other decisions on a skipped
            # block had no effect, so they do not count.
            if decided.get(f"{choice.key}.skip") == 1:
                for axis, _ in factors.axes:
                    decided.pop(f"{choice.key}.{axis}", None)

            # A gate with maximum 1 is one-hot. Any other is a mixture of options, which
            # is not an architecture: from then on, picks stays None.
            if picks is not None and gate.max() == 1.0:
                picks[choice.key] = choice.options[int(gate.argmax())]
            else:
                picks = None
        return Sample(gates, decided, picks)

    def update(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[float],
        lr: float,
        baseline_momentum: float = 0.95,
        entropy_weight: float = 0.0,
    ) -> list[float]:
        """One REINFORCE step, averaged over ``samples``. Returns the advantages R - b.

        The baseline b already includes the current rewards, so the advantages of the
        first update average to 0.
        """
        # Zero-debiased: both sums start at 0, and their quotient is a weighted average.
        m = baseline_momentum
        self.reward_sum = m * self.reward_sum + (1 - m) * float(np.mean(rewards))
        self.reward_weight = m * self.reward_weight + (1 - m)
        baseline = self.reward_sum / self.reward_weight
        advantages = [reward - baseline for reward in rewards]

        # -(R - b) * log pi(a), averaged over the samples, minus the entropy bonus
        loss = torch.zeros((), dtype=torch.float64)
        if entropy_weight:
            loss = -entropy_weight * self.entropy()
        for sample, advantage in zip(samples, advantages, strict=True):
            log_pi: list[Tensor] = []
            for name, option in sample.decided.items():
                log_pi.append(torch.log_softmax(self.logits[name], 0)[option])
            if log_pi:
                loss = loss - advantage / len(samples) * torch.stack(log_pi).sum()

        self.optimizer.param_groups[0]["lr"] = lr
        # Adam ignores parameters whose gradient is None. Zero gradients make it update
        # the state of every logit in every step, whether or not its decision was made.
        for logits in self.logits.values():
            logits.grad = torch.zeros_like(logits)
        # if warm-ups replaced all decisions, the loss is a constant
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return advantages

    def entropy(self) -> Tensor:
        """Hierarchical entropy of the policy in nats: the decisions below a skip are
        weighted by the probability of not skipping.
        """
        total = torch.zeros((), dtype=torch.float64)
        for key, factors in self.factors.items():
            p_keep: Tensor | float = 1.0
            for name, axis in _decisions(key, factors):
                log_p = torch.log_softmax(self.logits[name], 0)
                entropy_d = -(log_p.exp() * log_p).sum()
                if axis == "skip":
                    total = total + entropy_d
                    p_keep = log_p.exp()[0]  # option 0 keeps the block
                else:
                    total = total + p_keep * entropy_d
        return total

    def best(self) -> Picks:
        """The architecture with the most likely option of every decision."""
        one_hot = {}
        for name, p in self.probabilities().items():
            one_hot[name] = np.eye(len(p))[int(p.argmax())]
        picks: Picks = {}
        for choice in self.space.choices:
            gate = _joint(choice.key, self.factors[choice.key], one_hot)
            picks[choice.key] = choice.options[int(gate.argmax())]
        return picks

    def option_probabilities(self) -> dict[str, np.ndarray]:
        """The policy by choice instead of by decision: choice key -> probabilities
        [options]. These are the gates for the expected cost.
        """
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
        """Restore the state from ``state_dict``."""
        with torch.no_grad():
            for name, tensor in self.logits.items():
                tensor.copy_(state["logits"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.reward_sum, self.reward_weight = map(float, state["baseline"])


def _factors(choice: Choice) -> Factors:
    """The decisions that a choice is split into. A width, depth or resolution is a
    single decision, on the axis "width".
    """
    if choice.kind == "op":
        return factorise(tuple(map(str, choice.options)))

    # ascending, whatever the order in the space: filter warm-up takes the last
    values = sorted(map(float, choice.options))
    grid = tuple((values.index(float(option)),) for option in choice.options)
    return Factors(axes=(("width", tuple(values)),), grid=grid)


def _decisions(key: str, factors: Factors) -> list[tuple[str, str]]:
    """The (name, axis) of every decision of a choice, skip first. The skip decision has
    two options: 0 keeps the block, 1 skips it.
    """
    decisions = []
    if factors.skippable:
        decisions.append((f"{key}.skip", "skip"))
    for axis, _ in factors.axes:
        decisions.append((f"{key}.{axis}", axis))
    return decisions


def _warmup_weights(axis: str, count: int) -> np.ndarray:
    """Weights [options] of a decision that a warm-up replaces: filter or op warm-up."""
    if axis in FILTER_AXES:
        largest: np.ndarray = np.eye(count)[-1]
        return largest
    return np.full(count, 1 / count)


def _joint(key: str, factors: Factors, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Weights [options] of a choice: the product of the weights of its decisions."""
    # Option 0 of a skip decision keeps the block, option 1 skips it. Without such a
    # decision, the block is always kept.
    keep, skip = weights.get(f"{key}.skip", np.array([1.0, 0.0]))
    gate = np.empty(len(factors.grid))
    for i, positions in enumerate(factors.grid):
        if positions is None:
            gate[i] = skip
            continue
        gate[i] = keep
        for (axis, _), position in zip(factors.axes, positions, strict=True):
            gate[i] *= weights[f"{key}.{axis}"][position]
    return gate


class TuNAS(Strategy):
    """The TuNAS strategy: trains the shared weights and a ``Controller`` in turn."""

    Config: ClassVar[type[BaseModel]] = TuNASConfig
    sharing = "collapsed"
    rate_option = "rl_lr"

    def __init__(self, config: TuNASConfig) -> None:
        self.config = config
        self.controller: Controller  # created by setup()

    def setup(self, ctx: SearchContext) -> None:
        """Create the controller. Its policy starts uniform over the decisions."""
        self.controller = Controller(ctx.space)

    def microbatches(self) -> tuple[int, int]:
        """Each architecture gets its own part of the training and held-out batches."""
        return self.config.architectures, self.config.architectures

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The steps at which the warm-up and the RL delay end."""
        warmup_end = math.ceil(self.config.warmup * ctx.steps)
        delay_end = math.ceil(self.config.rl_delay * ctx.steps)
        return warmup_end, delay_end

    def policy_lr(self, ctx: SearchContext) -> float:
        """The policy's learning rate at this step; 0 during the RL delay."""
        config = self.config
        progress = ctx.step / ctx.steps
        if progress < config.rl_delay:
            return 0.0
        start = config.rl_lr if config.rl_lr is not None else 3e-4 * ctx.batch_size / 256
        ramp_fraction = (progress - config.rl_delay) / (1 - config.rl_delay)
        return float(start * config.rl_lr_ramp**ramp_fraction)

    def warmup_probability(self, ctx: SearchContext) -> float:
        """The probability p(n) that a warm-up replaces a decision at this step."""
        warmup_steps = self.config.warmup * ctx.steps
        if not warmup_steps:
            return 0.0
        return max(0.0, 1 - ctx.step / warmup_steps)

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the shared weights and, after the RL delay, one update of the
        policy by the rewards of the same architectures.
        """
        config = self.config
        cost_name = ctx.cost_model.unit.quantity

        # 1. shared weights: train the sampled architectures
        probability = self.warmup_probability(ctx)
        samples = []
        for _ in range(config.architectures):
            samples.append(self.controller.sample(ctx.rng, probability))
        gates = [sample.gates for sample in samples]
        metrics = ctx.train(*gates, split=True)

        policy_lr = self.policy_lr(ctx)
        if policy_lr > 0.0:
            # 2. held-out quality, with the weights just updated
            qualities = ctx.qualities(*gates, multiple=config.held_out_multiple)
            # 3. reward; warm-up is over once the RL delay ends, so every gate is one-hot
            costs = [float(ctx.cost_model.expected(gate)) for gate in gates]
            rewards = [ctx.reward(q, t) for q, t in zip(qualities, costs, strict=True)]
            # 4., 5. REINFORCE with a baseline, by Adam
            self.controller.update(
                samples, rewards, policy_lr, config.baseline_momentum, config.entropy
            )
            metrics |= {
                "quality": float(np.mean(qualities)),
                cost_name: float(np.mean(costs)),
                "reward": float(np.mean(rewards)),
            }

        expected = float(ctx.cost_model.expected(self.controller.option_probabilities()))
        return {
            **metrics,
            "entropy": float(self.controller.entropy().detach()),
            ctx.cost_model.unit.expected: expected,
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax of the policy first if it is within the tolerance, then likely
        samples of the policy within it.
        """
        policy = self.controller.option_probabilities()
        return propose_feasible(ctx, policy, count, self.controller.best())

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the controller's state."""
        self.controller.load_state_dict(state)
