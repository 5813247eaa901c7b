"""The profile stage: a space and a device in, a latency table out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from hwnas.config import Experiment, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.calibration import fit_calibration, held_out_errors
from hwnas.core.cost import missing_ops
from hwnas.core.describe import describe_networks
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.devices.device import ADDRESSES, Explaining, connect, find_device
from hwnas.devices.session import Bench, Item, Schedule, Session, spread_of
from hwnas.document import user_path
from hwnas.errors import ConfigError, DeviceError
from hwnas.export.target import timing_target
from hwnas.export.timing import bench_of
from hwnas.networks import named_networks
from hwnas.profile.plan import Plan, make_plan, planned_ops
from hwnas.progress import Progress
from hwnas.runs import JsonLines, StageContext
from hwnas.stages import Stage
from hwnas.tables.fit import MIN_NETWORKS, fit_table
from hwnas.tables.prior import Prior

FIT_STREAM = 78
"""Gives the fit to whole networks a random stream of its own, next to the seed."""
TOO_BUSY_ERROR = 0.3
"""Mean error of the predicted networks above which a table of noisy entries is refused.
Our choice: a device that is merely restless stays below 0.1, because medians over rounds
resist outliers.
"""

AnyNetwork = TypeVar("AnyNetwork")


class Profile(Stage):
    """Measures the device, if the search needs a latency table and none is given."""

    name = "profile"
    result = "table.json"
    reported = ("table.json",)
    estimate = "hwnas.estimate.measuring:of_profile"
    outputs = ["table.json"]

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """Only for a search by latency, without a given table."""
        search = experiment.search
        return search.table is None and search.by_table and experiment.train.arch is None

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Raise ConfigError for a table that the search after it would refuse."""
        del space
        config = experiment.profile
        uncalibrated = config.mode == "ops" and config.fit_networks == 0
        if uncalibrated and not experiment.search.allow_uncalibrated:
            raise ConfigError(
                "profile.fit_networks = 0 makes a table without a calibration, which the search"
                " does not accept: set it to 3 or more, or search.allow_uncalibrated = true."
            )

    @cached_property
    def networks(self) -> tuple[Architecture, ...]:
        """The networks of ``profile.networks``, which the table covers besides the
        space.
        """
        return named_networks(self.at.experiment, self.at.space)

    def inputs(self) -> dict[str, str]:
        """Hashes of the space, the device, the named networks, the tables of other
        devices, and the settings.
        """
        self.at.check_searchable()
        experiment = self.at.experiment
        device = find_device(experiment.device.name)
        # Raises an error if no model can be timed with this runtime and dtype.
        timing_target(experiment.device.runtime, experiment.device.dtype)

        hashes = {f"profile.networks[{i}]": arch.sha256 for i, arch in enumerate(self.networks)}
        hashes |= {"space.json": self.at.space.sha256, "device.json": device.sha256}
        hashes |= self.at.hashes_of_config("device", "profile", "seed")
        if experiment.profile.mode == "networks":
            hashes |= self._prior_hashes()

        # Devices with an address may be out of reach now, so they are checked later.
        if experiment.device.cores is None and device.connection not in ADDRESSES:
            # Raises an error for more threads than the device has cores.
            connect(device).cores(experiment.device.threads)
        return hashes

    def _prior_hashes(self) -> dict[str, str]:
        """Hashes of the tables of other devices. Raises ConfigError if one does not cover
        the named networks.
        """
        named_ops = [op for arch in self.networks for op in arch.ops()]
        hashes = {}
        for i, path in enumerate(self.at.experiment.profile.prior):
            table = LatencyTable.load(user_path(path, "profile.prior"))
            hashes[f"profile.prior[{i}]"] = table.sha256
            missing = missing_ops(named_ops, table)
            if missing:
                raise ConfigError(
                    f"profile.prior {path!r} lacks {missing[0]} of profile.networks: profile those"
                    " networks on that device as well, or remove one of the two keys."
                )
        return hashes

    def summary(self) -> str:
        """How many items are measured, on which device, and how often."""
        device = self.at.experiment.device
        config = self.at.experiment.profile
        space = self.at.space
        if config.mode == "ops":
            ops = len(planned_ops(space, self.networks))
            measured = f"{ops} ops and {config.fit_networks + config.test_networks} networks"
        else:
            measured = f"{config.sampled + len(self.networks)} networks"
        plural = "s" if device.threads > 1 else ""
        target = f"{device.runtime}, {device.dtype}, {device.threads} thread{plural}"
        return (
            f"measure {measured} of space {space.name} on {device.name} ({target}) in"
            f" {config.rounds} rounds"
        )

    def check_ready(self) -> None:
        """Raise DeviceError if the device cannot be reached, or lacks the runtime or the
        cores.
        """
        settings = self.at.experiment.device
        with TemporaryDirectory() as folder:
            bench = bench_of(settings, Path(folder), Progress())
            _check_runtime(bench)
            nothing = {
                "runtime": settings.runtime,
                "threads": settings.threads,
                "cores": list(bench.cores) or None,
                "items": [],
            }
            for row in bench.connection.measure(nothing, bench.folder):
                # The header: the device runs on these cores. What follows may take time.
                if "runner" in row:
                    break

    def run(self, ctx: StageContext) -> None:
        """Write ``table.json``."""
        experiment = self.at.experiment
        bench = bench_of(experiment.device, ctx.folder, ctx.progress)
        table = profile(bench, self.at.space, experiment.profile, experiment.seed, self.networks)
        table.save(ctx.folder / "table.json")
        held_out = None
        if table.calibration is not None:
            held_out = table.calibration.held_out
        if "more_networks" in table.provenance:
            ctx.progress.info(
                f"table of {len(table.entries)} ops fitted to whole networks:"
                f" {table.provenance['more_networks']}"
            )
        elif held_out is not None:
            ctx.progress.info(
                f"table of {len(table.entries)} ops; {held_out.networks} held-out networks: mean"
                f" error {held_out.mape:.1%}, largest {held_out.max_error:.1%} (uncalibrated sum:"
                f" {held_out.raw_mape:.1%})"
            )
        for line in describe_networks(self.networks, table):
            ctx.progress.info(line)


