"""The contract of a finder: architectures within the budget, from any trained super-net."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.progress import Task
from hwnas.search.strategy import SearchContext


class Finder(ABC):
    """Finding is separate from training weights: a finder asks ``ctx.evaluate`` for
    qualities and nothing else.

    ``Config`` holds its own options (the keys beside ``name`` in ``search.finder``).
    """

    Config: ClassVar[type[BaseModel]]

    @abstractmethod
    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` different architectures within the target's tolerance and the
        limits, best first.
        """


@dataclass(frozen=True)
class ScoredPicks:
    """What the super-net says of an architecture: recalibrated quality in 0..1, and the
    objective at its cost.
    """

    picks: Picks
    cost: float
    quality: float
    reward: float


class Leaderboard:
    """Every architecture that a finder has evaluated, each once, whatever picks name it.

    Picks that differ only in slots that are left out decode to one architecture. Each
    new scored advances ``task``.
    """

    def __init__(self, ctx: SearchContext, task: Task) -> None:
        self._ctx, self._task = ctx, task
        self._scored: dict[str, ScoredPicks] = {}
        self._best_reward = -float("inf")

    def __len__(self) -> int:
        return len(self._scored)

    def __contains__(self, identity: str) -> bool:
        return identity in self._scored

    def evaluate(self, picks: Picks) -> ScoredPicks:
        """The scored of an architecture, by ``ctx.evaluate`` where it is new."""
        identity = self._ctx.space.decode(picks).identity
        if identity not in self._scored:
            quality, latency = self._ctx.evaluate(picks), self._ctx.cost_model.cost(picks)
            scored = ScoredPicks(picks, latency, quality, self._ctx.reward(quality, latency))
            self._scored[identity] = scored
            self._best_reward = max(self._best_reward, scored.reward)
            self._task.advance(note=f"best reward {self._best_reward:.4f}")
        return self._scored[identity]

    def best(self, count: int) -> list[Picks]:
        """Up to ``count`` architectures, best reward first; of equal ones the first evaluated."""
        ranked = sorted(self._scored.values(), key=lambda scored: -scored.reward)
        return [scored.picks for scored in ranked[:count]]
