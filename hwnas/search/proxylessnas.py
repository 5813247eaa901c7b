"""ProxylessNAS: architecture parameters learnt through binary gates, with the memory of
one or two paths.

Cai, Zhu, Han: "ProxylessNAS: Direct Neural Architecture Search on Target Task and
Hardware" (ICLR 2019, arXiv 1812.00332); released code mit-han-lab/proxylessnas, which
the constants are from. Every choice has architecture parameters alpha, initially drawn
from N(0, 1e-3), and the policy p = softmax(alpha).

1. Weight step: draw one path from p. Its binary gates are 1 and all others exactly 0,
   so candidates off the path are not executed and get no gradient, momentum or decay.
2. Architecture step, every 5th step, on a held-out batch under binary gates g, with the
   gradient (equation 4)

       dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)

   - ``two``: i and j are a pair drawn from p without replacement, and p is the softmax
     over *their* alphas, from which the active one is drawn; the other runs as well, at
     weight 0. After the Adam step both alphas move by -log(sum exp alpha_new / sum exp
     alpha_old), summed over the pair, which leaves the probabilities of all other
     options unchanged.
   - ``full``: i and j are all options, one of which, drawn from p, is active.
3. The loss combines CE (no label smoothing) with E[latency] = sum over choices of
   <p, latencies>, which is differentiable in alpha:

       ``mul_log``     alpha CE (log E[lat] / log T0)^beta   default of the code
       ``add_linear``  CE + lambda (E[lat] / T0 - 1)         lambda = 0.1
       ``absolute``    CE + lambda |E[lat] / T0 - 1|         ours

   The constants of ``mul_log`` are alpha = 0.2 and beta = 0.3.
4. Adam with learning rate 1e-3, beta1 = 0, beta2 = 0.999, no weight decay.
5. REINFORCE instead of 2 and 3 (``gradient = "reinforce"``): 10 paths ~ p per update;
   first the baseline b <- b + 0.99 (mean R - b), then loss = -mean (R - b) log p(path).
   So the baseline is nearly the mean of the present samples, although the code calls
   0.99 a decay.

Schedule: the code first warms up the weights for 40 epochs, on paths drawn from the
initial p, which is uniform up to 1e-3. Then it trains weights and alpha for 120 epochs,
but leaves alpha unchanged in the first of these. Here both are fractions of the search:
1/4, and 1/120 of the rest.

As in the code: in ``two``, E[latency] is under the pair's softmax (0 for all other
options), so latency also moves only the sampled alphas; and a choice whose active
option is ``skip`` (Zero) gets no update in that step, not even from latency.

*Differences from the paper*:

- ``latency_loss = "absolute"`` is the default. Neither of the paper's losses has its
  optimum at the target: their constants are tuned by hand until the searched network
  happens to be fast enough. ``latency_weight`` must exceed what the cross-entropy gains
  per unit of relative latency, or the policy drifts away from the target. A much larger
  weight drowns the cross-entropy in the latency noise of the drawn pairs.
- The reward of REINFORCE is the objective of the experiment; ``reward =
  "proxylessnas"`` is the paper's acc (T0 / lat)^0.1. Every path is evaluated on its own
  part of the held-out batch, as large as a training batch; the paths do not share
  images. The code makes 300 updates per epoch of ImageNet, one in 16 steps:
  ``arch_every = 16``.
- The gradient of step 2 is that of autograd through g = onehot + p - p.detach(), which
  is the same.
- The code's ``two`` and ``full`` add the inactive outputs at weight 0, and its
  ``full_v2`` recomputes them in the backward pass. Here the super-net decides this.
- The paper keeps the argmax of every choice. Here the argmax is the first proposal if
  it meets the budget; the others are drawn from p.
- ``alpha_lr``: the code makes 114,000 architecture steps (119 epochs of 4,809 steps,
  one in 5); short searches need a larger rate (ours).
- Widths and depths are searched as well; resolutions cannot be (see ``check``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.core.objective import add_linear, mul_log, penalised, proxylessnas_reward
from hwnas.core.option import SKIP
from hwnas.core.space import SearchSpace
from hwnas.lazy import torch
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

JOINT_EPOCHS = 120
"""The paper's epochs of joint training; alpha is not updated in the first of them."""


