"""FBNet: all options run at once, mixed by Gumbel-softmax masks that slowly sharpen.

Wu, Dai, Zhang, Wang, Sun, Wu, Tian, Vajda, Jia, Keutzer: "FBNet: Hardware-Aware
Efficient ConvNet Design via Differentiable Neural Architecture Search" (CVPR 2019,
arXiv 1812.03443). The architecture parameters theta define the policy: choice l takes
option i with probability P(l, i) = softmax(theta_l)_i.

1. Mask: m_li = softmax_i((theta_li + G_li) / tau), with fresh noise G ~ Gumbel(0, 1)
   for every batch.
2. Temperature: tau = 5.0 exp(-0.045 epoch), over 90 epochs.
3. Latency: LAT = sum_l sum_i m_li LUT(l, i), of the sampled mask rather than of the
   expectation. LUT is the latency table.
4. Loss: L = CE * alpha * (log LAT)^beta, with alpha = 0.2 and beta = 0.6 (equation 2).
5. The shared weights are trained on 80 % of the training images, theta on the held-out
   20 % by Adam (learning rate 0.01, weight decay 5e-4). The first 10 epochs train only
   the weights (warm-up).
6. Finally, several architectures are *sampled* from P, trained, and compared.

*Differences from the paper*:

- The paper's loss has no target: alpha and beta are tuned by hand until the result
  happens to be fast enough. Here only proposals within the budget count. ``latency_loss
  = "absolute"``, CE + lambda |LAT / T0 - 1|, is ours: it pulls the policy itself to the
  target T0. Its weight lambda (``latency_weight``) must exceed what the cross-entropy
  gains per unit of relative latency, or the policy drifts away from the target.
- LAT is in microseconds (``unit_ms``): the logarithm of a latency below one unit is
  negative and would reverse the sign of the loss.
- The paper alternates a pass over the 80 % with one over the 20 %. Here one theta step
  follows every 4 weight steps (``theta_every``), which is the same ratio. The split is
  an option of the data: ``data.held_out = 0.2``.
- tau and the warm-up follow the completed fraction of the search continuously: epoch =
  90 * fraction.
- theta starts at 0.
- Samples outside the budget are dropped. If P yields too few inside, likely
  architectures near the budget take their place. ``derive = "likely"`` instead proposes
  the most likely architectures within the budget, the argmax first.
- Widths and depths are mixed as well; resolutions cannot be (see ``check``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.core.objective import MICROSECOND_MS, fbnet, penalised
from hwnas.core.space import SearchSpace
from hwnas.lazy import torch
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.budget import tilt_policy
from hwnas.search.proposal import SAMPLES, Policy, gather_feasible, policy_index, propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

EPOCHS = 90
"""Length of the paper's search in epochs: the unit of its temperature and warm-up."""


class FBNetConfig(Section):
    """FBNet's constants; the defaults are the paper's unless said otherwise."""

    theta_lr: float = Field(
        0.01, gt=0, le=1e6, description="learning rate of the architecture parameters"
    )
    theta_weight_decay: float = Field(
        5e-4, ge=0, le=1e6, description="weight decay of theta (Adam)"
    )
    theta_every: int = Field(4, ge=1, le=1_000_000, description="weight steps per theta step")
    warmup: float = Field(
        10 / EPOCHS, ge=0, lt=1, description="fraction of the steps that train only the weights"
    )
    temperature: float = Field(
        5.0, gt=0, le=1e6, description="temperature at the start of the search"
    )
    annealing: float = Field(
        0.045,
        ge=0,
        le=1e6,
        description="every 1/90 of the search multiplies the temperature by exp(-annealing)",
    )
    latency_loss: Literal["fbnet", "absolute"] = Field(
        "fbnet", description="the paper's loss, or one with a target (ours)"
    )
    latency_weight: float = Field(
        0.3, ge=0, le=1e6, description="weight of |LAT / target - 1| in the absolute loss (ours)"
    )
    alpha: float = Field(0.2, gt=0, le=1e6, description="factor of the fbnet loss")
    beta: float = Field(0.6, ge=0, le=1e6, description="exponent of log LAT in the fbnet loss")
    unit_ms: float = Field(
        MICROSECOND_MS,
        gt=0,
        le=1e6,
        description=(
            "unit of the latency in the fbnet loss's logarithm, in ms (for counts: in millions);"
            " must be below every latency of the space"
        ),
    )
    derive: Literal["sampled", "likely"] = Field(
        "sampled", description="architectures to propose: samples of the policy, or the most likely"
    )


