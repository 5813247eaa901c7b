"""A circumstance in which settings do nothing, and the situation that it is judged in."""

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
VERBS = ("run", *STAGES)


@dataclass(frozen=True)
class Situation:
    """An experiment that a verb is about to be carried out with."""

    experiment: Experiment
    verb: str
    overridden: tuple[str, ...] = ()
    """Keys that the command line gave."""

    def overrides(self, key: str) -> bool:
        """Whether the command line gave a key, a part of it, or the table that it is in."""
        return any(
            f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.")
            for given in self.overridden
        )

    @cached_property
    def strategy(self) -> Any:
        """The strategy's class."""
        return STRATEGIES.get(self.experiment.search.strategy.name)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The files that are exported."""
        return self.experiment.export_formats

    @property
    def has_own_arch(self) -> bool:
        """Whether the architecture is no member of the space: a document, or a
        published network.
        """
        name = self.experiment.train.arch
        return name is not None and (Path(name).suffix == ".json" or is_name(name))

    @cached_property
    def arch_detects(self) -> bool:
        """Whether the architecture that is named has a detector of its own."""
        name = self.experiment.train.arch
        if name is None:
            return False
        if Path(name).suffix == ".json":
            return Architecture.load(resolve_path(Path(name))).task == "detect"
        return has_detector(name)


class Holds(Protocol):
    """When a case is at hand."""

    def __call__(self, situation: Situation) -> bool:
        """Whether it is."""


@dataclass(frozen=True)
class Case:
    """A circumstance in which keys do nothing. ``why`` is half a sentence, formatted
    with the experiment as ``e``.

    ``by`` are the keys that bring it about.
    """

    holds: Holds
    why: str
    by: tuple[str, ...]
    verbs: tuple[str, ...] = VERBS
    fix: str = "remove it"
    file: Level = "refuse"
    overridden: Level = "warn"
    both: Level = "refuse"
