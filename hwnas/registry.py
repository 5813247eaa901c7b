"""Plug-ins by name: strategies, data sets, devices, runtimes.

Built-in plug-ins are registered as ``"module:attribute"`` strings and imported only
when used, so that ``hwnas --help`` stays fast. Third parties add theirs with a Python
entry point in the group ``hwnas.<noun>``::

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
    """The plug-ins of one kind: their names and what they refer to.

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
        # on first use, because reading the metadata of all packages takes a while
        if not self._discovered:
            self._discovered = True
            for point in entry_points(group=f"hwnas.{self.noun}"):
                self.register(point.name, point.value)
        return self._targets

    def register(self, name: str, target: str) -> None:
        """Add a plug-in. Raises ConfigError if the name is already taken, instead of
        silently overwriting it.
        """
        # the same target twice is harmless: a package may be found on two paths
        if self._targets.get(name, target) != target:
            raise ConfigError(
                f"{self.noun} {name!r} is registered twice ({self._targets[name]} and {target}):"
                " rename one."
            )
        self._targets[name] = target

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._discover()))

    def get(self, name: str) -> Any:
        """Import and return the plug-in. Raises ConfigError if the name is unknown,
        naming the nearest known one, or if the plug-in cannot be loaded or lacks
        methods.
        """
        targets = self._discover()
        if name not in targets:
            raise ConfigError(f"unknown {self.noun} {name!r}; {nearest(name, targets)}")
        module, _, attribute = targets[name].partition(":")
        described = f"{self.noun} {name!r} ({targets[name]})"
        try:
            plugin = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{described} cannot be loaded ({error}): reinstall the package that provides it."
            ) from error
        except Exception as error:  # a third party's module may raise anything on import
            raise ConfigError(
                f"{described} cannot be loaded ({type(error).__name__}: {error}): fix it, or remove"
                " the package that provides it."
            ) from error
        # Python itself would complain only on use, perhaps after minutes of profiling
        missing = sorted(getattr(plugin, "__abstractmethods__", ()))
        if missing:
            raise ConfigError(
                f"{described} lacks {', '.join(missing)}: implement what its base class requires."
            )
        return plugin
