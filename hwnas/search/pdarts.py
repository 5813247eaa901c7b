"""P-DARTS: DARTS in stages, each with fewer options.

Chen, Xie, Wu, Tian: "Progressive Differentiable Architecture Search: Bridging the Depth
Gap between Search and Evaluation" (ICCV 2019, arXiv 1904.12760); released code
chenxin061/pdarts. The constants are the code's, dropout rates and skip limit the
paper's.

Three stages of equal length. At the start of each

1. every slot drops the options that the softmax of its alpha has lowest: of 8, it keeps
   5 and then 3. A dropped option has gate 0;
2. alpha starts again (1e-3 * N(0, 1)).

Within a stage of E = 25 epochs the first 10 train the weights alone; then alpha (Adam,
6e-4, betas 0.5 and 0.999, weight decay 1e-3, gradient of first order) and the weights
take turns, as in DARTS. Against the pull of skips, which train fastest, elements behind
them are dropped with probability

    p = rate * (E - e - 1) / E  in epoch e < 10,        p = rate * exp(-0.2 * (e - 10))  from then on,

with rates 0, 0.4, 0.7 of the stages. In the end, as long as more than M slots are
skips, the weakest of them is deleted: its slot takes its next best option (M = 2 of the
8 edges that a cell keeps).

*Differences from the paper*:

- On cells, depth grows as published (5, 11, 17 cells) and the weights of each stage are
  new. On a macro space every slot is itself searched, so there is no cell to stack:
  depth stays, and the weights go on from stage to stage.
- The weights' learning rate follows one schedule; the code starts it anew in each stage.
- Slots with n options keep round(5/8 n) and round(3/8 n) of them, halves rounded up,
  and at least one. Widths drop none.
- A stage's part that is over, times 25, is the epoch.
- Latency and proposals are those of ``hwnas.search.darts``, and ours: alpha descends
  L_val + latency_weight * |E[latency] / target - 1|, and the last cut, to one option
  per slot, is made by the proposals. Refused are the same spaces, too.
- On macro spaces ``max_skips`` defaults to a quarter, rounded up, of the slots that
  offer skip (ours, after 2 of 8): a skip is no edge but a shallower network. A slot
  whose kept options end with skip takes any of its others alike.
- The budget comes first: where no architecture within the skip limit was found to meet
  it, the proposals exceed the skip limit, and where too few of the kept options do,
  some have options that were dropped.
- The gradient of alpha is not clipped (the code: its norm at 5). The README's command
  starts with dropout rate 0.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from hwnas.core.arch import Picks
from hwnas.core.limits import Compiled, Limits
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.proposal import propose_feasible
from hwnas.search.skips import count_of_skips, usual_skips, with_few_skips
from hwnas.search.strategy import Metrics, SearchContext

EPOCHS = 25
"""Epochs of a stage in the paper, the unit of the dropout's decay."""


class PDARTSConfig(DARTSConfig):
    """P-DARTS's constants; the defaults are the paper's where they are not said to be
    ours. One entry per stage.
    """

    order: Literal[1, 2] = Field(
        1, description="of the architecture gradient; 2 costs 2.5 times as much per step as 1"
    )
    alpha_lr: float = Field(6e-4, gt=0, description="Adam's rate for alpha")
    warmup: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="part of every stage that trains only the weights: 10 of 25 epochs",
    )
    keep: tuple[float, ...] = Field(
        (1.0, 5 / 8, 3 / 8),
        min_length=1,
        description="part of a slot's options that each stage keeps",
    )
    dropout: tuple[float, ...] = Field(
        (0.0, 0.4, 0.7), description="initial dropout rate behind skips in each stage"
    )
    max_skips: int | None = Field(
        None,
        ge=0,
        description=(
            "skips of a proposal: of a normal cell, default 2; elsewhere a quarter of the slots"
            " that offer one (ours)"
        ),
    )
    cells: tuple[int, ...] = Field(
        (1, 3, 5),
        description="of cells: normal cells between reductions in each stage; 5, 11, 17 in all",
    )

    @model_validator(mode="after")
    def _one_per_stage(self) -> Self:
        if len(self.dropout) != len(self.keep):
            raise ValueError(
                f"dropout has {len(self.dropout)} rates and keep {len(self.keep)} parts: give one"
                " of each per stage"
            )
        if len(self.cells) < len(self.keep) or min(self.cells) < 1:
            raise ValueError(
                f"cells {list(self.cells)} must be a number above 0 for each of the"
                f" {len(self.keep)} stages, the last ones"
            )
        if any(not 0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"dropout rates {list(self.dropout)} must be at least 0 and below 1")
        if list(self.keep) != sorted(self.keep, reverse=True) or not (
            self.keep[-1] > 0 and self.keep[0] == 1
        ):
            raise ValueError(
                f"keep {list(self.keep)} must start with 1, never grow, and stay above 0"
            )
        return self


