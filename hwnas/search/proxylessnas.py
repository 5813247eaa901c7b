"""ProxylessNAS: architecture parameters learnt through binary gates, at the memory of
one or two paths.

Cai, Zhu, Han: "ProxylessNAS: Direct Neural Architecture Search on Target Task and
Hardware" (ICLR 2019, arXiv 1812.00332); released code mit-han-lab/proxylessnas, whose
constants these are. Every choice has p = softmax(alpha), alpha ~ N(0, 1e-3) at first.

1. Weight step: one path ~ p; its gates are 1, all others exactly 0, so that candidates
   off the path are not executed and get neither gradient nor momentum nor decay.
2. Architecture step, every 5th step, on a held-out batch under binary gates g, with the
   gradient (equation 4)

       dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)

   - ``two``: i, j are a pair drawn from p without replacement, p the softmax over
     *their* alphas, from which the active one is drawn; the other one runs too, at
     weight 0. After the Adam step both alphas move by -log(sum exp alpha_new / sum exp
     alpha_old), sums over the pair, which leaves the probabilities of all other options
     as they were.
   - ``full``: i, j are all options, of which one, drawn from p, is active.
3. The loss combines CE (no label smoothing) with E[latency] = sum over choices of <p, latencies>, which is differentiable in alpha:
   ``mul_log``     alpha CE (log E[lat] / log T0)^beta     the code's default, alpha = 0.2, beta = 0.3
   ``add_linear``  CE + lambda (E[lat] / T0 - 1)           lambda = 0.1
   ``absolute``    CE + lambda |E[lat] / T0 - 1|           ours
4. Adam with rate 1e-3, beta1 = 0, beta2 = 0.999, no decay.
5. REINFORCE instead of 2 and 3 (``gradient = "reinforce"``): 10 paths ~ p per update,
   loss = -mean (R - b) log p(path), after b <- b + 0.99 (mean R - b). The baseline thus
   is nearly the mean of the present samples, for all that the code calls 0.99 a decay.

Schedule: the code warms the weights up for 40 epochs of paths drawn from the initial p,
which is uniform but for 1e-3, then trains both for 120, in the first of which alpha
stays. Here these are parts of the search: 1/4, and 1/120 of the rest.

As in the code: in ``two``, E[latency] is under the pair's softmax (0 for all others),
so that latency, too, moves the sampled alphas only; and a choice whose active option is
``skip`` (Zero) gets no update in that step, latency's part included.

*Differences from the paper*:

- ``latency_loss = "absolute"`` is the default. Neither of the paper's has its optimum
  at the target: their constants are tuned by hand until the searched network happens to
  be fast enough. ``latency_weight`` must exceed what the cross-entropy gains per part
  of latency, or the policy leaves the target; much more drowns the cross-entropy in the
  latency noise of the drawn pairs.
- REINFORCE's reward is the experiment's objective; ``reward = "proxylessnas"`` is the
  paper's acc (T0 / lat)^0.1. Every path is evaluated on a part of the held-out batch as
  large as a training batch, not all on the same images. The code makes 300 updates per
  epoch of ImageNet, one in 16 steps: ``arch_every = 16``.
- The gradient of step 2 is autograd's through g = onehot + p - p.detach(), which is the same.
- The code's ``two`` and ``full`` add the inactive outputs at weight 0, and its
  ``full_v2`` recomputes them in the backward pass. Here that is the super-net's
  business.
- The paper keeps the argmax of every choice. It leads the proposals where it meets the
  budget; the others are drawn from p.
- ``alpha_lr``: the code makes 114,000 architecture steps (119 epochs of 4,809 steps,
  one in 5); short searches need a larger one (ours).
- Widths and depths are searched, too, but not resolutions: see ``check``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hwnas.core.arch import Picks
from hwnas.core.objective import add_linear, mul_log, penalised, proxylessnas_reward
from hwnas.core.option import SKIP
from hwnas.core.space import SearchSpace
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

JOINT_EPOCHS = 120
"""The paper's epochs of joint training, in the first of which alpha stays."""


