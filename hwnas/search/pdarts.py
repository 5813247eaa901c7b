"""P-DARTS: DARTS in stages, each with fewer options.

Chen, Xie, Wu, Tian: "Progressive Differentiable Architecture Search: Bridging the Depth
Gap between Search and Evaluation" (ICCV 2019, arXiv 1904.12760); released code
chenxin061/pdarts. The constants are those of the code, except that the dropout rates
and the skip limit are the paper's.

Three stages of equal length. At the start of each stage,

1. every slot drops the options that are least likely under the softmax of its alpha: of
   8, it keeps 5 and then 3. A dropped option has gate 0;
2. alpha starts again (1e-3 * N(0, 1)).

In a stage of E = 25 epochs, the first 10 train only the weights (warm-up). Then alpha
(Adam, learning rate 6e-4, betas 0.5 and 0.999, weight decay 1e-3, first-order gradient)
and the weights are trained in turn, as in DARTS. Skips train fastest and would win, so
elements after them are dropped with probability

    p = rate * (E - e - 1) / E           in epochs e < 10,
    p = rate * exp(-0.2 * (e - 10))      after that,

with rates 0, 0.4 and 0.7 in the three stages. Finally, as long as more than M slots are
skips, the weakest skip is deleted, and its slot takes its next best option (M = 2 of
the 8 edges that a cell keeps).

*Differences from the paper*:

- On cells, depth grows as published (5, 11, 17 cells) and each stage starts with new
  weights. On a macro space every slot is searched itself, so there is no cell to stack:
  depth is constant, and each stage continues with the weights of the one before.
- The learning rate of the weights follows a single schedule; the code restarts it in
  each stage.
- Slots with n options keep round(5/8 n) and round(3/8 n) of them, halves rounded up,
  and at least one. Widths drop none.
- The epoch is 25 times the completed fraction of the stage.
- Latency and proposals are those of ``hwnas.search.darts``, and ours: alpha descends
  L_val + latency_weight * |E[latency] / target - 1|, and the proposals make the last
  cut, to one option per slot. The same spaces are refused.
- On macro spaces ``max_skips`` defaults to a quarter, rounded up, of the slots that
  offer skip (ours, after 2 of 8): a skip there is not an edge but a shallower network.
  If skip is the only option that a slot has kept, its other options become equally
  likely when the skip is deleted.
- The budget comes first. If no architecture within the skip limit was found to meet it,
  the proposals exceed the skip limit. If too few architectures of the kept options meet
  it, some proposals have dropped options.
- The gradient of alpha is not clipped (the code clips its norm at 5). The command in
  the code's README starts with dropout rate 0.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from hwnas.core.arch import Picks
from hwnas.core.limits import Compiled, Limits
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.lazy import torch
from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.proposal import propose_feasible
from hwnas.search.skips import count_of_skips, published_skip_limit, with_few_skips
from hwnas.search.strategy import Metrics, SearchContext

EPOCHS = 25
"""Epochs of a stage in the paper: the unit in which the dropout decays."""


class PDARTSConfig(DARTSConfig):
    """P-DARTS's constants; the defaults are the paper's unless marked as ours. Tuples
    have one entry per stage.
    """

    order: Literal[1, 2] = Field(
        1, description="order of the architecture gradient; 2 costs 2.5 times as much per step as 1"
    )
    alpha_lr: float = Field(6e-4, gt=0, le=1e6, description="learning rate of alpha (Adam)")
    warmup: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="fraction of every stage that trains only the weights: 10 of 25 epochs",
    )
    keep: tuple[float, ...] = Field(
        (1.0, 5 / 8, 3 / 8),
        min_length=1,
        max_length=100,
        description="fraction of a slot's options that each stage keeps",
    )
    dropout: tuple[float, ...] = Field(
        (0.0, 0.4, 0.7), description="initial dropout rate after skips in each stage"
    )
    max_skips: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description=(
            "most skips in a proposal: by default 2 in a normal cell; elsewhere a quarter of the"
            " slots that offer one (ours)"
        ),
    )
    cells: tuple[Annotated[int, Field(le=1000)], ...] = Field(
        (1, 3, 5),
        max_length=100,
        description="on cells: normal cells between reductions per stage; 5, 11, 17 cells in all",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if len(self.dropout) != len(self.keep):
            raise ValueError(
                f"dropout has {len(self.dropout)} rates but keep has {len(self.keep)} fractions:"
                " give one of each per stage"
            )
        if len(self.cells) < len(self.keep) or min(self.cells) < 1:
            raise ValueError(
                f"cells {list(self.cells)} must have a number above 0 for each of the"
                f" {len(self.keep)} stages; if it has more, the last ones count"
            )
        if any(not 0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"dropout rates {list(self.dropout)} must be at least 0 and below 1")
        never_increases = list(self.keep) == sorted(self.keep, reverse=True)
        if not never_increases or self.keep[0] != 1 or not self.keep[-1] > 0:
            raise ValueError(
                f"keep {list(self.keep)} must start with 1, never increase, and stay above 0"
            )
        return self


class PDARTS(DARTS):
    """The P-DARTS strategy: DARTS whose stages drop options, with dropout after skips
    and a skip limit.
    """

    Config: ClassVar[type[BaseModel]] = PDARTSConfig
    config: PDARTSConfig

    def __init__(self, config: PDARTSConfig) -> None:
        super().__init__(config)

    def growth(self, space: SearchSpace) -> tuple[int, ...]:
        """On cells, a deeper super-net in each stage; none on chains of slots."""
        if space.CHAIN:
            return ()
        return self.config.cells[-len(self.config.keep) :]

    def step(self, ctx: SearchContext) -> Metrics:
        """A step of DARTS; on cells, with the super-net of the stage."""
        if self.growth(ctx.space):
            ctx.grow(self.position(ctx)[0])
        return super().step(ctx)

    def position(self, ctx: SearchContext) -> tuple[int, float]:
        """The stage and the completed fraction of it; all stages are equally long."""
        # in integers: in floats, a stage could begin one step too late
        stage, remainder = divmod(ctx.step * len(self.config.keep), ctx.steps)
        return stage, remainder / ctx.steps

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The steps at which the stages begin and their warm-ups end."""
        stages = len(self.config.keep)
        steps = []
        for stage in range(stages):
            steps.append(math.ceil(stage * ctx.steps / stages))
            steps.append(math.ceil((stage + self.config.warmup) * ctx.steps / stages))
        return tuple(steps)

    def begin(self, ctx: SearchContext, stage: int) -> None:
        """Drop the least likely options of every slot, then start with a new alpha."""
        # super().begin replaces these, which are of the previous stage
        policy = self.alphas.policy()
        kept = self.alphas.kept
        super().begin(ctx, stage)
        for choice in ctx.space.choices:
            if choice.kind == "op":
                count = kept_count(len(choice.options), self.config.keep[stage])
                best = np.argsort(-policy[choice.key], kind="stable")[:count]
                kept[choice.key] = torch.from_numpy(np.isin(np.arange(len(choice.options)), best))
        self.alphas.kept = kept

    def skip_dropout(self, stage: int, fraction: float) -> float:
        """The paper's p: falls linearly while only the weights are trained, then
        exponentially.
        """
        rate = self.config.dropout[stage]
        epoch = math.floor(EPOCHS * fraction)
        if fraction < self.config.warmup:
            return rate * (EPOCHS - epoch - 1) / EPOCHS
        # max: the epoch is rounded down, so it may be before the end of the warm-up
        return rate * math.exp(-0.2 * max(0.0, epoch - self.config.warmup * EPOCHS))

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Proposals as in DARTS, of the kept options and with few skips. *Differences
        from the paper* says which of these gives way if they cannot all be met.
        """
        most = self.config.max_skips
        if most is None:
            most = published_skip_limit(ctx.space)
        policy = with_few_skips(ctx.space, self.alphas.policy(), most)
        proposals = propose_feasible(_with_skip_limit(ctx, most), policy, count)
        if proposals:
            return proposals
        # the budget comes before the skip limit
        return propose_feasible(ctx, policy, count)


def kept_count(options: int, fraction: float) -> int:
    """How many options of a slot a stage keeps: the fraction of them, rounded with
    halves up, and at least one.

    Example:
        >>> [kept_count(8, fraction) for fraction in (1.0, 5 / 8, 3 / 8)]
        [8, 5, 3]
    """
    return max(1, math.floor(options * fraction + 0.5))


def _with_skip_limit(ctx: SearchContext, most: int) -> SearchContext:
    """The context with one more limit: at most ``most`` skips."""
    limits = ctx.limits
    if limits is None:
        limits = Limits(ctx.space, (), LatencyTable.load)
    skip_limit = Compiled("skips", "max_skips", most, count_of_skips(ctx.space))
    return replace(ctx, limits=limits.also(skip_limit))
