"""The interface of finders, which search any trained super-net within the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.progress import ProgressBar
from hwnas.search.strategy import SearchContext


class Finder(ABC):
    """Searches a trained super-net for the best architectures within the budget.

    Finding is separate from training: all that a finder knows of the weights are the
    qualities from ``ctx.evaluate``. ``Config`` holds the finder's own options (the keys
    next to ``name`` in ``search.finder``).
    """

    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` different architectures within the target's tolerance and the
        limits, best first.
        """


@dataclass(frozen=True)
class ScoredPicks:
    """An architecture with its cost, its recalibrated quality in 0..1 according to the
    super-net, and its reward (the objective).
    """

    picks: Picks
    cost: float
    quality: float
    reward: float


class Leaderboard:
    """All architectures that a finder has evaluated, each once.

    Picks that differ only in left-out slots decode to the same architecture. Every
    newly evaluated architecture advances ``task``.
    """

    def __init__(self, ctx: SearchContext, task: ProgressBar) -> None:
        self._ctx = ctx
        self._task = task
        self._scored: dict[str, ScoredPicks] = {}
        self._best_reward = -float("inf")

    def __len__(self) -> int:
        return len(self._scored)

    def __contains__(self, identity: str) -> bool:
        return identity in self._scored

    def evaluate(self, picks: Picks) -> ScoredPicks:
        """The score of an architecture, from ``ctx.evaluate`` if it is new."""
        identity = self._ctx.space.decode(picks).identity
        if identity not in self._scored:
            quality = self._ctx.evaluate(picks)
            cost = self._ctx.cost_model.cost(picks)
            scored = ScoredPicks(picks, cost, quality, self._ctx.reward(quality, cost))
            self._scored[identity] = scored
            self._best_reward = max(self._best_reward, scored.reward)
            self._task.advance(note=f"best reward {self._best_reward:.4f}")
        return self._scored[identity]

    def best(self, count: int) -> list[Picks]:
        """Up to ``count`` architectures, best reward first, equal ones as evaluated."""
        ranked = sorted(self._scored.values(), key=lambda scored: -scored.reward)
        return [scored.picks for scored in ranked[:count]]
