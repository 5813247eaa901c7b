"""What a runtime and number format to export to is: a ``Target``, found by its name as a plug-in.

A target of your own is one class and one entry point; it is then exported to
(``export.formats``), profiled (``device.runtime`` and ``device.dtype``), timed and
validated like the built-in ones::

    [project.entry-points."hwnas.target"]
    mine-fp16 = "my_package.target:Mine"

``hwnas.testing.TargetConformance`` says what must hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import numpy as np

from hwnas.config.formats import TARGETS
from hwnas.core.detector import PostProcessing
from hwnas.errors import ConfigError, ExportError
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.nn.network import Network

Graph = Literal["decoded", "nms", "tasks"]
"""What a detector's file has in its graph; ``post_processing`` says what they are."""


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, and what its files are made from.

    ``calibration_NHWC`` are float32 images as the network sees them, ``interface`` says
    what goes around the network, ``card`` what belongs into metadata,
    ``post_processing`` what a detector's graph chooses by.
    """

    network: Network
    interface: Interface
    calibration_NHWC: np.ndarray
    card: ModelCard
    post_processing: PostProcessing = field(default_factory=PostProcessing)
    _made: dict[str, bytes] = field(default_factory=dict, compare=False)

    def once(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What several files of one network begin with, made for the first of them."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Target(ABC):
    """A runtime and number format to export to.

    ``file`` is the name in a bundle; ``layout`` the order of the input's axes;
    ``packages`` the installed distributions, and ``modules`` our own source files, that
    shape a file beside the network (both are part of the key under which timing files
    are cached). ``parts_detectors`` says that ``network_alone`` takes a detector's
    network out of its file, so that its latency can be predicted. ``runner`` is a
    Python file that teaches the runner a runtime it lacks, on this computer: it has
    ``MODELS`` (runtime -> class, see ``deploy/runner.py``) and ``SUFFIXES`` (suffix of
    a file -> runtime).
    """

    runtime: ClassVar[str]
    dtype: ClassVar[str]
    file: ClassVar[str]
    layout: ClassVar[Literal["NHWC", "NCHW"]]
    graph: ClassVar[Graph] = "decoded"
    parts_detectors: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    modules: ClassVar[tuple[ModuleType, ...]] = ()
    runner: ClassVar[Path | None] = None

    @property
    def exact(self) -> bool:
        """Whether a file computes in float32 what PyTorch does, up to rounding, and
        returns all of it.
        """
        return self.dtype == "fp32" and self.graph == "decoded"

    @abstractmethod
    def write(self, trained: Trained) -> bytes:
        """The file of a trained network. Raises ExportError where the network has no such form."""

    @abstractmethod
    def timing_file(self, network: Network) -> bytes:
        """The file of a network that is only timed, of one op or of many: without
        metadata, as fast as a trained one's.
        """

    def network_alone(self, model: bytes, *, detector: bool) -> bytes | None:
        """Of a file that holds more than the network (an interface, a detector's
        decoding), the network alone, for timing.

        None where it cannot be taken out: then an interface is timed with it.
        """
        return None

    def at_score(self, model: bytes, min_score: float) -> bytes:
        """A file that chooses detections itself, with another threshold of scores: for
        timing. Raises ExportError where it cannot.
        """
        raise ExportError(f"{self.file} cannot be given another threshold of scores")


def target(name: str) -> Target:
    """The target of a name. Raises ConfigError where there is none."""
    found: Target = TARGETS.get(name)()
    return found


def timing_target(runtime: str, dtype: str) -> Target:
    """The target whose files are timed for a runtime and number format. Raises
    ConfigError where there is none.
    """
    found = [each for each in map(target, TARGETS) if each.graph == "decoded"]
    for each in found:
        if (each.runtime, each.dtype) == (runtime, dtype):
            return each
    known = ", ".join(sorted(f"{each.runtime} with {each.dtype}" for each in found))
    raise ConfigError(
        f"device.runtime = {runtime!r} with device.dtype = {dtype!r} is not supported; there are"
        f" {known}."
    )
