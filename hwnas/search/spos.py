"""SPOS: single paths, sampled uniformly, train the super-net; evolution finds the architecture.

Guo, Zhang, Mu, Heng, Liu, Wei, Sun: "Single Path One-Shot Neural Architecture Search
with Uniform Sampling" (ECCV 2020, arXiv 1904.00420); released code
megvii-model/SinglePathOneShot. Per step, with Gamma the uniform distribution over the
space (eq. 8):

    a ~ Gamma;  one update of the weights that a uses on a training batch

then ``Evolution`` (algorithm 1) by the accuracy of the recalibrated network.

``sampling`` is the path-sampling heuristic of Yu, Ranftl, Salzmann: "How to Train Your
Super-Net" (arXiv 2003.04276):

- ``architectures``: uniform over the options of every choice (SPOS);
- ``decisions``: uniform over the separate decisions of a choice (``factorise``). Where
  a slot can be skipped, skip or not comes first: half of the time, whatever the number
  of blocks (TuNAS's uniform policy). Elsewhere it is the same as ``architectures``;
- ``fair``: FairNAS's strict fairness, one path a step: every choice goes through a
  random permutation of its options, one option a step, then through a new one. In any n
  steps from a multiple of n on, each option of a choice with n options trains exactly
  once.

``within_budget`` is SPOS's constrained uniform sampling: paths with a latency above
``within_budget`` x target are rejected. Where none of 256 is below, the fastest of them
trains.

*Differences from the paper*:

- The constraint while training is the target's latency, not FLOPs; the other limits
  count when proposing only.
- ``within_budget`` is off by default. Weights then serve any later budget.
- ``fair`` keeps the permutations of different choices independent, whatever their lengths.
- BN's affine parameters, dropout and label smoothing are the super-net's and the
  optimiser's, set there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from hwnas.core.arch import Picks
from hwnas.core.option import SKIP
from hwnas.core.space import SearchSpace
from hwnas.search.evolution import Evolution, EvolutionConfig
from hwnas.search.proposal import one_hot, policy_index
from hwnas.search.strategy import Metrics, SearchContext, Strategy

TRIES = 256
"""Paths drawn at once where the budget may reject them (ours)."""


class SPOSConfig(EvolutionConfig):
    """How paths are sampled, and the settings of the evolution."""

    sampling: Literal["architectures", "decisions", "fair"] = "architectures"
    within_budget: float | None = Field(
        None, gt=0, description="train only paths up to this multiple of the target"
    )

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.sampling == "fair" and self.within_budget is not None:
            raise ValueError(
                "sampling = 'fair' trains every option equally often, so nothing can be rejected:"
                " remove within_budget"
            )
        return self


def sampling_policy(
    space: SearchSpace, sampling: Literal["architectures", "decisions"]
) -> dict[str, np.ndarray]:
    """Probabilities of the options of every choice, uniform over architectures or over
    decisions: choice key -> float64 [options].

    Example:
        >>> from hwnas.testing import tiny_space
        >>> sampling_policy(tiny_space(), "decisions")["s1.b1"].tolist()
        [0.125, 0.125, 0.125, 0.125, 0.5]
    """
    policy = {}
    for choice in space.choices:
        is_skip = np.array([option == SKIP for option in choice.options])
        if sampling == "decisions" and is_skip.any():
            policy[choice.key] = np.where(is_skip, 0.5, 0.5 / (len(is_skip) - 1))
        else:
            policy[choice.key] = np.full(len(is_skip), 1 / len(is_skip))
    return policy


class SPOS(Strategy):
    """Uniform single paths, then evolution."""

    Config: ClassVar[type[BaseModel]] = SPOSConfig
    cells = True

    def __init__(self, config: SPOSConfig) -> None:
        self.config = config
        self.left: dict[str, list[int]] = {}
        """Of fair sampling: the options of every choice that its present permutation
        has still to train, in order.
        """

    def setup(self, ctx: SearchContext) -> None:
        """No permutation is begun."""
        self.left = {choice.key: [] for choice in ctx.space.choices}

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the weights of one path."""
        picks = ctx.space.at(
            self._fair(ctx) if self.config.sampling == "fair" else self._uniform(ctx)
        )
        return {
            **ctx.train(one_hot(picks, ctx.space)),
            ctx.cost_model.unit.quantity: ctx.cost_model.cost(picks),
        }

    def _uniform(self, ctx: SearchContext) -> np.ndarray:
        assert self.config.sampling != "fair"
        policy, bound = sampling_policy(ctx.space, self.config.sampling), self.config.within_budget
        drawn_NC = policy_index(ctx.space, policy, 1 if bound is None else TRIES, ctx.rng)
        if bound is None:
            first: np.ndarray = drawn_NC[0]
            return first
        latency_N = ctx.cost_model.costs(drawn_NC)
        inside_N = latency_N <= bound * ctx.target
        chosen: np.ndarray = drawn_NC[
            int(inside_N.argmax()) if inside_N.any() else int(latency_N.argmin())
        ]
        return chosen

    def _fair(self, ctx: SearchContext) -> np.ndarray:
        for choice in ctx.space.choices:
            if not self.left[choice.key]:
                self.left[choice.key] = [int(i) for i in ctx.rng.permutation(len(choice.options))]
        return np.array([self.left[choice.key].pop(0) for choice in ctx.space.choices])

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best of an evolution."""
        return Evolution(self.config).find(ctx, count)

    def state_dict(self) -> dict[str, Any]:
        """The permutations under way."""
        return {"left": {key: list(positions) for key, positions in self.left.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.left = {key: list(positions) for key, positions in state["left"].items()}