class ProxylessNASConfig(BaseModel):
    """ProxylessNAS's constants; the defaults are the released code's unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gradient: Literal["gates", "reinforce"] = "gates"
    mode: Literal["two", "full"] = Field(
        "two", description="options per choice that an architecture step runs: a pair, or all"
    )
    alpha_lr: float = Field(1e-3, gt=0, description="rate of the architecture parameters")
    arch_every: int = Field(5, ge=1, description="weight steps per architecture step")
    warmup: float = Field(0.25, ge=0, lt=1, description="part of the steps that train weights only")
    latency_loss: Literal["absolute", "mul_log", "add_linear"] = Field(
        "absolute", description="the paper's are mul_log and add_linear"
    )
    latency_weight: float = Field(
        0.3, ge=0, description="of |E[lat] / target - 1| in the absolute loss (ours)"
    )
    add_linear_lambda: float = Field(0.1, ge=0)
    mul_log_alpha: float = Field(0.2, gt=0)
    mul_log_beta: float = Field(0.3, ge=0)
    unit_ms: float = Field(
        1.0,
        gt=0,
        description=(
            "unit of latencies in mul_log's logarithms, below all of the space; of counts, in"
            " millions"
        ),
    )
    rl_samples: int = Field(10, ge=1, description="paths per REINFORCE update")
    rl_baseline_rate: float = Field(
        0.99,
        gt=0,
        le=1,
        description="part of the way to the mean reward that the baseline moves per update",
    )
    reward: Literal["objective", "proxylessnas"] = Field(
        "objective", description="REINFORCE's: search.objective, or the paper's"
    )


def draw_running(
    alpha: np.ndarray, mode: Literal["two", "full"], rng: np.random.Generator
) -> list[int]:
    """Positions of the options that an architecture step runs, the active one first.

    Sorting alpha plus Gumbel noise draws from softmax(alpha) without replacement: the
    first of all for ``full``, the first two for ``two``. Which of the two is active is
    drawn anew, from the softmax over their alphas.
    """
    drawn: list[int] = np.argsort(-(alpha + rng.gumbel(size=len(alpha)))).tolist()
    if mode == "full":
        return drawn
    first, second = drawn[:2]
    p_first = 1 / (1 + np.exp(alpha[second] - alpha[first]))
    return [first, second] if rng.random() < p_first else [second, first]


def softmax_over(alpha: Tensor, running: Sequence[int]) -> Tensor:
    """softmax(alpha) over the ``running`` options, 0 for the others: [options], differentiable."""
    left_out = torch.ones(len(alpha), dtype=torch.bool)
    left_out[list(running)] = False
    return torch.softmax(alpha.masked_fill(left_out, -torch.inf), 0)


@torch.no_grad()
def keep_mass(alpha: Tensor, before: Tensor, running: Sequence[int]) -> None:
    """Shift the alphas of ``running`` so that together they are as likely as under
    ``before``; all other probabilities then are, too.

    alpha_i <- alpha_i - log(sum exp alpha / sum exp alpha_before), sums over
    ``running``. No other alpha may have moved.
    """
    index = list(running)
    alpha[index] -= torch.logsumexp(alpha[index], 0) - torch.logsumexp(before[index], 0)


class ProxylessNAS(Strategy):
    """The ProxylessNAS strategy: ``Alphas`` trained beside the weights, through binary
    gates or by REINFORCE.
    """

    Config: ClassVar[type[BaseModel]] = ProxylessNASConfig
    rate = "alpha_lr"

    def __init__(self, config: ProxylessNASConfig) -> None:
        self.config = config
        self.alphas: Alphas
        self.baseline: float | None = None

    def check(self, space: SearchSpace) -> None:
        """Raise SpaceError where the resolution is open: images of two sizes cannot run at once."""
        if self.config.gradient == "gates":
            refuse_resolutions(space, "proxylessnas")

    def parts(self) -> tuple[int, int]:
        """REINFORCE gives every path its part of the held-out batch."""
        return 1, self.config.rl_samples if self.config.gradient == "reinforce" else 1

    def setup(self, ctx: SearchContext) -> None:
        """Draw the initial alphas. Raises TargetError where a latency of the space has
        no logarithm that the loss could use.
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
        self.with_latency(
            1.0,
            ctx.cost_model.range()[0] / ctx.cost_model.unit.scale,
            ctx.target / ctx.cost_model.unit.scale,
        )

    def with_latency(self, loss: Any, expected_ms: Any, target_ms: float) -> Any:
        """The loss of an architecture step: cross-entropy combined with the expected
        latency, on floats or tensors.
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
        return (math.ceil(self._first() * ctx.steps),)

    def _first(self) -> float:
        """Which part of the steps is over when alpha begins to learn: the warm-up and
        the first joint epoch.
        """
        return self.config.warmup + (1 - self.config.warmup) / JOINT_EPOCHS

    def learns(self, ctx: SearchContext) -> bool:
        """Whether this step updates the alphas: every ``arch_every``-th, after the
        warm-up and the first joint epoch.
        """
        return ctx.fraction >= self._first() and (ctx.step + 1) % self.config.arch_every == 0

    def step(self, ctx: SearchContext) -> Metrics:
        """One weight update of a sampled path and, when it is time, one update of the alphas."""
        metrics = ctx.train(self._path(ctx.rng))
        if self.learns(ctx):
            metrics |= (
                self._gate_step(ctx)
                if self.config.gradient == "gates"
                else self._reinforce_step(ctx)
            )
        return {
            **metrics,
            "entropy": self.alphas.entropy(),
            ctx.cost_model.unit.expected: float(ctx.cost_model.expected(self.alphas.policy())),
        }

    def _path(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Gates of one path drawn from the policy."""
        return {
            key: np.eye(len(p))[rng.choice(len(p), p=p / p.sum())]
            for key, p in self.alphas.policy().items()
        }

    def _gate_step(self, ctx: SearchContext) -> Metrics:
        """An Adam step down the gradient of the loss through binary gates."""
        before = {key: alpha.detach().clone() for key, alpha in self.alphas.values.items()}
        running = {
            key: draw_running(alpha.numpy(), self.config.mode, ctx.rng)
            for key, alpha in before.items()
        }
        probabilities = {
            key: softmax_over(alpha, running[key]) for key, alpha in self.alphas.values.items()
        }
        one_hot = {
            key: torch.eye(len(p), dtype=p.dtype)[running[key][0]]
            for key, p in probabilities.items()
        }
        gates = {key: one_hot[key] + (p - p.detach()) for key, p in probabilities.items()}
        loss = ctx.loss(gates, probes={key: others for key, (_, *others) in running.items()})
        scale = ctx.cost_model.unit.scale
        latency = ctx.cost_model.expected(probabilities, torch) / scale
        gradients = self.alphas.gradients(self.with_latency(loss, latency, ctx.target / scale))
        for choice in ctx.space.choices:
            if choice.options[running[choice.key][0]] == SKIP:
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
        rewards = [
            self._reward(ctx, quality, latency)
            for quality, latency in zip(qualities, latencies, strict=True)
        ]
        mean = float(np.mean(rewards))
        self.baseline = (
            mean
            if self.baseline is None
            else self.baseline + self.config.rl_baseline_rate * (mean - self.baseline)
        )
        loss = torch.zeros((), dtype=torch.float64)
        for path, reward in zip(paths, rewards, strict=True):
            log_p = [
                torch.log_softmax(alpha, 0)[int(path[key].argmax())]
                for key, alpha in self.alphas.values.items()
            ]
            loss = loss - (reward - self.baseline) / len(paths) * torch.stack(log_p).sum()
        self.alphas.update(loss)
        return {
            "quality": float(np.mean(qualities)),
            ctx.cost_model.unit.quantity: float(np.mean(latencies)),
            "reward": mean,
        }

    def _reward(self, ctx: SearchContext, quality: float, cost: float) -> float:
        if self.config.reward == "proxylessnas":
            return proxylessnas_reward(quality, cost, ctx.target)
        return ctx.reward(quality, cost)

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax first, where it is within the tolerance, then likely samples of
        the policy that are.
        """
        return propose_feasible(ctx, self.alphas.policy(), count)

    def state_dict(self) -> dict[str, Any]:
        """Alphas, their Adam, and REINFORCE's baseline."""
        return {"alphas": self.alphas.state_dict(), "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.alphas.load_state_dict(state["alphas"])
        self.baseline = state["baseline"]
