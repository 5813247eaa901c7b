"""Model files that are only timed: blocks and sampled networks with random weights,
cached by what they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from hwnas import __version__
from hwnas.config import DeviceConfig
from hwnas.core import arch, graph, ir
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op, source_files
from hwnas.devices.device import connect, find_device
from hwnas.devices.session import Bench
from hwnas.document import content_sha256, file_sha256, write_atomic
from hwnas.export.target import Target, timing_target
from hwnas.nn import blocks, detector, network
from hwnas.nn.network import network_of
from hwnas.progress import Progress


def cache_folder() -> Path:
    """``$HWNAS_CACHE``, else ``~/.cache/hwnas``; emptying it costs only time."""
    return Path(os.environ.get("HWNAS_CACHE", "~/.cache/hwnas")).expanduser()


def timing_file(
    timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None
) -> Path:
    """The model file of a chain of ops for the runtime and dtype of a target.

    A network with a detector, or of cells, is no chain, and is given as its
    architecture. Files are made on first use and kept under the ops' keys. Inputs and
    outputs are channels-last for LiteRT, and int8 for int8. ``folder`` (default:
    ``cache_folder``) is where.
    """
    path = timing_path(timed, runtime, dtype, folder)
    if not path.exists():
        network = network_of(
            _architecture(timed), generator=torch.Generator().manual_seed(0)
        ).eval()
        write_atomic(path, timing_target(runtime, dtype).timing_file(network))
    return path


def bench_of(settings: DeviceConfig, folder: Path, progress: Progress) -> Bench:
    """The device of a configuration, and files of random weights from the cache. Raises
    ConfigError on an unknown device.
    """
    device = find_device(settings.name)
    return Bench(device, connect(device), settings, timing_file, folder, progress)


def timing_path(
    timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None
) -> Path:
    """Where ``timing_file`` keeps a file, which need not be there yet."""
    made = timing_target(runtime, dtype)
    built = _architecture(timed)
    ops = built.ops()
    parts = [*(op.key for op in ops), *built.wiring]
    name = (
        ops[0].key
        if len(ops) == 1
        else "net-" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    )
    return (
        (folder or cache_folder())
        / f"{runtime}-{dtype}-{_makers(type(made))}"
        / f"{name}{Path(made.file).suffix}"
    )


def _architecture(timed: Sequence[Op] | Architecture) -> Architecture:
    if isinstance(timed, Architecture):
        return timed
    return Architecture(name="timing", in_channels=timed[0].in_ch, blocks=tuple(timed))


@cache
def _makers(made: type[Target]) -> str:
    """A hash of everything that shapes a timing file beside its ops: source files, and
    the packages that write it.
    """
    modules = (arch, graph, ir, blocks, detector, network, *made.modules)
    paths = (*source_files(), *(Path(str(module.__file__)) for module in modules))
    sources = [file_sha256(path) for path in paths]
    return content_sha256([__version__, *sources, *map(version, made.packages)])[:16]