def profile(
    bench: Bench,
    space: SearchSpace,
    config: ProfileConfig,
    seed: int = 0,
    named: Sequence[Architecture] = (),
) -> LatencyTable:
    """Measure ``space`` and the ops of ``named`` networks on a device, and return the
    table. Raises DeviceError, also if the device was too busy for a usable table, or
    TableError.
    """
    ops = planned_ops(space, named)
    known = []
    if config.mode == "networks":
        known = [LatencyTable.load(user_path(path, "profile.prior")) for path in config.prior]
    # Raises an error for a table that does not cover these ops, before hours of measuring.
    Prior.of(ops, known)
    _check_runtime(bench)

    plan = make_plan(space, config, seed, named)
    # The session continues from rows that an interrupted profile left in the file.
    session = Session(
        bench,
        _items(plan, bench),
        _schedule(config, seed),
        JsonLines(bench.folder / "samples.jsonl"),
    )
    session.run("measuring")
    entries = {name: _entry(session, name) for name in plan.items}
    _warn(entries, bench.progress)

    header = _header(space, session)
    provenance = _provenance(space, config, session)
    noise = _noise(entries)
    if noise is not None:
        provenance["noise"] = noise
    if config.mode == "networks":
        measured = _Measured(plan, entries, header, provenance)
        rng = np.random.default_rng([seed, FIT_STREAM])
        table = _fitted(measured, ops, known, rng)
    else:
        table = LatencyTable(
            header=header,
            entries={op.key: entries[op.key] for op in plan.ops},
            calibration=_calibration(plan, entries),
            provenance=provenance,
        )
    _check_usable(table, entries)
    return table


def _check_runtime(bench: Bench) -> None:
    """Raise DeviceError if the device does not have the configured runtime."""
    runtime = bench.settings.runtime
    if isinstance(bench.connection, Explaining):
        missing = bench.connection.missing()
        if runtime in missing:
            raise DeviceError(f"{bench.device.id}: {missing[runtime]}")
    installed = bench.connection.runtimes()
    if runtime not in installed:
        names = ", ".join(installed.values()) or "no runtime"
        raise DeviceError(
            f"{bench.device.id} does not run {runtime} (it has {names}): install it there, or set"
            " device.runtime."
        )