class ProxylessNASConfig(Section):
    """ProxylessNAS's constants; the defaults are the code's unless marked as ours."""

    gradient: Literal["gates", "reinforce"] = Field(
        "gates", description="how alpha is trained: through binary gates or by REINFORCE"
    )
    mode: Literal["two", "full"] = Field(
        "two", description="options per choice that an architecture step runs: a pair or all"
    )
    alpha_lr: float = Field(
        1e-3, gt=0, le=1e6, description="learning rate of the architecture parameters"
    )
    arch_every: int = Field(5, ge=1, le=1_000_000, description="weight steps per architecture step")
    warmup: float = Field(
        0.25, ge=0, lt=1, description="fraction of the steps that train only the weights"
    )
    latency_loss: Literal["absolute", "mul_log", "add_linear"] = Field(
        "absolute", description="the paper has mul_log and add_linear"
    )
    latency_weight: float = Field(
        0.3, ge=0, le=1e6, description="weight of |E[lat] / target - 1| in the absolute loss (ours)"
    )
    add_linear_lambda: float = Field(0.1, ge=0, le=1e6, description="lambda of the add_linear loss")
    mul_log_alpha: float = Field(0.2, gt=0, le=1e6, description="factor of the mul_log loss")
    mul_log_beta: float = Field(0.3, ge=0, le=1e6, description="exponent in the mul_log loss")
    unit_ms: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description=(
            "unit of the latencies in mul_log's logarithms, in ms (for counts: in millions);"
            " must be below every latency of the space"
        ),
    )
    rl_samples: int = Field(10, ge=1, le=1_000_000, description="paths per REINFORCE update")
    rl_baseline_rate: float = Field(
        0.99,
        gt=0,
        le=1,
        description="how far each update moves the baseline to the mean reward; 1 is all the way",
    )
    reward: Literal["objective", "proxylessnas"] = Field(
        "objective", description="reward of REINFORCE: search.objective, or the paper's"
    )


def draw_running(
    alpha: np.ndarray, mode: Literal["two", "full"], rng: np.random.Generator
) -> list[int]:
    """Positions of the options that an architecture step runs, the active one first.

    Sorting alpha plus Gumbel noise draws from softmax(alpha) without replacement.
    ``full`` runs all options, and the first drawn is active. ``two`` runs the first two
    drawn; a second draw, from the softmax over their alphas, decides which is active.
    """
    drawn: list[int] = np.argsort(-(alpha + rng.gumbel(size=len(alpha)))).tolist()
    if mode == "full":
        return drawn
    first, second = drawn[:2]
    p_first = 1 / (1 + np.exp(alpha[second] - alpha[first]))
    if rng.random() < p_first:
        return [first, second]
    return [second, first]


def softmax_over(alpha: Tensor, running: Sequence[int]) -> Tensor:
    """Differentiable softmax(alpha) over the ``running`` options; 0 for the others."""
    not_running = torch.ones(len(alpha), dtype=torch.bool)
    not_running[list(running)] = False
    return torch.softmax(alpha.masked_fill(not_running, -torch.inf), 0)


def keep_mass(alpha: Tensor, before: Tensor, running: Sequence[int]) -> None:
    """Shift the alphas of ``running`` in place so that their total probability is the
    same as under ``before``; then the probabilities of all other options are as well.

    alpha_i <- alpha_i - log(sum exp alpha / sum exp alpha_before), summed over
    ``running``. No other alpha may have changed since ``before``.
    """
    index = list(running)
    with torch.no_grad():
        alpha[index] -= torch.logsumexp(alpha[index], 0) - torch.logsumexp(before[index], 0)


