"""The definition of an export target: a runtime and number format, as a plug-in.

Your own target is one class and one entry point. It can then be exported to
(``export.formats``), profiled (``device.runtime`` and ``device.dtype``), timed and
validated like the built-in ones::

    [project.entry-points."hwnas.target"]
    mine-fp16 = "my_package.target:Mine"

``hwnas.testing.TargetConformance`` tests the requirements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from hwnas.config.formats import TARGETS
from hwnas.core.detector import PostProcessing
from hwnas.errors import ConfigError, ExportError
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.nn.network import Network

Graph = Literal["decoded", "nms", "tasks"]
"""What the graph of a detector's file includes; see ``post_processing``."""


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, with everything needed to write its files.

    ``calibration_NHWC`` holds float32 images as the network sees them. ``interface``
    describes the input and output of the files, ``card`` their metadata, and
    ``post_processing`` how a detector's graph selects detections.
    """

    network: Network
    interface: Interface
    calibration_NHWC: np.ndarray
    card: ModelCard
    post_processing: PostProcessing = field(default_factory=PostProcessing)
    _made: dict[str, bytes] = field(default_factory=dict, compare=False)

    def once(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return the cached result of ``make``. For the part that several files of a
        network share, so that it is computed only once.
        """
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Target(ABC):
    """A runtime and number format to export to.

    Attributes:
        file: The name of the file in a bundle.
        layout: The order of the input's axes.
        graph: What a detector's file includes.
        parts_detectors: Whether ``network_alone`` can extract a detector's network from
            its file. The detector's latency can then be predicted.
        packages: The installed distributions that affect the content of a file.
        modules: Our own source files that affect the content of a file. Both are part
            of the key under which timing files are cached.
        runner: A Python file that adds a runtime to the runner on this computer. It
            defines ``MODELS`` (runtime -> class, see ``deploy/runner.py``) and
            ``SUFFIXES`` (suffix of a file -> runtime).
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
        """Whether a file computes the same as PyTorch up to float32 rounding, and
        returns all outputs.
        """
        return self.dtype == "fp32" and self.graph == "decoded"

    @abstractmethod
    def write(self, trained: Trained) -> bytes:
        """Write the file of a trained network. Raises ExportError if the target does
        not support the network.
        """

    @abstractmethod
    def timing_file(self, network: Network) -> bytes:
        """Write the file of a network, of one op or of many, that is only timed. It has
        no metadata, but is as fast as that of a trained network.
        """

    def network_alone(self, model: bytes, *, detector: bool) -> bytes | None:
        """Extract the network from a file that contains more (an interface, a
        detector's decoding), for timing.

        Returns None if that is impossible. An interface is then part of the timing.
        """
        return None

    def at_score(self, model: bytes, min_score: float) -> bytes:
        """Change the score threshold in a file that selects detections itself, for
        timing. Raises ExportError if that is impossible.
        """
        raise ExportError(f"the score threshold in {self.file} cannot be changed")


def target(name: str) -> Target:
    """The target called ``name``. Raises ConfigError if there is none."""
    made: Target = TARGETS.get(name)()
    return made


def timing_target(runtime: str, dtype: str) -> Target:
    """The target whose files are timed for a runtime and number format. Raises
    ConfigError if there is none.
    """
    # Timing files contain only a network, so variants with NMS do not count.
    candidates = [made for made in map(target, TARGETS) if made.graph == "decoded"]
    for candidate in candidates:
        if (candidate.runtime, candidate.dtype) == (runtime, dtype):
            return candidate
    known = ", ".join(sorted(f"{made.runtime} with {made.dtype}" for made in candidates))
    raise ConfigError(
        f"device.runtime = {runtime!r} with device.dtype = {dtype!r} is not supported; choose"
        f" {known}."
    )
