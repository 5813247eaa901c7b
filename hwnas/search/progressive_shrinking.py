"""Progressive shrinking: one super-net whose sub-networks are good without retraining,
for many budgets and devices.

Cai, Gan, Wang, Zhang, Han: "Once for All: Train One Network and Specialize it for
Efficient Deployment" (ICLR 2020, arXiv 1908.09791), section 3.3; released code
mit-han-lab/once-for-all. Six phases, each opening more options than the one before. Per
step, sub-networks are drawn uniformly from what is open; their gradients on one batch
are added up for one update:

=========  =============================================  ===========  ======  ================
phase      open                                           sub-nets     epochs  loss
=========  =============================================  ===========  ======  ================
largest    nothing: the largest network                   1            180     cross-entropy
kernel     every kernel size                              1            120     and distillation
depth      ... and the two largest depths                 2            25      from the largest
depth      ... and every depth                            2            120     network as it was
expansion  ... and the two largest expansions             4            25      at the end of the
expansion  ... and every expansion                        4            120     first phase
=========  =============================================  ===========  ======  ================

The image size, where it is a choice, is drawn for each step in all phases, the first
included. The epochs are the paper's (largest) and the code's; here they are shares of
the search's steps, of which only the ratios count: with all six phases the first gets
180 / 590 of them. ``Evolution`` finds the architecture. ``search.weights`` of another
run takes the trained super-net for another table.

*Differences from the paper*:

- Spaces may be others than the paper's. A phase in which nothing would open is left
  out, and its steps go to the others; two of one axis that open the same are one.
  Widths open as expansions do, the two largest first; SE, groups, activations and kinds
  of block open with the last phase. Where depth is a matter of skipping slots, the
  first depth phase lets the last slot of every stage that can be skipped be skipped,
  the second all of them in any combination.
- One learning-rate schedule over all phases, where the code starts a new one with each
  (3e-2; then 2.5e-3 and 7.5e-3 twice).
- Channels are not sorted by importance when expansions open: a strategy does not touch weights.
- The teacher sees the images of its own, the largest, resolution; the code's sees the step's.
- The evolution evaluates its candidates instead of asking an accuracy predictor, and
  has SPOS's settings; see ``evolution``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, Field

from hwnas.core.arch import Picks
from hwnas.core.option import BlockOption, parse_option
from hwnas.core.space import Choice, SearchSpace
from hwnas.errors import SpaceError
from hwnas.search.evolution import Evolution, EvolutionConfig
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Metrics, SearchContext, Strategy

Share = Annotated[float, Field(gt=0)]


class ProgressiveShrinkingConfig(EvolutionConfig):
    """How the steps are shared out, in once-for-all's epochs (only the ratios count),
    and the settings of the evolution.
    """

    largest: Share = Field(
        180.0, description="share of the largest network, which becomes the teacher"
    )
    kernel: Share = Field(120.0, description="share of elastic kernel sizes")
    depth: tuple[Share, Share] = Field(
        (25.0, 120.0), description="shares of the two largest depths, and of all"
    )
    expansion: tuple[Share, Share] = Field(
        (25.0, 120.0), description="shares of the two largest expansions, and of all"
    )


@dataclass(frozen=True)
class Opening:
    """How many of the largest kernel sizes, depths and expansions are open; None: all."""

    kernels: int | None = 1
    depths: int | None = 1
    expansions: int | None = 1


LARGEST = Opening()
PHASES = (
    ("largest", 1, LARGEST),
    ("kernel", 1, Opening(None)),
    ("depth", 2, Opening(None, 2)),
    ("depth", 2, Opening(None, None)),
    ("expansion", 4, Opening(None, None, 2)),
    ("expansion", 4, Opening(None, None, None)),
)
"""Name, sub-networks per step and what is open."""

Allowed = Mapping[str, tuple[int, ...]]
"""Choice key -> positions of the options that are open."""

T = TypeVar("T", int, float)


def _largest(values: Iterable[T], count: int | None) -> list[T]:
    return sorted(set(values), reverse=True)[:count]


def allowed(space: SearchSpace, opening: Opening) -> dict[str, tuple[int, ...]]:
    """Which options of every choice are open. ``LARGEST`` opens one each, but every resolution.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> allowed(tiny_space(), Opening(None))["s1.b1"]      # k3e3, k5e3, k3e6, k5e6, skip: both kernels at expansion 6
        (2, 3)
    """
    stages: dict[str, list[str]] = {}
    for choice in space.choices:
        if choice.kind == "op" and None in _blocks(choice):
            stages.setdefault(choice.address.part, []).append(choice.key)
    # slots of a stage that may be left out
    most = None if opening.depths is None else opening.depths - 1
    skippable = {
        key
        for keys in stages.values()
        for key in (keys if most is None else keys[len(keys) - min(most, len(keys)) :])
    }
    found = {}
    for choice in space.choices:
        if choice.kind == "op":
            found[choice.key] = _open_blocks(_blocks(choice), opening, choice.key in skippable)
        elif choice.kind == "resolution":
            found[choice.key] = tuple(range(len(choice.options)))
        else:
            sizes = _largest(
                map(int, choice.options),
                opening.depths if choice.kind == "depth" else opening.expansions,
            )
            found[choice.key] = tuple(i for i, size in enumerate(choice.options) if size in sizes)
    return found


def _blocks(choice: Choice) -> list[BlockOption | None]:
    return [parse_option(str(option)) for option in choice.options]


def _open_blocks(
    options: list[BlockOption | None], opening: Opening, skippable: bool
) -> tuple[int, ...]:
    blocks = [block for block in options if block is not None]
    top = max(
        blocks, key=lambda block: (block.expansion, block.kernel, block.se_ratio, -block.groups)
    )
    kernels = _largest((block.kernel for block in blocks), opening.kernels)
    expansions = _largest((block.expansion for block in blocks), opening.expansions)

    def is_open(block: BlockOption) -> bool:
        like_top = (
            opening.expansions is None
            or replace(block, kernel=top.kernel, expansion=top.expansion) == top
        )
        return block == top or (
            block.kernel in kernels and block.expansion in expansions and like_top
        )

    return tuple(
        i for i, block in enumerate(options) if (skippable if block is None else is_open(block))
    )


@dataclass(frozen=True)
class Phase:
    """A part of the training: ``paths`` sub-networks of what is ``allowed`` per step,
    for ``share`` of the steps.
    """

    name: str
    paths: int
    share: float
    allowed: Allowed


def phases(space: SearchSpace, config: ProgressiveShrinkingConfig) -> list[Phase]:
    """The phases of a space in order: those of ``PHASES`` that open something. In the
    last, everything is open.
    """
    shares = (config.largest, config.kernel, *config.depth, *config.expansion)
    found: list[Phase] = []
    for (name, paths, opening), share in zip(PHASES, shares, strict=True):
        phase = Phase(name, paths, share, allowed(space, opening))
        if not found or phase.allowed != found[-1].allowed:
            found.append(phase)
        elif name == found[-1].name:
            found[-1] = replace(found[-1], share=found[-1].share + share)
    return found


class ProgressiveShrinking(Strategy):
    """Once-for-all. What is open is a function of the step, so there is no state; the
    teacher is kept with the weights.
    """

    Config: ClassVar[type[BaseModel]] = ProgressiveShrinkingConfig
    sharing = "collapsed"
    kernels = "ofa_transform"

    def __init__(self, config: ProgressiveShrinkingConfig) -> None:
        self.config = config
        self.phases: list[Phase] = []
        self.ends: list[int] = []
        """The step at which each phase is over."""

    def check(self, space: SearchSpace) -> None:
        """Raise SpaceError where neither kernel sizes nor depths nor expansions differ."""
        for choice in space.choices:
            blocks = _blocks(choice) if choice.kind == "op" else []
            sizes = {(block.kernel, block.expansion) for block in blocks if block is not None}
            if choice.kind == "depth" or None in blocks or len(sizes) > 1:
                return
        raise SpaceError(
            f"space {space.name} has no second kernel size, depth or expansion anywhere, so there"
            " is nothing to shrink: search it with another strategy."
        )

    def setup(self, ctx: SearchContext) -> None:
        """Share out the steps. The first phase gets one at least: there is no
        distillation without a teacher.
        """
        self.phases = phases(ctx.space, self.config)
        until = np.cumsum([phase.share for phase in self.phases])
        self.ends = [max(1, round(ctx.steps * float(part))) for part in until / until[-1]]

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The ends of the phases."""
        del ctx
        return tuple(self.ends[:-1])

    def step(self, ctx: SearchContext) -> Metrics:
        """One update by the sub-networks of the present phase. The cost is their mean."""
        number = bisect_right(self.ends, ctx.step)
        phase = self.phases[number]
        if ctx.step == self.ends[0]:
            ctx.remember_teacher(largest_picks(ctx.space))
        paths = sampled(ctx.space, phase, ctx.rng)
        metrics = ctx.train(*(one_hot(picks, ctx.space) for picks in paths), teach=number > 0)
        latency = float(np.mean([ctx.cost_model.cost(picks) for picks in paths]))
        return {**metrics, "phase": float(number), ctx.cost_model.unit.quantity: latency}

    def cross_entropies(self, row: Metrics) -> int:
        """All phases but the first have a teacher."""
        return 2 if row["phase"] > 0 else 1

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best of an evolution."""
        return Evolution(self.config).find(ctx, count)


def largest_picks(space: SearchSpace) -> Picks:
    """The largest network of a space, at its largest resolution: the teacher."""
    top = allowed(space, LARGEST)
    return {
        choice.key: (
            max(map(int, choice.options))
            if choice.kind == "resolution"
            else choice.options[top[choice.key][0]]
        )
        for choice in space.choices
    }


def sampled(space: SearchSpace, phase: Phase, rng: np.random.Generator) -> list[Picks]:
    """The sub-networks of one step: uniform over what is open, all at one resolution."""
    paths: list[Picks] = [
        {
            choice.key: choice.options[rng.choice(phase.allowed[choice.key])]
            for choice in space.choices
        }
        for _ in range(phase.paths)
    ]
    common = {
        choice.key: paths[0][choice.key] for choice in space.choices if choice.kind == "resolution"
    }
    return [{**picks, **common} for picks in paths]
