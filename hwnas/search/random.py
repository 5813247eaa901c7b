"""Random search: the baseline that every method has to beat, of two kinds and as a finder.

Li and Talwalkar, "Random Search and Reproducibility for Neural Architecture Search"
(UAI 2019, arXiv 1902.07638), with the single-path uniform sampling of SPOS (Guo et al.,
arXiv 1904.00420). ``RandomSearch``, best of n by the super-net:

1. weights:  per step, a ~ uniform(space); one update of the weights that a uses;
2. proposal: architectures uniform among those within the target's tolerance and the
   limits, by rejection;
3. choice:   the best by recalibrated held-out accuracy (the search stage does this for every strategy).

``RandomStandalone``, best of n by training each alone, at the same total cost:

1. n architectures uniform among those within the budget, each with weights of its own;
2. step t is an update of network t mod n, at the learning rate of the whole schedule: n
   full schedules of T / n updates;
3. the best by held-out accuracy.

``RandomFinder``: best of n random architectures within the budget, by any trained super-net.

*Differences from the papers*: sampling is uniform over architectures, where TuNAS's
baseline is uniform over decisions (a slot is skipped with probability 1/7 here and 1/2
there); architectures outside the latency budget are rejected when proposing, not when
training, as in TuNAS's baseline (83 to 85 ms around 84). The number of trainings is
ours, and so is that of the finder's architectures: as many as SPOS's evolution evaluates.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.arch import Picks
from hwnas.errors import ConfigError, TargetError
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import one_hot, sample_feasible
from hwnas.search.strategy import Metrics, SearchContext, Strategy


class RandomConfig(BaseModel):
    """Random search has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RandomSearch(Strategy):
    """Uniform sampling of paths while training, and of architectures within the budget
    in the end.
    """

    Config: ClassVar[type[BaseModel]] = RandomConfig
    cells = True

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
        """``count`` random architectures within the tolerance of the target, in random order."""
        return sample_feasible(ctx, count, ctx.rng)


class RandomStandaloneConfig(BaseModel):
    """How many networks share the steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainings: int = Field(
        8,
        ge=1,
        description="stand-alone networks, each of which gets search steps / trainings updates",
    )


class RandomStandalone(Strategy):
    """Random architectures within the budget, each trained alone. ``setup`` draws them
    from ``ctx.rng`` into ``alone``.

    Raises TargetError in ``setup`` where random search finds no architecture within the
    budget. Where it finds fewer than asked for, these share the steps.
    """

    Config: ClassVar[type[BaseModel]] = RandomStandaloneConfig
    cells = True
    shares = False

    def __init__(self, config: RandomStandaloneConfig) -> None:
        self.config = config
        self.alone: list[Picks] = []

    def setup(self, ctx: SearchContext) -> None:
        """Draw the architectures. Raises TargetError where there are none, ConfigError
        where there are more than steps.
        """
        self.alone = sample_feasible(ctx, self.config.trainings, ctx.rng)
        if not self.alone:
            raise TargetError(
                f"no architecture of space {ctx.space.name} within {ctx.tolerance:.2g} of"
                f" {ctx.cost_model.unit.shown(ctx.target)} was found to train: raise search.tolerance or"
                " a limit."
            )
        if ctx.steps < len(self.alone):
            raise ConfigError(
                f"{len(self.alone)} trainings share {ctx.steps} steps, so some get none: lower"
                " trainings or raise search.epochs."
            )

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the network whose turn it is."""
        picks = self.alone[ctx.step % len(self.alone)]
        return {
            **ctx.train(one_hot(picks, ctx.space)),
            ctx.cost_model.unit.quantity: ctx.cost_model.cost(picks),
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The trained architectures, best reward first."""
        return _best_of(ctx, self.alone, count, "evaluating stand-alone networks")

    def state_dict(self) -> dict[str, Any]:
        """The architectures."""
        return {"alone": [dict(picks) for picks in self.alone]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.alone = [dict(picks) for picks in state["alone"]]


class RandomFinderConfig(BaseModel):
    """How many architectures are evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architectures: int = Field(1000, ge=1)


class RandomFinder(Finder):
    """Best of n random architectures within the budget."""

    Config: ClassVar[type[BaseModel]] = RandomFinderConfig

    def __init__(self, config: RandomFinderConfig) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` by reward."""
        return _best_of(
            ctx,
            sample_feasible(ctx, self.config.architectures, ctx.rng),
            count,
            "evaluating random architectures",
        )


def _best_of(
    ctx: SearchContext, candidates: list[Picks], count: int, description: str
) -> list[Picks]:
    with ctx.progress.task(description, len(candidates)) as task:
        board = Leaderboard(ctx, task)
        for picks in candidates:
            board.evaluate(picks)
    return board.best(count)
