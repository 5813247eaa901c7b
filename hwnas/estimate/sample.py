"""A few models, built and measured as profiling and validation do it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace
from hwnas.devices.session import Header, Item, Measurement, Plan, Schedule, answers
from hwnas.estimate.parts import Stopwatch
from hwnas.export.timing import bench_of, timing_file
from hwnas.profile.plan import spread_networks
from hwnas.progress import Progress

OPS, NETWORKS = 4, 2
"""How many of either are built and measured."""

Timed = Sequence[Op] | Architecture


@dataclass(frozen=True)
class Costs:
    """Means of items of one kind: seconds of building and of a round, bytes of the
    file, milliseconds of a run.
    """

    building: float
    measuring: float
    size_bytes: float
    ms: float


@dataclass(frozen=True)
class Sample:
    """What building and measuring a few ops and networks took. ``start`` is the
    runner's, once in a round.
    """

    ops: Costs
    networks: Costs
    start: float


def sample(
    experiment: Experiment,
    space: SearchSpace,
    arch: Architecture | None,
    folder: Path,
    watch: Stopwatch,
) -> Sample:
    """Build and measure in an empty ``folder``: ops and networks of the space, or of an
    architecture alone.

    One of either is built even where no time is left.
    Raises DeviceError where the device cannot be reached, or does not run the files.
    """
    ops: Sequence[Op] = tuple(dict.fromkeys(arch.ops())) if arch is not None else space.ops
    networks = (
        [arch]
        if arch is not None
        else spread_networks(space, NETWORKS, np.random.default_rng([experiment.seed, 77]))
    )
    of_ops: dict[str, Timed] = {op.key: (op,) for op in _spread(ops, OPS)}
    of_networks: dict[str, Timed] = {
        f"net-{i}": network.ops() if network.is_chain else network
        for i, network in enumerate(networks)
    }
    building, paths = dict[str, float](), dict[str, Path]()
    for kind in (of_ops, of_networks):
        for count, (name, timed) in enumerate(kind.items()):
            if watch.over and count > 0:
                break
            begun_at = time.perf_counter()
            paths[name] = timing_file(
                timed, experiment.device.runtime, experiment.device.dtype, folder
            )
            building[name] = time.perf_counter() - begun_at
    chains = of_ops | of_networks
    items = [
        Item(name, experiment.device.runtime, path, tuple(_ops(chains[name])))
        for name, path in paths.items()
    ]
    start, measuring, ms = _measured(experiment, items, folder)

    def costs(names: list[str]) -> Costs:
        means = (
            np.mean([of[name] for name in names]) for of in (building, measuring, _sizes(paths), ms)
        )
        return Costs(*map(float, means))

    found = [name for name in paths if name in of_networks]
    return Sample(costs([name for name in paths if name in of_ops]), costs(found), start)


def _ops(timed: Timed) -> Sequence[Op]:
    return timed.ops() if isinstance(timed, Architecture) else timed


def _sizes(paths: dict[str, Path]) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in paths.items()}


def _spread(ops: Sequence[Op], count: int) -> list[Op]:
    """Ops from the middle of each of ``count`` parts, by their size: their mean is near
    that of all.
    """
    ordered = sorted(ops, key=lambda op: op.macs)
    count = min(count, len(ordered))
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def _measured(
    experiment: Experiment, items: Sequence[Item], folder: Path
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds until the runner has started, seconds of each item, and milliseconds of a
    run of each.
    """
    settings, config = experiment.device, experiment.profile
    bench = bench_of(settings, folder, Progress())
    plan = Plan(
        tuple(items),
        0,
        settings.threads,
        bench.cores,
        Schedule(min_ms=config.min_ms, min_runs=config.min_runs),
    )
    begun_at = last_at = time.perf_counter()
    start, seconds, ms = 0.0, dict[str, float](), dict[str, float]()
    for row, _ in answers(bench.connection, plan, folder):
        now = time.perf_counter()
        if isinstance(row, Measurement):
            seconds[row.name], ms[row.name] = now - last_at, float(np.median(row.ms))
        elif isinstance(row, Header):
            start = now - begun_at
        last_at = now
    return start, seconds, ms
