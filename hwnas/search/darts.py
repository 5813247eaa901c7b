"""DARTS: differentiable architecture search by a continuous relaxation.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055); released code quark0/darts. The constants are those of the code.

The super-net is a mixture: every choice runs all its options at once, weighted by the
softmax of its architecture parameters alpha (equation 2). alpha is drawn from 1e-3 *
N(0, 1). Each step updates

1. alpha, by Adam (learning rate 3e-4, betas 0.5 and 0.999, weight decay 1e-3), down the
   gradient of the held-out loss L_val:

   - ``order = 1``: grad_alpha L_val(w, alpha) at the present weights w (xi = 0);
   - ``order = 2``: grad_alpha L_val(w', alpha) at w' = w - xi * grad_w L_train(w,
     alpha), a virtual training step, including how w' depends on alpha (equations 6 to
     8; ``hwnas.nn.unrolled``). The paper's better results are of this order. It takes
     four forward and backward passes where the first order takes one: with the training
     step included, a search costs 2.5 times as much.

2. the shared weights w, on the training batch, under the mixture of the new alpha.

The architecture is the argmax of every choice. On cell spaces whose nodes keep a pair
of edges (``darts``), all edges run during the search, and the cell is derived as
published: ``hwnas.search.genotype``.

*Differences from the paper*:

- Latency (DARTS has none; ours): alpha descends L_val + latency_weight * |E[latency] /
  target - 1|, with the exact expectation under the softmax. The absolute value makes
  the target a budget to meet, neither exceeded nor left unused. Its weight 1.0 makes a
  miss of 10 % as bad as 0.1 nats of loss.
- Proposals: the argmax rarely meets a target to within 2 %. If it does, it is the first
  proposal; the others are likely samples of the softmax that do, and the search stage
  ranks them by recalibrated held-out accuracy.
- ``warmup`` (ours, off by default): the first steps may train only the weights.
- ``alpha_lr``: the paper's 3e-4 is for 50 epochs of 391 steps; short searches need a
  larger rate (ours).
- On macro spaces slots and widths are mixed; they have no edges of which a node keeps
  two. A mixture cannot run at several resolutions, so spaces with an open resolution
  are refused. On cells, E[latency] treats all pairs of edges as equally likely (ours).
- The gradient of alpha is not clipped; an early version of the code clips its norm at
  10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.core.objective import penalised
from hwnas.core.space import SearchSpace
from hwnas.lazy import torch
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.genotype import all_edges, any_pair, derive_cell
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor


class DARTSConfig(Section):
    """DARTS's constants; the defaults are the paper's unless marked as ours."""

    order: Literal[1, 2] = Field(
        2, description="order of the architecture gradient; 2 costs 2.5 times as much per step as 1"
    )
    alpha_lr: float = Field(3e-4, gt=0, le=1e6, description="learning rate of alpha (Adam)")
    alpha_weight_decay: float = Field(
        1e-3, ge=0, le=1e6, description="weight decay of alpha (Adam)"
    )
    init_std: float = Field(
        1e-3, ge=0, le=1e6, description="standard deviation of the initial alpha"
    )
    latency_weight: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="weight of |E[latency] / target - 1| in the loss of alpha (ours)",
    )
    warmup: float = Field(
        0.0, ge=0, lt=1, description="fraction of the steps that train only the weights (ours)"
    )


class DARTS(Strategy):
    """The DARTS strategy: trains alpha and the weights in turn, in one stage."""

    Config: ClassVar[type[BaseModel]] = DARTSConfig
    supports_cells = True
    rate_option = "alpha_lr"
    mixes_options = True

    def __init__(self, config: DARTSConfig) -> None:
        self.config = config
        self.alphas: Alphas
        # no stage has begun, so the first step begins one
        self.stage = -1

    def check(self, space: SearchSpace) -> None:
        """Raises SpaceError if the input resolution is open."""
        refuse_resolutions(space, type(self).__name__.lower())

    def setup(self, ctx: SearchContext) -> None:
        """Create alpha, uniform until the first step draws it (``begin``): the
        generator of a step is the one that depends on the seed.
        """
        self.alphas = self._new_alphas(ctx, 0.0)

    def _new_alphas(self, ctx: SearchContext, init_std: float) -> Alphas:
        """Fresh alphas with the settings of the configuration."""
        config = self.config
        return Alphas(
            ctx.space,
            ctx.rng,
            init_std=init_std,
            lr=config.alpha_lr,
            betas=(0.5, 0.999),
            weight_decay=config.alpha_weight_decay,
        )

    def position(self, ctx: SearchContext) -> tuple[int, float]:
        """The number of the stage at this step, and the completed fraction of that
        stage. DARTS has one stage.
        """
        return 0, ctx.fraction

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The step at which the warm-up ends."""
        return (math.ceil(self.config.warmup * ctx.steps),)

    def begin(self, ctx: SearchContext, stage: int) -> None:
        """Start a stage with a new alpha."""
        self.alphas = self._new_alphas(ctx, self.config.init_std)
        self.stage = stage

    def skip_dropout(self, stage: int, fraction: float) -> float:
        """Dropout rate after skips after this fraction of a stage; 0 in DARTS."""
        del stage, fraction
        return 0.0

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of alpha, except during the warm-up, then one of the weights under
        the mixture.
        """
        stage, fraction = self.position(ctx)
        if stage != self.stage:
            self.begin(ctx, stage)
        dropout = self.skip_dropout(stage, fraction)
        metrics: Metrics = {}

        # 1. architecture parameters, on a held-out batch
        if fraction >= self.config.warmup:
            mixture = self.alphas.softmax()
            gates = all_edges(ctx.space, mixture)
            held_out_loss = ctx.loss(gates, order=self.config.order, skip_dropout=dropout)
            expected = ctx.cost_model.expected(any_pair(ctx.space, mixture), torch)
            weight = self.config.latency_weight
            self.alphas.update(
                penalised(held_out_loss, expected, ctx.target, "absolute", scale=weight)
            )
            metrics["held_out_loss"] = float(held_out_loss.detach())

        # 2. shared weights, on a training batch, under the updated mixture
        with torch.no_grad():
            mixture = self.alphas.softmax()
        metrics |= ctx.train(_arrays(all_edges(ctx.space, mixture)), skip_dropout=dropout)

        expected_cost = float(ctx.cost_model.expected(_arrays(any_pair(ctx.space, mixture))))
        return {
            **metrics,
            "entropy": self.alphas.entropy(),
            ctx.cost_model.unit.expected: expected_cost,
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax of the softmax first if it is within the tolerance, then likely
        samples of the softmax within it.
        """
        return propose_feasible(ctx, derive_cell(ctx.space, self.alphas.policy()), count)

    def state_dict(self) -> dict[str, Any]:
        """Alpha, the state of its optimiser, and the stage."""
        return {"stage": self.stage, "alphas": self.alphas.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.stage = state["stage"]
        self.alphas.load_state_dict(state["alphas"])


def _arrays(gates: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The gates as arrays."""
    return {key: gate.numpy() for key, gate in gates.items()}
