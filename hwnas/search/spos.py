"""SPOS: uniform single paths train the super-net; evolution finds the architecture.

Guo, Zhang, Mu, Heng, Liu, Wei, Sun: "Single Path One-Shot Neural Architecture Search
with Uniform Sampling" (ECCV 2020, arXiv 1904.00420); released code
megvii-model/SinglePathOneShot. Each step, with Gamma the uniform distribution over the
space (equation 8):

    a ~ Gamma;  one update, on a training batch, of the shared weights that a uses

Then ``Evolution`` (algorithm 1) searches for the architecture with the best accuracy of
the recalibrated network.

``sampling`` is the path-sampling heuristic of Yu, Ranftl, Salzmann: "How to Train Your
Super-Net" (arXiv 2003.04276):

- ``architectures``: uniform over the options of every choice (SPOS).
- ``decisions``: uniform over the separate decisions of a choice (``factorise``). If a
  slot can be skipped, the first decision is whether to skip it: half of the time,
  whatever the number of blocks (TuNAS's uniform policy). Otherwise this is the same as
  ``architectures``.
- ``fair``: FairNAS's strict fairness with one path per step: every choice goes through
  a random permutation of its options, one option per step, then through a new
  permutation. In n steps that start at a multiple of n, each option of a choice with n
  options is trained exactly once.

``within_budget`` is SPOS's constrained uniform sampling: paths with a latency above
``within_budget`` x target are rejected. If all of 256 paths are rejected, the fastest
of them is trained.

*Differences from the paper*:

- The constraint during training is on the latency, relative to the target, instead of
  FLOPs. The other limits apply only to proposals.
- ``within_budget`` is off by default, so that the weights can serve any later budget.
- ``fair`` keeps the permutations of different choices independent, whatever their
  lengths.
- BN's affine parameters, dropout and label smoothing are options of the super-net and
  of the optimiser.
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
"""Paths drawn per step if the budget may reject some of them (ours)."""


class SPOSConfig(EvolutionConfig):
    """How paths are sampled during training, and the settings of the evolution."""

    sampling: Literal["architectures", "decisions", "fair"] = Field(
        "architectures", description="distribution of the paths that are trained"
    )
    within_budget: float | None = Field(
        None, gt=0, le=1e6, description="train only paths up to this multiple of the target"
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.sampling == "fair" and self.within_budget is not None:
            raise ValueError(
                "sampling = 'fair' trains every option equally often, so no path can be rejected:"
                " remove within_budget"
            )
        return self


def sampling_policy(
    space: SearchSpace, sampling: Literal["architectures", "decisions"]
) -> dict[str, np.ndarray]:
    """The sampling distribution, uniform over architectures or over decisions: choice
    key -> probabilities, float64 [options].

    Example:
        >>> from hwnas.testing import tiny_space
        >>> sampling_policy(tiny_space(), "decisions")["s1.b1"].tolist()
        [0.125, 0.125, 0.125, 0.125, 0.5]
    """
    policy = {}
    for choice in space.choices:
        count = len(choice.options)
        is_skip = np.array([option == SKIP for option in choice.options])
        if sampling == "decisions" and is_skip.any():
            policy[choice.key] = np.where(is_skip, 0.5, 0.5 / (count - 1))
        else:
            policy[choice.key] = np.full(count, 1 / count)
    return policy


class SPOS(Strategy):
    """The SPOS strategy: trains uniform single paths, then runs an evolution."""

    Config: ClassVar[type[BaseModel]] = SPOSConfig
    supports_cells = True

    def __init__(self, config: SPOSConfig) -> None:
        self.config = config
        self.left: dict[str, list[int]] = {}
        """For fair sampling: choice key -> the rest of its present permutation,
        positions of options in the order in which they will be trained.
        """

    def setup(self, ctx: SearchContext) -> None:
        """Start without permutations; the first fair step draws them."""
        self.left = {choice.key: [] for choice in ctx.space.choices}

    def step(self, ctx: SearchContext) -> Metrics:
        """One update of the weights of one path."""
        sample_path = self._fair_path if self.config.sampling == "fair" else self._uniform_path
        picks = ctx.space.at(sample_path(ctx))
        return {
            **ctx.train(one_hot(picks, ctx.space)),
            ctx.cost_model.unit.quantity: ctx.cost_model.cost(picks),
        }

    def _uniform_path(self, ctx: SearchContext) -> np.ndarray:
        """A path drawn from the sampling distribution: option positions [choices]."""
        assert self.config.sampling != "fair"
        policy = sampling_policy(ctx.space, self.config.sampling)
        bound = self.config.within_budget
        if bound is None:
            only_C: np.ndarray = policy_index(ctx.space, policy, 1, ctx.rng)[0]
            return only_C

        drawn_NC = policy_index(ctx.space, policy, TRIES, ctx.rng)
        latency_N = ctx.cost_model.costs(drawn_NC)
        inside_N = latency_N <= bound * ctx.target
        # rejection sampling takes the first path inside
        chosen = inside_N.argmax() if inside_N.any() else latency_N.argmin()
        chosen_C: np.ndarray = drawn_NC[int(chosen)]
        return chosen_C

    def _fair_path(self, ctx: SearchContext) -> np.ndarray:
        """The next option of every choice's permutation: option positions [choices]."""
        path = []
        for choice in ctx.space.choices:
            if not self.left[choice.key]:
                self.left[choice.key] = ctx.rng.permutation(len(choice.options)).tolist()
            path.append(self.left[choice.key].pop(0))
        return np.array(path)

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best architectures of an evolution."""
        return Evolution(self.config).find(ctx, count)

    def state_dict(self) -> dict[str, Any]:
        """The unfinished permutations."""
        return {"left": {key: list(positions) for key, positions in self.left.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        left: dict[str, list[int]] = {}
        for key in self.left:
            left[key] = [int(position) for position in state["left"][key]]
        self.left = left