def gumbel_softmax(
    theta: Mapping[str, Tensor], temperature: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Masks softmax((theta + G) / temperature), G ~ Gumbel(0, 1): choice key -> weights
    [options], differentiable in theta.
    """
    masks = {}
    for key, logits in theta.items():
        noise = torch.from_numpy(rng.gumbel(size=len(logits)))
        masks[key] = torch.softmax((logits + noise) / temperature, 0)
    return masks


def sample_policy_feasible(ctx: SearchContext, policy: Policy, count: int) -> list[Picks]:
    """Up to ``count`` different architectures within the budget, sampled from a policy,
    in the order drawn.

    If the policy yields too few, samples of the policy tilted towards the budget
    (``tilt_policy``) follow, then the results of ``propose_feasible``.
    """
    candidates: dict[bytes, np.ndarray] = {}
    for sampled_policy in (policy, tilt_policy(ctx, policy)):
        drawn_NC = policy_index(ctx.space, sampled_policy, SAMPLES, ctx.rng)
        gather_feasible(ctx, drawn_NC, candidates)
    if len(candidates) < count:
        proposals = propose_feasible(ctx, policy, count)
        proposals_NC = np.array([ctx.space.index(picks) for picks in proposals])
        gather_feasible(ctx, proposals_NC, candidates)
    return [ctx.space.at(row) for row in list(candidates.values())[:count]]


class FBNet(Strategy):
    """The FBNet strategy: trains the weights and theta in turn, under sampled masks."""

    Config: ClassVar[type[BaseModel]] = FBNetConfig
    rate_option = "theta_lr"
    mixes_options = True

    def __init__(self, config: FBNetConfig) -> None:
        self.config = config
        self.thetas: Alphas

    def check(self, space: SearchSpace) -> None:
        """Raises SpaceError if the resolution is open: image sizes cannot be mixed."""
        refuse_resolutions(space, "fbnet")

    def setup(self, ctx: SearchContext) -> None:
        """Create theta, uniform over the options.

        Raises TargetError if the loss cannot use the logarithm of some latency of the
        space (see ``unit_ms``).
        """
        config = self.config
        self.thetas = Alphas(
            ctx.space,
            ctx.rng,
            init_std=0.0,
            lr=config.theta_lr,
            betas=(0.9, 0.999),
            weight_decay=config.theta_weight_decay,
        )
        # only for its TargetError at the lowest latency: fail before the search starts
        scale = ctx.cost_model.unit.scale
        lowest = ctx.cost_model.range()[0]
        self.with_latency(1.0, lowest / scale, ctx.target / scale)

    def with_latency(self, loss: Any, latency_ms: Any, target_ms: float) -> Any:
        """The loss of a theta step: the cross-entropy ``loss`` combined with the
        latency of the mask. Takes floats or tensors.
        """
        config = self.config
        if config.latency_loss == "fbnet":
            return fbnet(loss, latency_ms, config.alpha, config.beta, config.unit_ms)
        return penalised(loss, latency_ms, target_ms, "absolute", "add", config.latency_weight)

    def temperature(self, ctx: SearchContext) -> float:
        """The temperature tau at this step; by default it falls from 5 to 0.087."""
        return self.config.temperature * math.exp(-self.config.annealing * EPOCHS * ctx.fraction)

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The step at which the warm-up ends."""
        return (math.ceil(self.config.warmup * ctx.steps),)

    def learns(self, ctx: SearchContext) -> bool:
        """Whether this step updates theta: every ``theta_every``-th after warm-up."""
        return ctx.fraction >= self.config.warmup and (ctx.step + 1) % self.config.theta_every == 0

    def step(self, ctx: SearchContext) -> Metrics:
        """One weight update under a sampled mask and, if this step ``learns``, one
        update of theta under another mask.
        """
        temperature = self.temperature(ctx)

        # shared weights, on a training batch; no gradient reaches theta
        masks = gumbel_softmax(self.thetas.values, temperature, ctx.rng)
        metrics = ctx.train({key: mask.detach() for key, mask in masks.items()})

        # architecture parameters, on a held-out batch
        if self.learns(ctx):
            masks = gumbel_softmax(self.thetas.values, temperature, ctx.rng)
            loss = ctx.loss(masks)
            latency = ctx.cost_model.expected(masks, torch)
            # the loss takes milliseconds, or counts in millions
            scale = ctx.cost_model.unit.scale
            self.thetas.update(self.with_latency(loss, latency / scale, ctx.target / scale))
            metrics |= {
                "held_out_loss": float(loss.detach()),
                ctx.cost_model.unit.quantity: float(latency.detach()),
            }

        expected = float(ctx.cost_model.expected(self.thetas.policy()))
        return {
            **metrics,
            "temperature": temperature,
            "entropy": self.thetas.entropy(),
            ctx.cost_model.unit.expected: expected,
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Samples of P within the budget, in the order drawn, or the most likely
        architectures within it (``derive``).
        """
        policy = self.thetas.policy()
        if self.config.derive == "sampled":
            return sample_policy_feasible(ctx, policy, count)
        return propose_feasible(ctx, policy, count)

    def state_dict(self) -> dict[str, Any]:
        """Theta and the state of its optimiser."""
        return self.thetas.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.thetas.load_state_dict(state)
