"""The contract of a search method.

A strategy decides which gates the super-net runs under, and which architectures to
propose in the end. It never sees an optimiser step of the weights, a file, mixed
precision or another process: the context owns those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.limits import Limits
from hwnas.core.objective import AbsoluteObjective, MnasObjective, PenalisedObjective
from hwnas.core.space import SearchSpace
from hwnas.nn.supernet import Gates, Probes
from hwnas.progress import Progress
from hwnas.search.cost_counter import CostCounter
from hwnas.search.verbs import Evaluator, Metrics, SharedWeights

__all__ = ["Evaluator", "Gates", "Metrics", "Probes", "SearchContext", "SharedWeights", "Strategy"]


@dataclass
class SearchContext:
    """What a strategy may use.

    ``rng`` is renewed for every step from (seed, step), which makes strategies resume
    exactly as long as they draw from nothing else. ``weights`` are not there yet during
    ``Strategy.setup``, nor where a finder works on an already trained super-net;
    ``evaluator`` is there once weights are trained. ``cost_counter`` holds what all this has
    cost. ``seconds`` is what the search has taken, as far as this process knows: for
    what is said to people, and for nothing that decides.

    ``target`` is in the unit of ``cost_model``, and so are the costs that ``reward`` takes:
    milliseconds, or what is counted.
    """

    space: SearchSpace
    cost_model: CostModel
    objective: AbsoluteObjective | MnasObjective | PenalisedObjective
    target: float
    tolerance: float
    steps: int
    batch_size: int
    weights: SharedWeights | None = None
    evaluator: Evaluator | None = None
    limits: Limits | None = None
    cost_counter: CostCounter | None = None
    step: int = 0
    seconds: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    progress: Progress = field(default_factory=Progress)

    @property
    def fraction(self) -> float:
        """How much of the search is over, 0 to 1."""
        return self.step / max(self.steps, 1)

    def train(
        self, *gates: Gates, split: bool = False, teach: bool = False, skip_dropout: float = 0.0
    ) -> Metrics:
        """One update of the shared weights on the next training batch.

        With several ``gates`` their gradients are added up before the one update: all
        on the same batch (FairNAS), or, with ``split``, each on its own part of it
        (TuNAS's accelerator cores; the mean gradient then). ``teach`` adds the
        distillation loss against the remembered teacher (of classifiers).
        ``skip_dropout`` zeroes elements behind skips (P-DARTS).
        """
        assert self.weights is not None
        return self.weights.train(gates, split=split, teach=teach, skip_dropout=skip_dropout)

    def qualities(self, *gates: Gates, multiple: int = 1) -> list[float]:
        """Qualities in 0..1 on a held-out batch ``multiple`` times the training batch,
        of which each gets an equal part.

        Accuracies of classifiers; of detectors, see ``hwnas.tasks.detection``.
        """
        assert self.weights is not None
        return self.weights.qualities(gates, multiple)

    def loss(
        self,
        gates: Mapping[str, Tensor],
        *,
        probes: Probes | None = None,
        order: int = 1,
        skip_dropout: float = 0.0,
    ) -> Tensor:
        """Held-out loss (a classifier's cross-entropy, no label smoothing) under
        ``gates``: a scalar whose gradient by the gates is right.

        It is the first-order expansion value + <gradient, gates - their present
        values>, so that the graph of the network is gone when this returns. ``order =
        2`` takes the derivative after a virtual training step (DARTS).
        """
        assert self.weights is not None
        present = {key: gate.detach() for key, gate in gates.items()}
        value, gradients = self.weights.gate_gradients(present, probes or {}, order, skip_dropout)
        total = torch.tensor(value, dtype=torch.float64)
        for key, gradient in gradients.items():
            total = (
                total
                + (
                    (gates[key] - present[key]) * torch.as_tensor(gradient, dtype=gates[key].dtype)
                ).sum()
            )
        return total

    def evaluate(self, picks: Picks) -> float:
        """Held-out quality in 0..1 (``search.quality``) of the extracted network, BN
        recalibrated. Kept, so asking twice costs nothing.
        """
        assert self.evaluator is not None
        return self.evaluator.evaluate(picks)

    def remember_teacher(self, picks: Picks) -> None:
        """Keep a copy of the present weights of ``picks`` as the teacher of
        ``train(..., teach=True)``.
        """
        assert self.weights is not None
        self.weights.remember_teacher(picks)

    def grow(self, number: int) -> None:
        """Train super-net ``number`` of ``Strategy.growth`` from here on, which begins
        anew. To be said in every step.
        """
        assert self.weights is not None
        self.weights.grow(number)

    def reward(self, quality: float, cost: float) -> float:
        """The objective at this context's target."""
        return self.objective.reward(quality, cost, self.target)


class Strategy(ABC):
    """A search method. ``Config`` holds its own options (the keys beside ``name`` in
    ``search.strategy``).

    ``sharing`` and ``kernels`` are the paper's way to share weights between a slot's
    options and kernel sizes, used where the configuration leaves it open. ``mixes``
    says that several options of a choice run at once, with weights. A method with
    ``shares = False`` trains architectures each by itself instead of a super-net:
    ``setup`` puts them into ``alone``. ``rate`` names the option that sets how fast the
    policy learns, where there is one. ``cells`` says that the method runs on spaces of
    cells too.
    """

    Config: ClassVar[type[BaseModel]]
    sharing: ClassVar[Literal["collapsed", "separate"]] = "separate"
    kernels: ClassVar[Literal["own", "ofa", "ofa_transform"]] = "own"
    mixes: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    rate: ClassVar[str | None] = None
    cells: ClassVar[bool] = False
    alone: Sequence[Picks] = ()

    def check(self, space: SearchSpace) -> None:  # noqa: B027 (most methods run on every space)
        """Raise SpaceError where this method cannot run on ``space``."""

    def growth(self, space: SearchSpace) -> tuple[int, ...]:
        """Cells of each stage in the super-nets that follow one another on ``space``,
        where the method grows them (``ctx.grow``).
        """
        del space
        return ()

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The steps at which steps begin to be of another kind, and so to take another
        time; the first is always 0, and left out.
        """
        del ctx
        return ()

    def cross_entropies(self, row: Metrics) -> int:
        """How many cross-entropies the loss that a step has logged (its ``row``) is the
        sum of: one, and that with a teacher.
        """
        del row
        return 1

    def parts(self) -> tuple[int, int]:
        """In how many parts a step splits its training batch, and each held-out batch;
        BN needs two images in a part.
        """
        return 1, 1

    @abstractmethod
    def setup(self, ctx: SearchContext) -> None:
        """Called once, before the first step or a restored state. There are no weights yet."""

    @abstractmethod
    def step(self, ctx: SearchContext) -> Metrics:
        """One step: usually one weight update, then one update of the method's own parameters."""

    @abstractmethod
    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` different architectures within the target's tolerance and the
        limits, best first.
        """

    def state_dict(self) -> dict[str, Any]:
        """The method's own state: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (some methods have no state)
        """Restore it."""
