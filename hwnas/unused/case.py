"""A case in which settings have no effect, and the situation that it is checked in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from hwnas.config import Experiment, resolve_path
from hwnas.core.arch import Architecture
from hwnas.core.published import has_detector, is_name
from hwnas.search import STRATEGIES
from hwnas.stages import STAGES

Level = Literal["refuse", "warn", "quiet"]

STUDIES = ("study rank", "study compare", "study shrink")
"""The commands that run studies."""

VERBS = ("run", *STAGES)
"""The commands that run stages."""


@dataclass(frozen=True)
class Situation:
    """An experiment and the command that is about to run it."""

    experiment: Experiment
    verb: str
    overridden: tuple[str, ...] = ()
    """Keys that were given on the command line."""

    def overrides(self, key: str) -> bool:
        """Whether the command line gave a key, a part of it, or a table that contains
        it.
        """
        return any(
            f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.")
            for given in self.overridden
        )

    @cached_property
    def strategy(self) -> Any:
        """The class of the search strategy."""
        return STRATEGIES.get(self.experiment.search.strategy.name)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats that are exported."""
        return self.experiment.export_formats

    @property
    def has_own_arch(self) -> bool:
        """Whether the named architecture is not one of the space: a document or a
        published network.
        """
        name = self.experiment.train.arch
        return name is not None and (Path(name).suffix == ".json" or is_name(name))

    @cached_property
    def arch_detects(self) -> bool:
        """Whether the named architecture has its own detector."""
        name = self.experiment.train.arch
        if name is None:
            return False
        if Path(name).suffix == ".json":
            return Architecture.load(resolve_path(Path(name))).task == "detect"
        return has_detector(name)


class Holds(Protocol):
    """The condition of a case."""

    def __call__(self, situation: Situation) -> bool:
        """Whether the case applies to a situation."""


@dataclass(frozen=True)
class Case:
    """A case in which keys have no effect.

    ``why`` is the reason, a clause that is formatted with the experiment as ``e``;
    ``by`` are the keys that cause it; ``verbs`` are the commands that it concerns.
    ``fix`` tells the user what to do. ``file``, ``overridden`` and ``both`` say what
    happens, by where key and reason were given; see the docstring of the package.
    """

    holds: Holds
    why: str
    by: tuple[str, ...]
    verbs: tuple[str, ...] = VERBS
    fix: str = "remove it"
    file: Level = "refuse"
    overridden: Level = "warn"
    both: Level = "refuse"
