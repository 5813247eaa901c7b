"""The interface of a search method.

A strategy decides under which gates the super-net runs, and which architectures to
propose at the end. It never sees optimiser steps of the weights, files, mixed precision
or other processes: the context owns those.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.gates import Gates, Probes
from hwnas.core.limits import Limits
from hwnas.core.objective import AbsoluteObjective, MnasObjective, PenalisedObjective
from hwnas.core.space import SearchSpace
from hwnas.lazy import torch
from hwnas.old_names import accept_old_names
from hwnas.progress import Progress
from hwnas.search.cost_counter import CostCounter
from hwnas.search.verbs import Evaluator, Metrics, SharedWeights

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor

OLD_NAMES = {
    "alone": "standalone",
    "mixes": "mixes_options",
    "shares": "shares_weights",
    "rate": "rate_option",
    "cells": "supports_cells",
    "parts": "microbatches",
}
"""Renamed members of ``Strategy``, old name -> new name."""

__all__ = ["Evaluator", "Gates", "Metrics", "Probes", "SearchContext", "SharedWeights", "Strategy"]


@dataclass
class SearchContext:
    """Everything that a strategy may use.

    ``rng`` is created from (seed, step) for every step, so a strategy resumes exactly
    if it draws from nothing else. ``weights`` is None during ``Strategy.setup``, and
    when a finder works on an already trained super-net. ``evaluator`` is None during
    ``Strategy.setup``. ``cost_counter`` counts what the search has cost. ``seconds`` is
    the search's duration as far as this process knows it; it is shown to people and
    decides nothing.

    ``target`` and the costs that ``reward`` takes are in the unit of ``cost_model``:
    milliseconds, or the unit of a counted budget (MACs, parameters).
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
        """The fraction of the search that is over, 0 to 1."""
        return self.step / max(self.steps, 1)

    def train(
        self, *gates: Gates, split: bool = False, teach: bool = False, skip_dropout: float = 0.0
    ) -> Metrics:
        """One update of the shared weights on the next training batch.

        With several ``gates``, their gradients are summed for a single update. All see
        the same batch (FairNAS) or, with ``split``, each sees its own part of it, and
        the gradient is the mean (TuNAS's accelerator cores). ``teach`` adds the
        distillation loss against the remembered teacher (classifiers only).
        ``skip_dropout`` is the probability of zeroing an element of a skip's output
        (P-DARTS).
        """
        assert self.weights is not None
        return self.weights.train(gates, split=split, teach=teach, skip_dropout=skip_dropout)

    def qualities(self, *gates: Gates, multiple: int = 1) -> list[float]:
        """Qualities in 0..1, one for each of ``gates``.

        A held-out batch of ``multiple`` times the training batch size is split evenly
        among the gates. The quality of a classifier is its accuracy; for detectors, see
        ``hwnas.tasks.detection``.
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
        """Held-out loss under ``gates``, a float64 scalar to differentiate by them.

        Classifiers: the cross-entropy without label smoothing. Only value and gradient
        are exact: the scalar is the first-order expansion value + <gradient, gates -
        their current values>, so the network's graph is freed when this returns.
        ``order = 2`` takes the gradient after a virtual training step (DARTS).
        """
        assert self.weights is not None
        current = {key: gate.detach() for key, gate in gates.items()}
        value, gradients = self.weights.gate_gradients(current, probes or {}, order, skip_dropout)
        total = torch.tensor(value, dtype=torch.float64)
        for key, gradient in gradients.items():
            # The difference is zero; it only carries the gradient to the gates.
            difference = gates[key] - current[key]
            slope = torch.as_tensor(gradient, dtype=gates[key].dtype)
            total = total + (difference * slope).sum()
        return total

    def evaluate(self, picks: Picks) -> float:
        """Held-out quality in 0..1 (``search.quality``) of the extracted network with
        recalibrated BN. Results are cached, so asking twice costs nothing.
        """
        assert self.evaluator is not None
        return self.evaluator.evaluate(picks)

    def remember_teacher(self, picks: Picks) -> None:
        """Copy the current weights of ``picks`` as the teacher of ``train(...,
        teach=True)``.
        """
        assert self.weights is not None
        self.weights.remember_teacher(picks)

    def grow(self, number: int) -> None:
        """Train super-net ``number`` of ``Strategy.growth`` from now on, starting with
        new weights if it is not the current one. Call it in every step.
        """
        assert self.weights is not None
        self.weights.grow(number)

    def reward(self, quality: float, cost: float) -> float:
        """The objective's reward of ``quality`` in 0..1 and ``cost`` at the target."""
        return self.objective.reward(quality, cost, self.target)


