"""The random architectures that the proposals of a search are compared with.

The final ranking passes all held-out images through every proposal. Random
architectures are scored for comparison: those within the budget on the same images, so
that differences from the proposals show; those from the whole space on
``search.evaluation_images``, as they only give a plot its background cloud.

After a short search, this can take as long as the search itself. Unless
``search.random_samples`` sets their number, ranking and scoring cost at most ``SHARE``
of what the search cost, but there are never fewer than ``FEWEST`` random architectures:
fewer would say nothing about chance.

The cost is counted in multiply-accumulates (``cost_counter``) and not timed, so it is
the same on every machine and after every interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hwnas.core.arch import Picks
from hwnas.progress import duration
from hwnas.search.cost_counter import CostCounter
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.search.evaluator import SupernetEvaluator

SHARE = 0.2
"""Ranking and scoring may cost this fraction of the search."""
MOST = 8
"""Most random architectures of each kind if ``search.random_samples`` is not set."""
FEWEST = 4
"""Fewest random architectures of each kind if ``search.random_samples`` is not set."""


@dataclass(frozen=True)
class RandomBaseline:
    """What proposals are compared with: random architectures ``within`` the budget and
    ``anywhere`` in the space, and a ``sentence`` that announces them and their cost.
    """

    within: Sequence[Picks]
    anywhere: Sequence[Picks]
    sentence: str


def choose_random_baseline(
    search: SearchContext, evaluator: SupernetEvaluator, proposals: Sequence[Picks]
) -> RandomBaseline:
    """The random architectures to score together with the proposals of a finished search.

    There are none if no weights are shared: standalone networks say nothing about
    other architectures.
    """
    cost_counter = search.cost_counter
    config = evaluator.config
    assert cost_counter is not None
    spent = cost_counter.cost.macs
    of_all, of_part = image_counts(evaluator)
    ranking = sum(_costs(cost_counter, proposals, of_all))

    most = config.random_samples if config.random_samples is not None else MOST
    within: list[Picks] = []
    anywhere: list[Picks] = []
    if evaluator.supernet.shares:
        # Draw ``most`` first: their costs decide how many are affordable.
        within = sample_feasible(search, most, search.rng)
        anywhere = [search.space.sample(search.rng) for _ in range(most)]
    within_costs = _costs(cost_counter, within, of_all)
    anywhere_costs = _costs(cost_counter, anywhere, of_part)
    count = most
    if config.random_samples is None:
        count = affordable(SHARE * spent - ranking, within_costs, anywhere_costs)

    within = within[:count]
    anywhere = anywhere[:count]
    total = ranking + sum(within_costs[:count]) + sum(anywhere_costs[:count])
    counts = (len(proposals), len(within), len(anywhere))
    return RandomBaseline(
        within, anywhere, _sentence(search, evaluator, counts, total / max(spent, 1))
    )


def image_counts(evaluator: SupernetEvaluator) -> tuple[int, int]:
    """How many images pass through a network that is evaluated on all held-out images,
    and through one that is evaluated on ``search.evaluation_images`` of them, BN
    recalibration included.
    """
    recalibration = evaluator.config.recalibration_images
    held_out = len(evaluator.held_out)
    evaluation = min(held_out, evaluator.config.evaluation_images)
    return recalibration + held_out, recalibration + evaluation


def affordable(budget: float, within: Sequence[float], anywhere: Sequence[float]) -> int:
    """How many pairs of random architectures, one of each kind, cost at most ``budget``,
    given the costs of each; at least ``FEWEST``.
    """
    pair_costs = np.zeros(max(len(within), len(anywhere)))
    for costs in (within, anywhere):
        pair_costs[: len(costs)] += costs
    return max(FEWEST, int(np.searchsorted(np.cumsum(pair_costs), budget, side="right")))


def _costs(cost_counter: CostCounter, architectures: Sequence[Picks], images: int) -> list[float]:
    return [cost_counter.evaluation_macs(picks, images) for picks in architectures]


def _sentence(
    search: SearchContext, evaluator: SupernetEvaluator, counts: tuple[int, int, int], share: float
) -> str:
    proposals, within, anywhere = counts
    images = len(evaluator.held_out)
    part = min(images, evaluator.config.evaluation_images)
    sentence = f"ranking {proposals} proposals"
    if within:
        sentence += f" and scoring {within} random architectures in the budget"
    sentence += f" on {images:,} held-out images each"
    if anywhere:
        sentence += f", and {anywhere} from the whole space on {part:,} images"
    sentence += ": "
    if search.seconds:
        sentence += f"about {duration(share * search.seconds)}, "
    return f"{sentence}{share:.0%} of the search's cost"
