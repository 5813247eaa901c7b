"""Random search: the baseline that every method has to beat.

Li and Talwalkar, "Random Search and Reproducibility for Neural Architecture Search" (UAI 2019, arXiv 1902.07638), with the
single-path uniform sampling of SPOS (Guo et al., arXiv 1904.00420):

1. weights:  per step, a ~ uniform(space); one update of the weights that a uses;
2. proposal: architectures uniform among those within the target's tolerance, by rejection;
3. choice:   the best by recalibrated held-out accuracy (the search stage does this for every strategy).

*Differences from the papers*: sampling is uniform over architectures, where TuNAS's baseline is uniform over decisions (a slot is
skipped with probability 1/7 here and 1/2 there); architectures outside the latency budget are rejected when proposing, not when
training, as in TuNAS's baseline (83 to 85 ms around 84).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from hwnas.core.arch import Picks
from hwnas.search.strategy import Metrics, SearchContext, one_hot, random_within


class RandomConfig(BaseModel):
    """Random search has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RandomSearch:
    """Uniform sampling of paths while training, and of architectures within the budget in the end."""

    Config: ClassVar[type[BaseModel]] = RandomConfig

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def setup(self, ctx: SearchContext) -> None:
        """Nothing to prepare."""

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the weights of a uniformly drawn architecture."""
        picks = ctx.space.sample(ctx.rng)
        return {**ctx.train(one_hot(picks, ctx.space)), "latency_ms": ctx.cost.latency_ms(picks)}

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """``count`` random architectures within the tolerance of the target, in random order."""
        return random_within(ctx, count, ctx.rng)

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state."""
