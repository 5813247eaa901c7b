"""What a search costs, counted and not timed, so that it is the same on every machine
and after every kill.

    cost = sum over passes of  w * images * MACs executed,    w = 1 forward, w = 3 forward and backward

A backward pass computes two products where the forward computes one, hence 3. Of a
mixture, every option that is executed counts: gates that are not zero, and those
probed. DARTS's second order is four gradients: at the weights, after the virtual step,
and two for the finite difference. An architecture that is evaluated passes its
recalibration images and its evaluation images forward, once.

Not counted: optimiser steps, reading images, and what mixtures compute twice to save
memory (``supernet.remat``). Options that share computations (``sharing =
"collapsed"``), coupled widths that run at once, slots that ``supernet.proxy_depth``
leaves out and pixels that ``supernet.proxy_resolution`` leaves out count as if they did
not, or were not: an upper bound there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace

if TYPE_CHECKING:  # results hold costs, and are read without torch
    from hwnas.nn.shared import Gates, Probes
    from hwnas.search.verbs import Evaluator, Metrics, SharedWeights

FORWARD, GRADIENT = 1, 3
"""What a pass costs in forward passes."""

SECOND_ORDER = 4
"""Gradients of DARTS's second order."""


class SearchCost(BaseModel):
    """The cost of a search in multiply-accumulates; see the module. ``training_images``
    count once per path that they went through.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int
    training_images: int
    evaluated: int


class CostCounter:
    """The counts of a search of ``space``, and what its passes cost. ``CountedWeights``
    and ``CountedEvaluator`` keep them.

    ``proxies`` are the spaces whose MACs they have: smaller ones where the super-net is
    a proxy, several where it grows (``grow``). ``evaluation_images`` are passed forward to
    evaluator an architecture.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> cost_counter = CostCounter(tiny_space(), [tiny_space()], batch_size=64, evaluation_images=1000)
        >>> cost_counter.count_evaluation(tiny_space().sample(np.random.default_rng(0)))
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
        self._additive_cost = self._proxies[-1]
        self.batch_size, self.teacher_macs = batch_size, 0
        self._space, self._judged_images = space, evaluation_images
        self._macs = self._images = self._evaluated = 0
        self._known: set[str] = set()

    @property
    def cost(self) -> SearchCost:
        """All so far."""
        return SearchCost(macs=self._macs, training_images=self._images, evaluated=self._evaluated)

    def grow(self, number: int) -> None:
        """From now on the super-net of this number is used."""
        self._additive_cost = self._proxies[number]

    def count(self, macs: int, *, training_images: int = 0) -> None:
        """Add to the counts."""
        self._macs += macs
        self._images += training_images

    def forget(self) -> None:
        """The weights have changed: what was evaluated is evaluated anew."""
        self._known.clear()

    def macs(self, picks: Picks) -> int:
        """MACs of an image through an architecture."""
        return round(float(self._additive_cost.costs(self._space.index(picks)[None])[0]))

    def executed_macs(self, gates: Gates, probes: Probes | None = None) -> int:
        """MACs of an image under gates, which may be numpy's or torch's."""
        runs = {
            key: np.array([float(value) != 0 for value in gate], dtype=float)
            for key, gate in gates.items()
        }
        for key, options in (probes or {}).items():
            runs[key][list(options)] = 1.0
        return round(float(self._additive_cost.expected(runs)))

    def count_evaluation(self, picks: Picks, images: int | None = None) -> None:
        """An architecture is evaluated: on ``images`` where they are given, else by
        ``ctx.evaluate``, which remembers what it has evaluated.
        """
        identity = self._space.decode(picks).identity
        if images is None and identity in self._known:
            return
        self._known.add(identity)
        self._evaluated += 1
        self._macs += self.evaluation_macs(picks, self._judged_images if images is None else images)

    def evaluation_macs(self, picks: Picks, images: int) -> int:
        """MACs of evaluating an architecture on so many images; nothing is counted."""
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
        """Restore them."""
        self._macs, self._images, self.teacher_macs = (
            state[key] for key in ("macs", "images", "teacher")
        )
        # called "judged" in checkpoints from before the counts had today's names
        self._evaluated = state["evaluated"] if "evaluated" in state else state["judged"]


class CountedWeights:
    """The shared weights of a search: what they are asked for is counted, and passed on."""

    def __init__(self, weights: SharedWeights, cost_counter: CostCounter) -> None:
        self.weights, self.cost_counter = weights, cost_counter

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """An update of the weights: each of the gates on the whole batch, or on its part of it."""
        batch_size = self.cost_counter.batch_size
        shares = [batch_size] * len(gates)
        if split:
            shares = [len(part) for part in np.array_split(np.arange(batch_size), len(gates))]
        macs = sum(
            GRADIENT * images * self.cost_counter.executed_macs(each)
            for each, images in zip(gates, shares, strict=True)
        )
        if teach:
            macs += FORWARD * sum(shares) * self.cost_counter.teacher_macs
        self.cost_counter.forget()
        self.cost_counter.count(macs, training_images=sum(shares))
        return self.weights.train(gates, split=split, teach=teach, skip_dropout=skip_dropout)

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Held-out images in equal parts through each of the gates."""
        images = self.cost_counter.batch_size * multiple
        self.cost_counter.count(
            sum(FORWARD * images * self.cost_counter.executed_macs(each) for each in gates)
            // len(gates)
        )
        return self.weights.qualities(gates, multiple)

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The derivative of the held-out loss by the gates."""
        gradients = SECOND_ORDER if order == 2 else 1
        self.cost_counter.count(
            gradients
            * GRADIENT
            * self.cost_counter.batch_size
            * self.cost_counter.executed_macs(gates, probes)
        )
        return self.weights.gate_gradients(gates, probes, order, skip_dropout)

    def remember_teacher(self, picks: Picks) -> None:
        """From now on this architecture teaches."""
        self.cost_counter.teacher_macs = self.cost_counter.macs(picks)
        self.weights.remember_teacher(picks)

    def grow(self, number: int) -> None:
        """From now on the super-net of this number is used."""
        self.cost_counter.grow(number)
        self.weights.grow(number)


class CountedEvaluator:
    """What evaluates architectures, counted: each one once, as it remembers what it has evaluated."""

    def __init__(self, evaluator: Evaluator, cost_counter: CostCounter) -> None:
        self.evaluator, self.cost_counter = evaluator, cost_counter

    def evaluate(self, picks: Picks) -> float:
        """An architecture is evaluated."""
        self.cost_counter.count_evaluation(picks)
        return self.evaluator.evaluate(picks)