def _items(plan: Plan, bench: Bench) -> list[Item]:
    """The model file of every op and network, built unless it is in the cache."""
    runtime = bench.settings.runtime
    dtype = bench.settings.dtype
    items = []
    with bench.progress.task(f"building {len(plan.items)} models", len(plan.items)) as task:
        for name, ops in plan.items.items():
            model = bench.build(plan.built(name), runtime, dtype)
            items.append(Item(name, runtime, model, ops))
            task.advance()
    return items


def _schedule(config: ProfileConfig, seed: int) -> Schedule:
    return Schedule(
        rounds=config.rounds,
        max_rounds=config.max_rounds,
        max_spread=config.max_spread,
        min_ms=config.min_ms,
        min_runs=config.min_runs,
        seed=(seed,),
    )


@dataclass(frozen=True)
class _Measured:
    """The plan, the entry of every item, and the table's description of the
    measurement.
    """

    plan: Plan
    entries: dict[str, Entry]
    header: TableHeader
    provenance: dict[str, str]


def _header(space: SearchSpace, session: Session) -> TableHeader:
    settings = session.bench.settings
    reported = session.header(settings.runtime)
    return TableHeader(
        device=session.bench.device.id,
        cpu=reported.cpu,
        machine=reported.machine,
        runtime=settings.runtime,
        runtime_version=f"{reported.runtime_package} {reported.runtime_version}",
        dtype=settings.dtype,
        threads=settings.threads,
        cores=tuple(reported.cores) if isinstance(reported.cores, list) else "unknown",
        governor=reported.governor,
        # TFLite files are channels-last, ONNX files channels-first.
        layout="NHWC" if settings.runtime == "litert" else "NCHW",
        batch=1,
        date=date.today().isoformat(),
        space=space.name,
    )


def _provenance(space: SearchSpace, config: ProfileConfig, session: Session) -> dict[str, str]:
    provenance = {
        "method": f"hwnas profile, {config.rounds} to {config.max_rounds} shuffled rounds",
        "space_sha256": space.sha256,
    }
    if session.header(session.bench.settings.runtime).pinned is False:
        provenance["pinning"] = "not pinned: the system of the device chose the cores"
    for name, values in session.conditions.items():
        provenance[f"device_{name}"] = _range(values)
    return provenance


def _fitted(
    measured: _Measured, ops: Sequence[Op], known: list[LatencyTable], rng: np.random.Generator
) -> LatencyTable:
    """A table fitted only to whole networks. Noisy networks are counted, and left out if
    enough quiet ones remain.
    """
    # By ops, because a sampled network may also be a named one, and the fit wants each
    # network once.
    networks: dict[tuple[Op, ...], tuple[Architecture, Entry]] = {}
    for i, arch in enumerate(measured.plan.fit):
        networks[arch.ops()] = (arch, measured.entries[f"net-{i}"])
    usable = _usable(list(networks.values()), lambda network: network[1])
    latencies = [(arch, entry.ms) for arch, entry in usable]
    noisy_count = sum(entry.noisy for _, entry in networks.values())

    fitted = fit_table(ops, latencies, measured.header, rng, known=known)
    assert fitted.calibration is not None
    calibration = fitted.calibration.model_copy(update={"noisy_networks": noisy_count})
    provenance = {**measured.provenance, **fitted.provenance}
    provenance["method"] = (
        f"{measured.provenance['method']} of whole networks; {fitted.provenance['method']}"
    )
    return fitted.model_copy(update={"calibration": calibration, "provenance": provenance})


def _range(values: list[float | str]) -> str:
    """The range of a device condition during the measurement: ``31.5 to 38`` or
    ``schedutil``.
    """
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values) or min(numbers) == max(numbers):
        return ", ".join(sorted({str(value) for value in values}))
    return f"{min(numbers):g} to {max(numbers):g}"


def _warn(entries: dict[str, Entry], progress: Progress) -> None:
    """Warn of noisy entries, and of models that the delegate did not run as a whole."""
    noisy = [name for name, entry in entries.items() if entry.noisy]
    if noisy:
        progress.warning(
            f"{_noise(entries)} and are flagged: {', '.join(noisy[:3])}. To measure them better,"
            " end other programs on the device, and profile again with --fresh."
        )
    # Only False says so: "unknown" entries are not reported.
    slow = [name for name, entry in entries.items() if entry.delegated is False]
    if slow:
        progress.warning(
            f"the delegate did not take {len(slow)} of {len(entries)} models whole, so slower"
            f" kernels ran: {', '.join(slow[:3])}."
        )


