"""DARTS: differentiable architecture search by a continuous relaxation.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055); released code quark0/darts. The constants are the code's.

Every choice runs all its options at once, weighted by the softmax of its alpha
(equation 2); alpha is drawn from 1e-3 * N(0, 1). Per step:

1. alpha, by Adam (3e-4, betas 0.5 and 0.999, weight decay 1e-3), down the gradient of
   the held-out loss L_val

   - ``order = 1``:  grad_alpha L_val(w, alpha) at the present weights w (xi = 0);
   - ``order = 2``:  grad_alpha L_val(w', alpha) at w' = w - xi * grad_w L_train(w,
     alpha), a virtual training step whose own dependence on alpha counts (equations 6
     to 8; ``hwnas.nn.unrolled``). The paper's better results are of this order. It
     takes four passes forward and backward where the first order takes one: with the
     training step, a search costs 2.5 times as much.

2. the weights, on the training batch, under the same mixture.

The architecture is the argmax of every choice. On spaces of cells with pairs of edges
to keep (``darts``), all edges run while searching, and the cell is derived as
published: ``hwnas.search.genotype``.

*Differences from the paper*:

- Latency (DARTS knows none; ours): alpha descends  L_val + latency_weight * |E[latency]
  / target - 1|, with the exact expectation under the softmax. The absolute value makes
  the target a budget to be met, neither overrun nor left unused; its weight 1.0 says
  that a miss of 10 % is as bad as 0.1 nats of loss.
- Proposals: the argmax rarely meets a target to 2 %, so it leads where it does; the
  others are likely samples of the softmax that do, and the search stage ranks them by
  recalibrated held-out accuracy.
- ``warmup`` (ours, off by default): a first part of the steps that trains the weights alone.
- ``alpha_lr``: the paper's 3e-4 is for 50 epochs of 391 steps; short searches need a
  larger one (ours).
- On macro spaces slots and widths are mixed; there are no edges of which a node keeps
  two. A mixture cannot run at several resolutions, so spaces that leave theirs open are
  refused. On cells, any pair of edges is taken to be as likely for E[latency] (ours).
- The gradient of alpha is not clipped; an early version of the code clips its norm at 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hwnas.core.arch import Picks
from hwnas.core.objective import penalised
from hwnas.core.space import SearchSpace
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.genotype import all_edges, any_pair, derive_cell
from hwnas.search.proposal import propose_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy


class DARTSConfig(BaseModel):
    """DARTS's constants; the defaults are the paper's where they are not said to be ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal[1, 2] = Field(
        2, description="of the architecture gradient; 2 costs 2.5 times as much per step as 1"
    )
    alpha_lr: float = Field(3e-4, gt=0, description="Adam's rate for alpha")
    alpha_weight_decay: float = Field(1e-3, ge=0)
    init_std: float = Field(1e-3, ge=0, description="standard deviation of the initial alpha")
    latency_weight: float = Field(
        1.0, ge=0, description="of |E[latency] / target - 1| in alpha's loss (ours)"
    )
    warmup: float = Field(
        0.0, ge=0, lt=1, description="part of the steps that trains only the weights (ours)"
    )


class DARTS(Strategy):
    """The DARTS strategy: one stage in which alpha and the weights take turns."""

    Config: ClassVar[type[BaseModel]] = DARTSConfig
    cells = True
    rate = "alpha_lr"
    mixes = True

    def __init__(self, config: DARTSConfig) -> None:
        self.config = config
        self.alphas: Alphas
        self.stage = -1

    def check(self, space: SearchSpace) -> None:
        """Raise SpaceError where the input resolution is still open."""
        refuse_resolutions(space, type(self).__name__.lower())

    def setup(self, ctx: SearchContext) -> None:
        """Make alpha, uniform until the first step draws it: a step's generator is the
        one that depends on the seed.
        """
        self.alphas = self._new_alphas(ctx, 0.0)

    def _new_alphas(self, ctx: SearchContext, init_std: float) -> Alphas:
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
        """The number of the stage at this step, and which part of it is over. DARTS has
        one stage.
        """
        return 0, ctx.fraction

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The end of the warm-up."""
        return (math.ceil(self.config.warmup * ctx.steps),)

    def begin(self, ctx: SearchContext, stage: int) -> None:
        """Start a stage with a new alpha."""
        self.alphas = self._new_alphas(ctx, self.config.init_std)
        self.stage = stage

    def skip_dropout(self, stage: int, over: float) -> float:
        """Dropout rate behind skips when part ``over`` of a stage is over. DARTS has none."""
        del stage, over
        return 0.0

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of alpha, but for the warm-up, and one of the weights under the mixture."""
        stage, over = self.position(ctx)
        if stage != self.stage:
            self.begin(ctx, stage)
        dropout = self.skip_dropout(stage, over)
        metrics: Metrics = {}
        if over >= self.config.warmup:
            mixture = self.alphas.softmax()
            held_out = ctx.loss(
                all_edges(ctx.space, mixture), order=self.config.order, skip_dropout=dropout
            )
            expected = ctx.cost_model.expected(any_pair(ctx.space, mixture), torch)
            self.alphas.update(
                penalised(
                    held_out, expected, ctx.target, "absolute", scale=self.config.latency_weight
                )
            )
            metrics["held_out_loss"] = float(held_out.detach())
        with torch.no_grad():
            mixture = self.alphas.softmax()
        metrics |= ctx.train(_arrays(all_edges(ctx.space, mixture)), skip_dropout=dropout)
        expected_ms = float(ctx.cost_model.expected(_arrays(any_pair(ctx.space, mixture))))
        return {
            **metrics,
            "entropy": self.alphas.entropy(),
            ctx.cost_model.unit.expected: expected_ms,
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The argmax first, where it is within the tolerance, then likely samples of
        the softmax that are.
        """
        return propose_feasible(ctx, derive_cell(ctx.space, self.alphas.policy()), count)

    def state_dict(self) -> dict[str, Any]:
        """Alpha and the stage."""
        return {"stage": self.stage, "alphas": self.alphas.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.stage = state["stage"]
        self.alphas.load_state_dict(state["alphas"])


def _arrays(gates: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: gate.numpy() for key, gate in gates.items()}