class PDARTS(DARTS):
    """The P-DARTS strategy: DARTS whose stages drop options, with dropout behind skips
    and a skip limit.
    """

    Config: ClassVar[type[BaseModel]] = PDARTSConfig
    config: PDARTSConfig

    def __init__(self, config: PDARTSConfig) -> None:
        super().__init__(config)

    def growth(self, space: SearchSpace) -> tuple[int, ...]:
        """Of cells, deeper super-nets from stage to stage."""
        return () if space.CHAIN else self.config.cells[-len(self.config.keep) :]

    def step(self, ctx: SearchContext) -> Metrics:
        """As DARTS; on cells, with the super-net of the stage."""
        if self.growth(ctx.space):
            ctx.grow(self.position(ctx)[0])
        return super().step(ctx)

    def position(self, ctx: SearchContext) -> tuple[int, float]:
        """Stages of equal length, in whole steps."""
        stage, steps_over = divmod(ctx.step * len(self.config.keep), ctx.steps)
        return stage, steps_over / ctx.steps

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The ends of the stages, and of the warm-up in each."""
        count = len(self.config.keep)
        return tuple(
            math.ceil((stage + over) * ctx.steps / count)
            for stage in range(count)
            for over in (0.0, self.config.warmup)
        )

    def begin(self, ctx: SearchContext, stage: int) -> None:
        """Drop the least likely options of every slot, then start with a new alpha."""
        policy, kept = self.alphas.policy(), self.alphas.kept
        super().begin(ctx, stage)
        for choice in ctx.space.choices:
            if choice.kind == "op":
                count = kept_count(len(choice.options), self.config.keep[stage])
                best = np.argsort(-policy[choice.key], kind="stable")[:count]
                kept[choice.key] = torch.from_numpy(np.isin(np.arange(len(choice.options)), best))
        self.alphas.kept = kept

    def skip_dropout(self, stage: int, over: float) -> float:
        """p of the paper: linear while only the weights are trained, then exponential."""
        rate, epoch = self.config.dropout[stage], math.floor(EPOCHS * over)
        if over < self.config.warmup:
            return rate * (EPOCHS - epoch - 1) / EPOCHS
        return rate * math.exp(-0.2 * max(0.0, epoch - self.config.warmup * EPOCHS))

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """As DARTS, from the kept options with few skips; *Differences from the paper*
        say what gives way where not all can be met.
        """
        most = self.config.max_skips
        if most is None:
            most = usual_skips(ctx.space)
        policy = with_few_skips(ctx.space, self.alphas.policy(), most)
        return propose_feasible(_limited(ctx, most), policy, count) or propose_feasible(
            ctx, policy, count
        )


def kept_count(options: int, part: float) -> int:
    """How many of a slot's options a stage keeps: rounded, halves up, and at least one.

    Example:
        >>> [kept_count(8, part) for part in (1.0, 5 / 8, 3 / 8)]
        [8, 5, 3]
    """
    return max(1, math.floor(options * part + 0.5))


def _limited(ctx: SearchContext, most: int) -> SearchContext:
    """The context with one limit more: how many skips there are."""
    limits = Limits(ctx.space, (), LatencyTable.load) if ctx.limits is None else ctx.limits
    return replace(
        ctx, limits=limits.also(Compiled("skips", "max_skips", most, count_of_skips(ctx.space)))
    )