def _noise(entries: dict[str, Entry]) -> str | None:
    """How many entries stayed noisy, and by how much at most; None if none did."""
    spreads = [entry.spread for entry in entries.values() if entry.noisy]
    if not spreads:
        return None
    largest = max(spread for spread in spreads if isinstance(spread, float))
    return (
        f"{len(spreads)} of {len(entries)} entries stayed noisy (spread between rounds up to"
        f" {largest:.0%})"
    )


def _check_usable(table: LatencyTable, entries: dict[str, Entry]) -> None:
    """Raise DeviceError if most entries are noisy and the table does not predict the
    networks that were measured with them.
    """
    held_out = None if table.calibration is None else table.calibration.held_out
    noisy_count = sum(entry.noisy for entry in entries.values())
    if held_out is None or 2 * noisy_count <= len(entries):
        return
    if held_out.mape > TOO_BUSY_ERROR:
        raise DeviceError(
            f"{table.header.device} was too busy to be measured: {_noise(entries)}, and the table"
            f" would be off by {held_out.mape:.0%} on average: end other programs on it, let it"
            " cool"
            " down, and profile again with --fresh."
        )


@dataclass(frozen=True)
class _Summed:
    """A measured network: its ops, the sum of their entries, and its own entry."""

    ops: tuple[Op, ...]
    sum_ms: float
    entry: Entry


def _calibration(plan: Plan, entries: dict[str, Entry]) -> Calibration | None:
    """The calibration, fitted to the fit networks and evaluated on the test networks;
    None without fit networks.

    Noisy networks are counted, and left out if enough quiet ones remain.
    """
    networks = []
    for i, arch in enumerate(plan.networks):
        sum_ms = sum(entries[op.key].ms for op in arch.ops())
        networks.append(_Summed(arch.ops(), sum_ms, entries[f"net-{i}"]))
    fit = _usable(networks[: len(plan.fit)], lambda network: network.entry)
    test = _usable(networks[len(plan.fit) :], lambda network: network.entry)
    if not fit:
        return None

    calibration = fit_calibration(*_columns(fit))
    held_out = None
    if test:
        held_out = held_out_errors(calibration, *_columns(test))
    noisy_count = sum(network.entry.noisy for network in networks)
    return calibration.model_copy(update={"held_out": held_out, "noisy_networks": noisy_count})


def _usable(
    networks: Sequence[AnyNetwork], entry_of: Callable[[AnyNetwork], Entry]
) -> list[AnyNetwork]:
    """The quiet networks, or all networks if fewer than ``MIN_NETWORKS`` are quiet."""
    quiet = [network for network in networks if not entry_of(network).noisy]
    # A slope from one or two networks that happened to be quiet is less accurate than
    # one from a dozen noisy medians.
    return quiet if len(quiet) >= MIN_NETWORKS else list(networks)


def _columns(
    networks: Sequence[_Summed],
) -> tuple[list[tuple[Op, ...]], list[float], list[float]]:
    """The ops, the sums of entries and the measured latencies of networks, in ms."""
    ops: list[tuple[Op, ...]] = []
    sums_ms: list[float] = []
    measured_ms: list[float] = []
    for network in networks:
        ops.append(network.ops)
        sums_ms.append(network.sum_ms)
        measured_ms.append(network.entry.ms)
    return ops, sums_ms, measured_ms


def _entry(session: Session, name: str) -> Entry:
    """The entry of one item, from all its runs."""
    rounds = session.rounds(name)
    runs = np.concatenate([np.asarray(ms) for ms in rounds])
    # The session has already spent its extra rounds on items above the allowed spread.
    spread = spread_of(rounds)
    return Entry(
        ms=_rounded(session.ms(name)),
        p10_ms=_rounded(np.percentile(runs, 10)),
        p90_ms=_rounded(np.percentile(runs, 90)),
        runs=len(runs),
        rounds=len(rounds),
        spread=_rounded(spread),
        noisy=spread > session.schedule.max_spread,
        delegated=session.delegated[name],
    )


def _rounded(value: float) -> float:
    """Five significant digits. Clocks are not more precise, and tables of thousands of
    ops stay readable.
    """
    return float(f"{value:.5g}")
