"""Plug-ins by name: strategies, data sets, devices, runtimes.

Built-in plug-ins are registered as ``"module:attribute"`` strings and imported only
when asked for, so that ``hwnas --help`` stays fast. Third parties add theirs with a
Python entry point in the group ``hwnas.<noun>``::

    [project.entry-points."hwnas.strategy"]
    mine = "my_package.strategies:Mine"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from hwnas.document import nearest
from hwnas.errors import ConfigError


class Registry:
    """Names of one kind of plug-in and what they stand for.

    Example:
        >>> strategies = Registry("strategy", {"tunas": "hwnas.search.tunas:TuNAS"})
        >>> list(strategies)
        ['tunas']
    """

    def __init__(self, noun: str, builtin: Mapping[str, str]) -> None:
        self.noun = noun
        self.builtin = tuple(builtin)
        self._targets: dict[str, str] = dict(builtin)
        self._discovered = False

    def _discover(self) -> dict[str, str]:
        if not self._discovered:
            self._discovered = True
            for point in entry_points(group=f"hwnas.{self.noun}"):
                self.register(point.name, point.value)
        return self._targets

    def register(self, name: str, target: str) -> None:
        """Add a plug-in. Raises ConfigError where the name is taken: nothing is
        overwritten in silence.
        """
        if self._targets.get(name, target) != target:
            raise ConfigError(
                f"{self.noun} {name!r} is registered twice ({self._targets[name]} and {target}):"
                " rename one."
            )
        self._targets[name] = target

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._discover()))

    def get(self, name: str) -> Any:
        """Import and return the plug-in. Raises ConfigError with the nearest known name,
        or where it cannot be loaded or lacks methods.
        """
        targets = self._discover()
        if name not in targets:
            raise ConfigError(f"unknown {self.noun} {name!r}; {nearest(name, targets)}")
        module, _, attribute = targets[name].partition(":")
        called = f"{self.noun} {name!r} ({targets[name]})"
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{called} cannot be loaded ({error}): reinstall the package it is from."
            ) from error
        except Exception as error:  # whatever somebody else's module raises while it is imported
            raise ConfigError(
                f"{called} cannot be loaded ({type(error).__name__}: {error}): mend it, or remove"
                " the package it is from."
            ) from error
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise ConfigError(f"{called} lacks {', '.join(missing)}: add what its base asks for.")
        return found
