"""PyTorch, imported when it is first used.

Importing it takes seconds and more than half a gigabyte. Commands that compute nothing
(``hwnas run --plan -q``, ``hwnas report``) still read what strategies, tasks and stages
declare: settings, names, files. So the modules of these take PyTorch from here, and
import what is made of it (``hwnas.nn``, ``hwnas.engine``) inside the functions that
compute::

    from hwnas.lazy import torch
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]


class LazyModule(ModuleType):
    """A stand-in for the module ``name`` that imports it for the first attribute."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")
