"""Random search, the baseline for every method to beat: two strategies and a finder.

Li and Talwalkar, "Random Search and Reproducibility for Neural Architecture Search"
(UAI 2019, arXiv 1902.07638), with the single-path uniform sampling of SPOS (Guo et al.,
arXiv 1904.00420).

``RandomSearch``, best of n according to the super-net:

1. Shared weights: each step draws a ~ uniform(space) and updates the weights that a
   uses.
2. Proposals: architectures drawn uniformly, by rejection, from those within the
   target's tolerance and the limits.
3. Selection: the best by recalibrated held-out accuracy (the search stage does this for
   every strategy).

``RandomStandalone``, best of n by training each network by itself, at the same total
cost:

1. Draw n architectures uniformly from those within the budget; each has its own
   weights.
2. Step t of T updates network t mod n, at the learning rate that the schedule has at
   step t: so each network goes through the full schedule in T / n updates.
3. The best by held-out accuracy.

``RandomFinder``: best of n random architectures within the budget, according to any
trained super-net.

*Differences from the papers*: sampling is uniform over architectures, whereas TuNAS's
baseline is uniform over decisions (a slot is skipped with probability 1/7 here and 1/2
there). As in TuNAS's baseline (83 to 85 ms around 84), architectures outside the
latency budget are rejected for proposals but not during training. The number of
training runs is ours. So is the number of architectures of the finder, which is how
many SPOS's evolution evaluates.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.errors import ConfigError, TargetError
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import one_hot, sample_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy


class RandomConfig(Section):
    """Random search has no options."""


class RandomSearch(Strategy):
    """Random search by a super-net: uniform paths during training, then uniform
    architectures within the budget.
    """

    Config: ClassVar[type[BaseModel]] = RandomConfig
    supports_cells = True

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def setup(self, ctx: SearchContext) -> None:
        """Nothing to prepare."""

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the weights of a uniformly drawn architecture."""
        picks = ctx.space.sample(ctx.rng)
        return {
            **ctx.train(one_hot(picks, ctx.space)),
            ctx.cost_model.unit.quantity: ctx.cost_model.cost(picks),
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` random architectures within the budget, in random order."""
        return sample_feasible(ctx, count, ctx.rng)


class RandomStandaloneConfig(Section):
    """The number of networks that share the steps."""

    trainings: int = Field(
        8,
        ge=1,
        le=1_000_000,
        description="standalone networks; each gets (search steps / trainings) updates",
    )


class RandomStandalone(Strategy):
    """Random architectures within the budget, each trained by itself. ``setup`` draws
    them from ``ctx.rng`` into ``standalone``.

    If random sampling finds fewer architectures within the budget than requested, these
    share the steps; if it finds none, ``setup`` raises TargetError.
    """

    Config: ClassVar[type[BaseModel]] = RandomStandaloneConfig
    supports_cells = True
    shares_weights = False

    def __init__(self, config: RandomStandaloneConfig) -> None:
        self.config = config
        self.standalone: list[Picks] = []

    def setup(self, ctx: SearchContext) -> None:
        """Draw the architectures. Raises TargetError if none is found within the
        budget, ConfigError if there are more architectures than steps.
        """
        self.standalone = sample_feasible(ctx, self.config.trainings, ctx.rng)
        if not self.standalone:
            raise TargetError(
                f"found no architecture of space {ctx.space.name} within {ctx.tolerance:.2g} of"
                f" {ctx.cost_model.unit.shown(ctx.target)} to train: raise search.tolerance or a"
                " limit."
            )
        if ctx.steps < len(self.standalone):
            raise ConfigError(
                f"{len(self.standalone)} training runs share {ctx.steps} steps, so some get none:"
                " lower"
                " trainings or raise search.epochs."
            )

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the network whose turn it is."""
        picks = self.standalone[ctx.step % len(self.standalone)]
        return {
            **ctx.train(one_hot(picks, ctx.space)),
            ctx.cost_model.unit.quantity: ctx.cost_model.cost(picks),
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The trained architectures, best reward first."""
        return _best_of(ctx, self.standalone, count, "evaluating standalone networks")

    def state_dict(self) -> dict[str, Any]:
        """The drawn architectures."""
        return {"standalone": [dict(picks) for picks in self.standalone]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        # checkpoints of the previous release have the old key
        standalone = state["alone"] if "alone" in state else state["standalone"]
        self.standalone = [dict(picks) for picks in standalone]


class RandomFinderConfig(Section):
    """The number of architectures to evaluate."""

    architectures: int = Field(
        1000, ge=1, le=1_000_000, description="random architectures to evaluate"
    )


class RandomFinder(Finder):
    """Best of n random architectures within the budget."""

    Config: ClassVar[type[BaseModel]] = RandomFinderConfig

    def __init__(self, config: RandomFinderConfig) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` by reward."""
        candidates = sample_feasible(ctx, self.config.architectures, ctx.rng)
        return _best_of(ctx, candidates, count, "evaluating random architectures")


def _best_of(
    ctx: SearchContext, candidates: list[Picks], count: int, description: str
) -> list[Picks]:
    """The best ``count`` candidates by reward; ``description`` labels the progress."""
    with ctx.progress.task(description, len(candidates)) as task:
        board = Leaderboard(ctx, task)
        for picks in candidates:
            board.evaluate(picks)
    return board.best(count)
