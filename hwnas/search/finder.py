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
class Judgement:
    """What the super-net says of an architecture: recalibrated quality in 0..1, and the
    objective at its cost.
    """

    picks: Picks
    cost: float
    quality: float
    reward: float


class Leaderboard:
    """Every architecture that a finder has judged, each once, whatever picks name it.

    Picks that differ only in slots that are left out decode to one architecture. Each
    new judgement advances ``task``.
    """

    def __init__(self, ctx: SearchContext, task: Task) -> None:
        self._ctx, self._task = ctx, task
        self._judged: dict[str, Judgement] = {}
        self._best_reward = -float("inf")

    def __len__(self) -> int:
        return len(self._judged)

    def __contains__(self, identity: str) -> bool:
        return identity in self._judged

    def judge(self, picks: Picks) -> Judgement:
        """The judgement of an architecture, by ``ctx.evaluate`` where it is new."""
        identity = self._ctx.space.decode(picks).identity
        if identity not in self._judged:
            quality, latency = self._ctx.evaluate(picks), self._ctx.cost.of(picks)
            judgement = Judgement(picks, latency, quality, self._ctx.reward(quality, latency))
            self._judged[identity] = judgement
            self._best_reward = max(self._best_reward, judgement.reward)
            self._task.advance(note=f"best reward {self._best_reward:.4f}")
        return self._judged[identity]

    def best(self, count: int) -> list[Picks]:
        """Up to ``count`` architectures, best reward first; of equal ones the first judged."""
        ranked = sorted(self._judged.values(), key=lambda judgement: -judgement.reward)
        return [judgement.picks for judgement in ranked[:count]]