class ProxylessNAS(Strategy):
    """The ProxylessNAS strategy: trains the weights and ``Alphas`` in turn, the latter
    through binary gates or by REINFORCE.
    """

    Config: ClassVar[type[BaseModel]] = ProxylessNASConfig
    rate_option = "alpha_lr"

    def __init__(self, config: ProxylessNASConfig) -> None:
        self.config = config
        self.alphas: Alphas
        self.baseline: float | None = None

    def check(self, space: SearchSpace) -> None:
        """Raises SpaceError if the resolution is open, except for REINFORCE: images of
        two sizes cannot run at once.
        """
        if self.config.gradient == "gates":
            refuse_resolutions(space, "proxylessnas")

    def microbatches(self) -> tuple[int, int]:
        """REINFORCE gives every path its own part of the held-out batch."""
        if self.config.gradient == "reinforce":
            return 1, self.config.rl_samples
        return 1, 1

    def setup(self, ctx: SearchContext) -> None:
        """Draw the initial alphas.

        Raises TargetError if the loss cannot use the logarithm of some latency of the
        space (see ``unit_ms``).
        """
        self.alphas = Alphas(
            ctx.space,
            ctx.rng,
            init_std=1e-3,
            lr=self.config.alpha_lr,
            betas=(0.0, 0.999),
            weight_decay=0.0,
        )
        self.baseline = None
        # only for its TargetError at the lowest latency: fail before the search starts
        scale = ctx.cost_model.unit.scale
        lowest = ctx.cost_model.range()[0]
        self.with_latency(1.0, lowest / scale, ctx.target / scale)

    def with_latency(self, loss: Any, expected_ms: Any, target_ms: float) -> Any:
        """The loss of an architecture step: the cross-entropy ``loss`` combined with
        the expected latency. Takes floats or tensors.
        """
        config = self.config
        if config.latency_loss == "mul_log":
            return mul_log(
                loss,
                expected_ms,
                target_ms,
                config.mul_log_alpha,
                config.mul_log_beta,
                config.unit_ms,
            )
        if config.latency_loss == "add_linear":
            return add_linear(loss, expected_ms, target_ms, config.add_linear_lambda)
        return penalised(loss, expected_ms, target_ms, "absolute", "add", config.latency_weight)

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The first step that may update alpha."""
        return (math.ceil(self._alpha_start() * ctx.steps),)

    def _alpha_start(self) -> float:
        """The fraction of the steps before alpha starts to learn: the warm-up and the
        first joint epoch.
        """
        return self.config.warmup + (1 - self.config.warmup) / JOINT_EPOCHS

    def learns(self, ctx: SearchContext) -> bool:
        """Whether this step updates the alphas: every ``arch_every``-th step after the
        warm-up and the first joint epoch.
        """
        return ctx.fraction >= self._alpha_start() and (ctx.step + 1) % self.config.arch_every == 0

    def step(self, ctx: SearchContext) -> Metrics:
        """One weight update of a sampled path and, if this step ``learns``, one update
        of the alphas.
        """
        metrics = ctx.train(self._path(ctx.rng))
        if self.learns(ctx):
            if self.config.gradient == "gates":
                metrics |= self._gate_step(ctx)
            else:
                metrics |= self._reinforce_step(ctx)
        return {
            **metrics,
            "entropy": self.alphas.entropy(),
            ctx.cost_model.unit.expected: float(ctx.cost_model.expected(self.alphas.policy())),
        }

    def _path(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Binary gates of one path drawn from the policy."""
        gates = {}
        for key, p in self.alphas.policy().items():
            option = rng.choice(len(p), p=p / p.sum())
            gates[key] = np.eye(len(p))[option]
        return gates

    def _gate_step(self, ctx: SearchContext) -> Metrics:
        """An Adam step down the gradient of the loss through binary gates."""
        before: dict[str, Tensor] = {}
        running: dict[str, list[int]] = {}
        probabilities: dict[str, Tensor] = {}
        gates: dict[str, Tensor] = {}
        probes: dict[str, list[int]] = {}
        for key, alpha in self.alphas.values.items():
            before[key] = alpha.detach().clone()
            running[key] = draw_running(before[key].numpy(), self.config.mode, ctx.rng)
            p = softmax_over(alpha, running[key])
            probabilities[key] = p
            one_hot = torch.eye(len(p), dtype=p.dtype)[running[key][0]]
            # straight-through: the value is the binary gate, the gradient is that of p
            gates[key] = one_hot + (p - p.detach())
            # the inactive options run at weight 0, which gives their dL/dg
            probes[key] = running[key][1:]

        loss = ctx.loss(gates, probes=probes)
        scale = ctx.cost_model.unit.scale
        latency = ctx.cost_model.expected(probabilities, torch) / scale
        gradients = self.alphas.gradients(self.with_latency(loss, latency, ctx.target / scale))

        # as in the code: no update if the active option is Zero
        for choice in ctx.space.choices:
            active = running[choice.key][0]
            if choice.options[active] == SKIP:
                gradients[choice.key] = None
        self.alphas.apply(gradients)

        if self.config.mode == "two":
            for key, pair in running.items():
                keep_mass(self.alphas.values[key], before[key], pair)
        return {"held_out_loss": float(loss.detach())}

    def _reinforce_step(self, ctx: SearchContext) -> Metrics:
        """An Adam step on REINFORCE's loss over several paths."""
        paths = [self._path(ctx.rng) for _ in range(self.config.rl_samples)]
        qualities = ctx.qualities(*paths, multiple=len(paths))
        latencies = [float(ctx.cost_model.expected(path)) for path in paths]
        rewards = [self._reward(ctx, q, t) for q, t in zip(qualities, latencies, strict=True)]
        mean = float(np.mean(rewards))

        # as in the code, the baseline moves before it is subtracted
        if self.baseline is None:
            self.baseline = mean
        else:
            self.baseline += self.config.rl_baseline_rate * (mean - self.baseline)

        loss = torch.zeros((), dtype=torch.float64)
        for path, reward in zip(paths, rewards, strict=True):
            log_p: list[Tensor] = []
            for key, alpha in self.alphas.values.items():
                option = int(path[key].argmax())
                log_p.append(torch.log_softmax(alpha, 0)[option])
            loss = loss - (reward - self.baseline) / len(paths) * torch.stack(log_p).sum()
        self.alphas.update(loss)
        return {
            "quality": float(np.mean(qualities)),
            ctx.cost_model.unit.quantity: float(np.mean(latencies)),
            "reward": mean,
        }

    def _reward(self, ctx: SearchContext, quality: float, cost: float) -> float:
        """The reward of a path for REINFORCE."""
        if self.config.reward == "proxylessnas":
            return proxylessnas_reward(quality, cost, ctx.target)
        return ctx.reward(quality, cost)

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax of the policy first if it is within the tolerance, then likely
        samples of the policy within it.
        """
        return propose_feasible(ctx, self.alphas.policy(), count)

    def state_dict(self) -> dict[str, Any]:
        """Alphas, the state of their optimiser, and the baseline of REINFORCE."""
        return {"alphas": self.alphas.state_dict(), "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.alphas.load_state_dict(state["alphas"])
        baseline = state["baseline"]
        self.baseline = None if baseline is None else float(baseline)