class Strategy(ABC):
    """Base class of search methods.

    ``Config`` holds the method's own options, which are the other keys of
    ``search.strategy``, next to ``name``. The class attributes describe the method:

    - ``sharing`` and ``kernels``: how the paper shares weights between a slot's options
      and between kernel sizes; the default for ``search.supernet``.
    - ``mixes_options``: several options of a choice run at once, in a weighted sum.
    - ``shares_weights``: a super-net is trained. If False, ``setup`` puts architectures
      into ``standalone``, and each is trained as a standalone network.
    - ``rate_option``: the name of the option that sets how fast the policy learns, if
      any.
    - ``supports_cells``: the method also runs on spaces of cells.
    """

    Config: ClassVar[type[BaseModel]]
    sharing: ClassVar[Literal["collapsed", "separate"]] = "separate"
    kernels: ClassVar[Literal["own", "ofa", "ofa_transform"]] = "own"
    mixes_options: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = True
    rate_option: ClassVar[str | None] = None
    supports_cells: ClassVar[bool] = False
    standalone: Sequence[Picks] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        accept_old_names(cls, OLD_NAMES)

    def __setattr__(self, name: str, value: Any) -> None:
        # Strategies of the previous release set ``alone`` on themselves in ``setup``.
        if name == "alone":
            warnings.warn(
                f"{type(self).__module__}.{type(self).__qualname__}: 'alone' is now 'standalone';"
                " the old name works until the next release.",
                FutureWarning,
                stacklevel=2,
            )
            self.standalone = value
        super().__setattr__(name, value)

    def check(self, space: SearchSpace) -> None:  # noqa: B027 (most methods run on every space)
        """Raise SpaceError if this method cannot run on ``space``."""

    def growth(self, space: SearchSpace) -> tuple[int, ...]:
        """Numbers of cells per stage of the super-nets that the method trains one after
        another on ``space`` (``ctx.grow``); empty if it trains only one.
        """
        del space
        return ()

    def milestones(self, ctx: SearchContext) -> tuple[int, ...]:
        """The steps at which a new phase begins, whose steps may take a different time.
        The first phase, which begins at step 0, is left out.
        """
        del ctx
        return ()

    def cross_entropies(self, row: Metrics) -> int:
        """How many cross-entropies add up to the logged loss of a step (``row``): one,
        and another one with a teacher.
        """
        del row
        return 1

    def microbatches(self) -> tuple[int, int]:
        """The numbers of microbatches into which a step splits its training batch and
        each held-out batch. Every microbatch needs two images for BN.
        """
        return 1, 1

    @abstractmethod
    def setup(self, ctx: SearchContext) -> None:
        """Called once, before the first step or a restored state; ``ctx.weights`` is
        None.
        """

    @abstractmethod
    def step(self, ctx: SearchContext) -> Metrics:
        """One step: usually one weight update, then one update of the method's own
        parameters.
        """

    @abstractmethod
    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` different architectures within the target's tolerance and the
        limits, best first.
        """

    def state_dict(self) -> dict[str, Any]:
        """The method's own state: tensors, numbers, strings and containers of them."""
        return {}

    # not abstract: some methods have no state
    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore the state."""
