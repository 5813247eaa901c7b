"""Progressive shrinking: one super-net whose sub-networks need no retraining, for many
budgets and devices.

Cai, Gan, Wang, Zhang, Han: "Once for All: Train One Network and Specialize it for
Efficient Deployment" (ICLR 2020, arXiv 1908.09791), section 3.3; released code
mit-han-lab/once-for-all. There are six phases, each of which opens more options than
the one before. Each step draws sub-networks uniformly from the open options and adds up
their gradients on one batch for one update of the shared weights:

=========  ==================================  ========  ======
phase      open                                sub-nets  epochs
=========  ==================================  ========  ======
largest    nothing: the largest network        1         180
kernel     every kernel size                   1         120
depth      ... and the two largest depths      2         25
depth      ... and every depth                 2         120
expansion  ... and the two largest expansions  4         25
expansion  ... and every expansion             4         120
=========  ==================================  ========  ======

The loss is the cross-entropy. All phases but the first add distillation from a teacher:
the largest network, with its weights at the end of the first phase.

If the image size is a choice, it is drawn for each step in all phases, including the
first. The epochs are the paper's (largest) and the code's. Here they are shares of the
steps of the search, of which only the ratios matter: with all six phases, the first
gets 180 / 590 of the steps. ``Evolution`` finds the architecture. Another run can use
the trained super-net for another table (``search.weights``).

*Differences from the paper*:

- Other spaces than the paper's work as well. A phase that would open nothing is
  omitted, and its steps go to the others; two phases of one axis that open the same
  options are merged. Widths open like expansions, the two largest first; SE, groups,
  activations and kinds of block open in the last phase. If depth means skipping slots,
  the first depth phase opens skip for the last skippable slot of every stage, and the
  second for all skippable slots, in any combination.
- A single learning-rate schedule spans all phases; the code starts a new one in each
  (3e-2; then 2.5e-3 and 7.5e-3 twice).
- Channels are not sorted by importance when expansions open, because a strategy does
  not touch weights.
- The teacher sees images of its own resolution, the largest; in the code it sees those
  of the step.
- The evolution evaluates its candidates instead of querying an accuracy predictor, and
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

Share = Annotated[float, Field(gt=0, le=1e6)]
"""Part of the steps, relative to the shares of the other phases."""


class ProgressiveShrinkingConfig(EvolutionConfig):
    """How many steps each phase gets, in once-for-all's epochs of which only the ratios
    matter, and the settings of the evolution.
    """

    largest: Share = Field(
        180.0, description="share of training the largest network, which becomes the teacher"
    )
    kernel: Share = Field(120.0, description="share of elastic kernel sizes")
    depth: tuple[Share, Share] = Field(
        (25.0, 120.0), description="shares of elastic depth: the two largest, then all"
    )
    expansion: tuple[Share, Share] = Field(
        (25.0, 120.0), description="shares of elastic expansion: the two largest, then all"
    )


@dataclass(frozen=True)
class Opening:
    """How many of the largest sizes are open on each axis; None means all."""

    kernels: int | None = 1
    depths: int | None = 1
    expansions: int | None = 1


LARGEST = Opening()
PHASES = (
    ("largest", 1, LARGEST),
    ("kernel", 1, Opening(kernels=None)),
    ("depth", 2, Opening(kernels=None, depths=2)),
    ("depth", 2, Opening(kernels=None, depths=None)),
    ("expansion", 4, Opening(kernels=None, depths=None, expansions=2)),
    ("expansion", 4, Opening(kernels=None, depths=None, expansions=None)),
)
"""Name, sub-networks per step, and what is open."""

OpenOptions = Mapping[str, tuple[int, ...]]
"""Choice key -> positions of the options that are open."""

T = TypeVar("T", int, float)


def _largest(values: Iterable[T], count: int | None) -> list[T]:
    """The ``count`` largest distinct values, in descending order; None means all."""
    return sorted(set(values), reverse=True)[:count]


def open_options(space: SearchSpace, opening: Opening) -> dict[str, tuple[int, ...]]:
    """Choice key -> positions of the open options. ``LARGEST`` opens one option of
    every choice, except that all resolutions are open.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> # k3e3, k5e3, k3e6, k5e6, skip: both kernels at expansion 6
        >>> open_options(tiny_space(), Opening(None))["s1.b1"]
        (2, 3)
    """
    skippable = _open_skips(space, opening)
    positions: dict[str, tuple[int, ...]] = {}
    for choice in space.choices:
        if choice.kind == "op":
            positions[choice.key] = _open_blocks(_blocks(choice), opening, choice.key in skippable)
        elif choice.kind == "resolution":
            positions[choice.key] = tuple(range(len(choice.options)))
        elif choice.kind == "depth":
            positions[choice.key] = _open_sizes(choice, opening.depths)
        else:
            # widths open like expansions
            positions[choice.key] = _open_sizes(choice, opening.expansions)
    return positions


def _open_skips(space: SearchSpace, opening: Opening) -> set[str]:
    """Keys of the slots that may be skipped: in each stage, the last ``depths`` - 1 of
    those that offer skip.
    """
    stages: dict[str, list[str]] = {}
    for choice in space.choices:
        if choice.kind == "op" and None in _blocks(choice):
            stages.setdefault(choice.address.part, []).append(choice.key)

    skippable: set[str] = set()
    for keys in stages.values():
        # the full depth skips nothing, so n depths allow n - 1 skips
        count = len(keys)
        if opening.depths is not None:
            count = min(opening.depths - 1, len(keys))
        skippable.update(keys[len(keys) - count :])
    return skippable


def _open_sizes(choice: Choice, count: int | None) -> tuple[int, ...]:
    """Positions of the ``count`` largest depths or widths of a choice."""
    sizes = _largest(map(int, choice.options), count)
    return tuple(i for i, size in enumerate(choice.options) if size in sizes)


def _blocks(choice: Choice) -> list[BlockOption | None]:
    """The parsed options of a slot; None is skip."""
    return [parse_option(str(option)) for option in choice.options]


def _open_blocks(
    options: list[BlockOption | None], opening: Opening, skippable: bool
) -> tuple[int, ...]:
    """Positions of the open options of a slot."""
    blocks = [block for block in options if block is not None]
    # the block of the largest network; fewer groups have more weights
    top = max(
        blocks, key=lambda block: (block.expansion, block.kernel, block.se_ratio, -block.groups)
    )
    kernels = _largest((block.kernel for block in blocks), opening.kernels)
    expansions = _largest((block.expansion for block in blocks), opening.expansions)

    def is_open(block: BlockOption | None) -> bool:
        if block is None:
            return skippable
        if block == top:
            return True
        if block.kernel not in kernels or block.expansion not in expansions:
            return False
        # SE, groups, activations and kinds of block open in the last phase
        like_top = replace(block, kernel=top.kernel, expansion=top.expansion) == top
        return like_top or opening.expansions is None

    return tuple(i for i, block in enumerate(options) if is_open(block))


@dataclass(frozen=True)
class Phase:
    """A part of the training: each step draws ``paths`` sub-networks from the
    open ``options``. ``share`` is the number of steps relative to the other phases.
    """

    name: str
    paths: int
    share: float
    options: OpenOptions


def phases(space: SearchSpace, config: ProgressiveShrinkingConfig) -> list[Phase]:
    """The phases of a space in order: those of ``PHASES`` that open something. In the
    last phase, everything is open.
    """
    shares = (config.largest, config.kernel, *config.depth, *config.expansion)
    opening_phases: list[Phase] = []
    for (name, paths, opening), share in zip(PHASES, shares, strict=True):
        phase = Phase(name, paths, share, open_options(space, opening))
        if not opening_phases:
            opening_phases.append(phase)
            continue
        previous = opening_phases[-1]
        if phase.options != previous.options:
            opening_phases.append(phase)
        elif name == previous.name:
            # two phases of one axis that open the same options are merged
            opening_phases[-1] = replace(previous, share=previous.share + share)
    return opening_phases


class ProgressiveShrinking(Strategy):
    """The once-for-all strategy. It has no state of its own: the step determines which
    options are open, and the teacher is stored with the weights.
    """

    Config: ClassVar[type[BaseModel]] = ProgressiveShrinkingConfig
    sharing = "collapsed"
    kernels = "ofa_transform"

    def __init__(self, config: ProgressiveShrinkingConfig) -> None:
        self.config = config
        self.phases: list[Phase] = []
        self.ends: list[int] = []
        """The step at which each phase ends."""

    def check(self, space: SearchSpace) -> None:
        """Raises SpaceError if no choice varies kernel size, depth or expansion."""
        for choice in space.choices:
            if choice.kind == "depth":
                return
            if choice.kind == "op":
                blocks = _blocks(choice)
                sizes = {(block.kernel, block.expansion) for block in blocks if block is not None}
                if None in blocks or len(sizes) > 1:
                    return
        raise SpaceError(
            f"space {space.name} offers no choice of kernel size, depth or expansion, so there is"
            " nothing to shrink: search it with another strategy."
        )

    def setup(self, ctx: SearchContext) -> None:
        """Divide the steps among the phases."""
        self.phases = phases(ctx.space, self.config)
        shares_until_end = np.cumsum([phase.share for phase in self.phases])
        fractions = shares_until_end / shares_until_end[-1]
        # the first phase gets at least one step: distillation needs a teacher
        self.ends = [max(1, round(ctx.steps * float(fraction))) for fraction in fractions]

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The steps at which the phases end."""
        del ctx
        return tuple(self.ends[:-1])

    def step(self, ctx: SearchContext) -> Metrics:
        """One update by the sub-networks of the present phase. Logs their mean cost."""
        number = bisect_right(self.ends, ctx.step)
        phase = self.phases[number]
        if ctx.step == self.ends[0]:
            # the teacher is the largest network at the end of the first phase
            ctx.remember_teacher(largest_picks(ctx.space))

        paths = sample_subnetworks(ctx.space, phase, ctx.rng)
        metrics = ctx.train(*(one_hot(picks, ctx.space) for picks in paths), teach=number > 0)
        cost = float(np.mean([ctx.cost_model.cost(picks) for picks in paths]))
        return {**metrics, "phase": float(number), ctx.cost_model.unit.quantity: cost}

    def cross_entropies(self, row: Metrics) -> int:
        """Two with a teacher, which all phases but the first have."""
        return 2 if row["phase"] > 0 else 1

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best architectures of an evolution."""
        return Evolution(self.config).find(ctx, count)


def largest_picks(space: SearchSpace) -> Picks:
    """The largest network of a space, at its largest resolution: the teacher."""
    top = open_options(space, LARGEST)
    picks: Picks = {}
    for choice in space.choices:
        if choice.kind == "resolution":
            picks[choice.key] = max(map(int, choice.options))
        else:
            picks[choice.key] = choice.options[top[choice.key][0]]
    return picks


def sample_subnetworks(space: SearchSpace, phase: Phase, rng: np.random.Generator) -> list[Picks]:
    """The sub-networks of a step: uniform over the open options, at one resolution."""
    paths: list[Picks] = []
    for _ in range(phase.paths):
        picks: Picks = {}
        for choice in space.choices:
            position = rng.choice(phase.options[choice.key])
            picks[choice.key] = choice.options[position]
        paths.append(picks)

    # they train on the same batch, so all take the resolution of the first
    for choice in space.choices:
        if choice.kind == "resolution":
            for picks in paths:
                picks[choice.key] = paths[0][choice.key]
    return paths
