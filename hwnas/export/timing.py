"""Model files that are only timed: blocks and sampled networks with random weights, cached
by their ops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas import __version__
from hwnas.cache import cache_folder, is_intact, private_folder, write_verified
from hwnas.config import DeviceConfig
from hwnas.core import arch, graph, ir
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op, source_files
from hwnas.devices.device import connect, find_device
from hwnas.devices.session import Bench
from hwnas.document import content_sha256, file_sha256
from hwnas.export.target import Target, timing_target
from hwnas.lazy import LazyModule, torch
from hwnas.progress import Progress

if TYPE_CHECKING:
    from hwnas.nn import anchors, blocks, detector, network
    from hwnas.nn import graph as nn_graph
else:  # see hwnas/lazy.py
    anchors = LazyModule("hwnas.nn.anchors")
    blocks = LazyModule("hwnas.nn.blocks")
    detector = LazyModule("hwnas.nn.detector")
    network = LazyModule("hwnas.nn.network")
    nn_graph = LazyModule("hwnas.nn.graph")


def timing_file(
    timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None
) -> Path:
    """The model file of a chain of ops, for the runtime and dtype of a target.

    Networks that are not chains (detectors, and networks of cells) are given as
    architectures. A file is written on first use, and cached in ``folder`` (default:
    ``cache_folder``) under the keys of its ops. A file that was damaged or replaced since
    then is written again. Inputs and outputs are channels-last for LiteRT, and int8 for
    the dtype int8.

    Raises StorageError if the folder cannot be used or belongs to another user.
    """
    path = timing_path(timed, runtime, dtype, folder)
    private_folder(folder or cache_folder())
    private_folder(path.parent)
    if not is_intact(path):
        generator = torch.Generator().manual_seed(0)
        timed_network = network.network_of(_architecture(timed), generator=generator).eval()
        write_verified(path, timing_target(runtime, dtype).timing_file(timed_network))
    return path


def bench_of(settings: DeviceConfig, folder: Path, progress: Progress) -> Bench:
    """A bench with the device of a configuration, which times files with random weights.
    Raises ConfigError if the device is unknown.
    """
    device = find_device(settings.name)
    return Bench(device, connect(device), settings, timing_file, folder, progress)


def timing_path(
    timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None
) -> Path:
    """The path at which ``timing_file`` caches a file. It need not exist yet."""
    made = timing_target(runtime, dtype)
    architecture = _architecture(timed)
    ops = architecture.ops()
    if len(ops) == 1:
        name = ops[0].key
    else:
        parts = [*(op.key for op in ops), *architecture.wiring]
        name = "net-" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    # A new folder whenever the code changes: old files may be different.
    subfolder = f"{runtime}-{dtype}-{_content_key(type(made))}"
    return (folder or cache_folder()) / subfolder / f"{name}{Path(made.file).suffix}"


def _architecture(timed: Sequence[Op] | Architecture) -> Architecture:
    if isinstance(timed, Architecture):
        return timed
    return Architecture(name="timing", in_channels=timed[0].in_ch, blocks=tuple(timed))


@cache
def _content_key(made: type[Target]) -> str:
    """A hash of everything besides its ops that affects a timing file: source files, and
    the packages that write it.
    """
    modules = (arch, graph, ir, anchors, blocks, detector, network, nn_graph, *made.modules)
    paths = (*source_files(), *(Path(str(module.__file__)) for module in modules))
    sources = [file_sha256(path) for path in paths]
    return content_sha256([__version__, *sources, *map(version, made.packages)])[:16]
