"""Builds and measures a few models as profiling and validation do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace
from hwnas.devices.session import Header, Item, Measurement, Plan, Schedule, measured_rows
from hwnas.estimate.parts import Stopwatch
from hwnas.export.timing import bench_of, timing_file
from hwnas.profile.plan import spread_networks
from hwnas.progress import Progress

OPS = 4
"""How many ops are built and measured."""
NETWORKS = 2
"""How many networks are built and measured."""

TimedModel = Sequence[Op] | Architecture
"""A model to time: a chain of ops, or a network with a graph."""


@dataclass(frozen=True)
class Costs:
    """Means over items of one kind: seconds of building and of measuring in a round,
    bytes of the file, and milliseconds of a run.
    """

    building: float
    measuring: float
    size_bytes: float
    ms: float


@dataclass(frozen=True)
class Sample:
    """The costs of a few ops and networks. ``start`` is the number of seconds that the
    runner takes to start, once in a round.
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
    """Build and measure ops and networks in an empty ``folder``: those of ``arch`` or,
    if it is None, of the space.

    At least one op and one network are built, even if the time is used up. Raises
    DeviceError if the device cannot be reached or does not run the files.
    """
    device = experiment.device
    ops: Sequence[Op]
    if arch is not None:
        ops = tuple(dict.fromkeys(arch.ops()))
        networks = [arch]
    else:
        ops = space.ops
        # 77 keeps the generator apart from those of the stages.
        rng = np.random.default_rng([experiment.seed, 77])
        networks = spread_networks(space, NETWORKS, rng)
    timed_ops: dict[str, TimedModel] = {op.key: (op,) for op in _evenly_spaced(ops, OPS)}
    timed_networks: dict[str, TimedModel] = {}
    for i, network in enumerate(networks):
        timed_networks[f"net-{i}"] = network.ops() if network.is_chain else network

    building: dict[str, float] = {}
    paths: dict[str, Path] = {}
    items = []
    for kind in (timed_ops, timed_networks):
        for count, (name, timed) in enumerate(kind.items()):
            if watch.over and count > 0:
                break
            begin = time.perf_counter()
            paths[name] = timing_file(timed, device.runtime, device.dtype, folder)
            building[name] = time.perf_counter() - begin
            items.append(Item(name, device.runtime, paths[name], tuple(_ops(timed))))
    start, measuring, ms = _measure(experiment, items, folder)
    size_bytes = {name: path.stat().st_size for name, path in paths.items()}

    def costs(names: list[str]) -> Costs:
        def mean(values: Mapping[str, float]) -> float:
            return float(np.mean([values[name] for name in names]))

        return Costs(mean(building), mean(measuring), mean(size_bytes), mean(ms))

    op_costs = costs([name for name in paths if name in timed_ops])
    network_costs = costs([name for name in paths if name in timed_networks])
    return Sample(op_costs, network_costs, start)


def _ops(timed: TimedModel) -> Sequence[Op]:
    return timed.ops() if isinstance(timed, Architecture) else timed


def _evenly_spaced(ops: Sequence[Op], count: int) -> list[Op]:
    """``count`` ops whose mean is close to that of all: sorted by MACs, one from the
    middle of each of ``count`` equal parts.
    """
    ordered = sorted(ops, key=lambda op: op.macs)
    count = min(count, len(ordered))
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def _measure(
    experiment: Experiment, items: Sequence[Item], folder: Path
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds until the runner has started, and by item's name the seconds that
    measuring took and the milliseconds of a run.
    """
    settings = experiment.device
    config = experiment.profile
    bench = bench_of(settings, folder, Progress())
    plan = Plan(
        tuple(items),
        0,
        settings.threads,
        bench.cores,
        Schedule(min_ms=config.min_ms, min_runs=config.min_runs),
    )
    start = 0.0
    seconds: dict[str, float] = {}
    ms: dict[str, float] = {}
    begun_at = last_at = time.perf_counter()
    for row, _ in measured_rows(bench.connection, plan, folder):
        now = time.perf_counter()
        if isinstance(row, Measurement):
            # An item's answer comes when it is measured, right after that of the last one.
            seconds[row.name] = now - last_at
            ms[row.name] = float(np.median(row.ms))
        elif isinstance(row, Header):
            start = now - begun_at
        last_at = now
    return start, seconds, ms
