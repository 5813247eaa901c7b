"""The cost of a search, counted and not timed, so that it is the same on every machine
and after every interruption.

    cost = sum over passes of w * images * executed MACs
    w = 1 for a forward pass, 3 for forward and backward

A backward pass computes two products for each one of the forward pass, hence 3. In a
mixture, every executed option counts: those whose gate is not zero, and those that are
probed. DARTS's second order takes four gradients: one at the weights, one after the
virtual step, and two for the finite difference. An evaluation passes the recalibration
images and the evaluation images forward through the architecture, once.

Optimiser steps, reading images, and what mixtures compute twice to save memory
(``supernet.remat``) are not counted. The count is an upper bound in some cases: options
that share computations (``sharing = "collapsed"``) and coupled widths that run at once
count separately, and slots or pixels that ``supernet.proxy_depth`` or
``supernet.proxy_resolution`` leave out are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.core.gates import Gates, Probes
from hwnas.core.space import SearchSpace
from hwnas.search.verbs import Evaluator, Metrics, SharedWeights

FORWARD = 1
"""Cost of a forward pass: the unit of costs."""

GRADIENT = 3
"""Cost of a gradient (forward and backward), in forward passes."""

SECOND_ORDER = 4
"""Number of gradients in DARTS's second order."""


class SearchCost(BaseModel):
    """The cost of a search.

    ``macs`` are the multiply-accumulates that the module's docstring defines,
    ``training_images`` the images of all updates, once for every path that they went
    through, and ``evaluated`` the number of evaluated architectures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int
    training_images: int
    evaluated: int


class CostCounter:
    """Counts the cost of a search in ``space``; used by ``CountedWeights`` and
    ``CountedEvaluator``.

    ``proxies`` are the spaces that the super-nets are actually built for, whose MACs
    are counted: smaller ones if the super-net is a proxy, several if it grows
    (``grow``).
    ``evaluation_images`` is the number of images that pass through an architecture to
    evaluate it, BN recalibration included.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> space = tiny_space()
        >>> cost_counter = CostCounter(space, [space], batch_size=64, evaluation_images=1000)
        >>> cost_counter.count_evaluation(space.sample(np.random.default_rng(0)))
        >>> cost_counter.cost.evaluated
        1
    """

    def __init__(
        self,
        space: SearchSpace,
        proxies: Sequence[SearchSpace],
        batch_size: int,
        evaluation_images: int,
    ) -> None:
        self._proxies = [AdditiveCost.of_ops(proxy, lambda op: op.macs) for proxy in proxies]
        # Finders work on the last super-net, and never call ``grow``.
        self._additive_cost = self._proxies[-1]
        self.batch_size = batch_size
        self.teacher_macs = 0
        self._space = space
        self._evaluation_images = evaluation_images
        self._macs = 0
        self._images = 0
        self._evaluated = 0
        self._known: set[str] = set()

    @property
    def cost(self) -> SearchCost:
        """The cost so far."""
        return SearchCost(macs=self._macs, training_images=self._images, evaluated=self._evaluated)

    def grow(self, number: int) -> None:
        """Count the MACs of super-net ``number`` from now on."""
        self._additive_cost = self._proxies[number]

    def count(self, macs: int, *, training_images: int = 0) -> None:
        """Add to the counts."""
        self._macs += macs
        self._images += training_images

    def forget(self) -> None:
        """The weights have changed: every evaluation counts again."""
        self._known.clear()

    def macs(self, picks: Picks) -> int:
        """MACs of one image through an architecture."""
        return round(float(self._additive_cost.costs(self._space.index(picks)[None])[0]))

    def executed_macs(self, gates: Gates, probes: Probes | None = None) -> int:
        """MACs of one image under ``gates``, which may be NumPy arrays or tensors."""
        executed = {}
        for key, gate in gates.items():
            executed[key] = np.array([float(value) != 0 for value in gate], dtype=float)
        for key, options in (probes or {}).items():
            executed[key][list(options)] = 1.0
        # With 0 and 1 for probabilities, the expectation is the sum over executed options.
        return round(float(self._additive_cost.expected(executed)))

    def count_evaluation(self, picks: Picks, images: int | None = None) -> None:
        """Count the evaluation of an architecture.

        By default it is one by ``ctx.evaluate``, which costs nothing the second time;
        an evaluation on a given number of ``images`` always counts.
        """
        identity = self._space.decode(picks).identity
        if images is None and identity in self._known:
            return
        self._known.add(identity)
        self._evaluated += 1
        if images is None:
            images = self._evaluation_images
        self._macs += self.evaluation_macs(picks, images)

    def evaluation_macs(self, picks: Picks, images: int) -> int:
        """MACs of evaluating an architecture on ``images`` images; counts nothing."""
        return FORWARD * images * self.macs(picks)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {
            "macs": self._macs,
            "images": self._images,
            "evaluated": self._evaluated,
            "teacher": self.teacher_macs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self._macs = state["macs"]
        self._images = state["images"]
        self.teacher_macs = state["teacher"]
        # Older checkpoints call this count "judged".
        self._evaluated = state["evaluated"] if "evaluated" in state else state["judged"]


class CountedWeights:
    """Shared weights that count the cost of every call and pass it on to ``weights``."""

    def __init__(self, weights: SharedWeights, cost_counter: CostCounter) -> None:
        self.weights = weights
        self.cost_counter = cost_counter

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """Count an update: each of ``gates`` on the whole batch or, with ``split``, on
        its part of it.
        """
        batch_size = self.cost_counter.batch_size
        images = [batch_size] * len(gates)
        if split:
            images = [len(part) for part in np.array_split(np.arange(batch_size), len(gates))]
        macs = 0
        for part_gates, count in zip(gates, images, strict=True):
            macs += GRADIENT * count * self.cost_counter.executed_macs(part_gates)
        if teach:
            macs += FORWARD * sum(images) * self.cost_counter.teacher_macs
        self.cost_counter.forget()
        self.cost_counter.count(macs, training_images=sum(images))
        return self.weights.train(gates, split=split, teach=teach, skip_dropout=skip_dropout)

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Count held-out images that pass through each of ``gates`` in equal parts."""
        images = self.cost_counter.batch_size * multiple
        macs = sum(self.cost_counter.executed_macs(part_gates) for part_gates in gates)
        self.cost_counter.count(FORWARD * images * macs // len(gates))
        return self.weights.qualities(gates, multiple)

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Count the derivative of the held-out loss by the gates."""
        gradients = SECOND_ORDER if order == 2 else 1
        images = gradients * self.cost_counter.batch_size
        macs = self.cost_counter.executed_macs(gates, probes)
        self.cost_counter.count(GRADIENT * images * macs)
        return self.weights.gate_gradients(gates, probes, order, skip_dropout)

    def remember_teacher(self, picks: Picks) -> None:
        """Count the forward passes of this teacher from now on."""
        self.cost_counter.teacher_macs = self.cost_counter.macs(picks)
        self.weights.remember_teacher(picks)

    def grow(self, number: int) -> None:
        """Count the MACs of super-net ``number`` from now on."""
        self.cost_counter.grow(number)
        self.weights.grow(number)


class CountedEvaluator:
    """An evaluator that counts its evaluations, each architecture once, because
    ``evaluator`` caches its results.
    """

    def __init__(self, evaluator: Evaluator, cost_counter: CostCounter) -> None:
        self.evaluator = evaluator
        self.cost_counter = cost_counter

    def evaluate(self, picks: Picks) -> float:
        """Count and return the evaluation of an architecture."""
        self.cost_counter.count_evaluation(picks)
        return self.evaluator.evaluate(picks)
