"""The profile stage: a space and a device in, a latency table out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import numpy as np

from hwnas.config import Experiment, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.calibration import fit_calibration, judge
from hwnas.core.cost import missing_ops
from hwnas.core.describe import describe_networks
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.devices.device import ADDRESSES, connect, find_device
from hwnas.devices.session import Bench, Item, Schedule, Session, spread_of
from hwnas.errors import ConfigError, DeviceError, TableError
from hwnas.export.target import timing_target
from hwnas.export.timing import bench_of
from hwnas.networks import named_networks
from hwnas.profile.plan import Plan, make_plan, planned_ops
from hwnas.progress import Progress
from hwnas.runs import JsonLines, StageContext
from hwnas.stages import Stage
from hwnas.tables.fit import MIN_NETWORKS, fit_table
from hwnas.tables.prior import Prior


class Profile(Stage):
    """Measures the device, where no table is given and an architecture has to be found."""

    name = "profile"
    result = "table.json"
    reported = ("table.json",)
    estimate = "hwnas.estimate.measuring:of_profile"
    outputs = ["table.json"]

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """Not with a table or a budget that is counted, nor where nothing is searched."""
        search = experiment.search
        return search.table is None and search.by_table and experiment.train.arch is None

    @cached_property
    def networks(self) -> tuple[Architecture, ...]:
        """Those that are priced beside the space."""
        return named_networks(self.at.experiment, self.at.space)

    def inputs(self) -> dict[str, str]:
        """The space, the device, the networks that are named, tables of other devices,
        and the settings.
        """
        self.at.check_searchable()
        experiment, device = self.at.experiment, find_device(self.at.experiment.device.name)
        timing_target(experiment.device.runtime, experiment.device.dtype)  # refuses what has none
        found = {f"profile.networks[{i}]": arch.sha256 for i, arch in enumerate(self.networks)}
        found |= {"space.json": self.at.space.sha256, "device.json": device.sha256}
        found |= self.at.hashes_of_config("device", "profile", "seed")
        for i, prior in enumerate(
            experiment.profile.prior if experiment.profile.mode == "networks" else ()
        ):
            table = LatencyTable.load(Path(prior).expanduser())
            found[f"profile.prior[{i}]"] = table.sha256
            missing = missing_ops([op for arch in self.networks for op in arch.ops()], table)
            if missing:
                raise ConfigError(
                    f"profile.prior {prior!r} lacks {missing[0]} of profile.networks: profile those"
                    " networks there, too, or remove one of the two keys."
                )
        # those that may be out of reach are asked later
        if experiment.device.cores is None and device.connection not in ADDRESSES:
            # refuses more threads than there are cores
            connect(device).cores(experiment.device.threads)
        return found

    def summary(self) -> str:
        """How much is measured where, and how often."""
        device, config, space = self.at.experiment.device, self.at.experiment.profile, self.at.space
        if config.mode == "ops":
            ops = len(planned_ops(space, self.networks))
            measured = f"{ops} ops and {config.fit_networks + config.test_networks} networks"
        else:
            measured = f"{config.sampled + len(self.networks)} networks"
        threads = f"{device.threads} thread{'s' if device.threads > 1 else ''}"
        where = f"{device.name} ({device.runtime}, {device.dtype}, {threads})"
        return f"measure {measured} of space {space.name} on {where} in {config.rounds} rounds"

    def run(self, ctx: StageContext) -> None:
        """Write ``table.json``."""
        experiment = self.at.experiment
        bench = bench_of(experiment.device, ctx.folder, ctx.progress)
        table = profile(bench, self.at.space, experiment.profile, experiment.seed, self.networks)
        table.save(ctx.folder / "table.json")
        held_out = table.calibration.held_out if table.calibration else None
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
    """Measure ``space``, and the ops of ``named`` networks, on a device and return the
    table. Raises DeviceError or TableError.
    """
    settings, progress = bench.settings, bench.progress
    known = (
        [LatencyTable.load(Path(path).expanduser()) for path in config.prior]
        if config.mode == "networks"
        else []
    )
    # refuses a table that is no prior of this space before anything is measured
    Prior.of(planned_ops(space, named), known)
    usable = bench.connection.runtimes()
    if settings.runtime not in usable:
        has = ", ".join(usable.values()) or "no runtime"
        raise DeviceError(
            f"{bench.device.id} does not run {settings.runtime} (it has {has}): install it there,"
            " or set device.runtime."
        )
    plan = make_plan(space, config, seed, named)
    session = Session(
        bench,
        _items(plan, bench),
        _schedule(config, seed),
        JsonLines(bench.folder / "samples.jsonl"),
    )
    session.run("measuring")
    found = {name: _entry(session, name) for name in plan.items}
    _warn(found, progress)
    measured = _Measured(
        plan, found, _header(space, session), _provenance(space, config, session.conditions)
    )
    if config.mode == "networks":
        return _fitted(
            measured, planned_ops(space, named), known, np.random.default_rng([seed, 78])
        )
    entries = {op.key: found[op.key] for op in plan.ops}
    calibration = _calibration(plan, found)
    return LatencyTable(
        header=measured.header,
        entries=entries,
        calibration=calibration,
        provenance=measured.provenance,
    )


def _items(plan: Plan, bench: Bench) -> list[Item]:
    """The file of every op and network, built where the cache lacks it."""
    runtime, dtype = bench.settings.runtime, bench.settings.dtype
    items = []
    with bench.progress.task(f"building {len(plan.items)} models", len(plan.items)) as task:
        for name, ops in plan.items.items():
            items.append(Item(name, runtime, bench.build(plan.built(name), runtime, dtype), ops))
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
    """What was planned, the entry of every item, and what the table says of the measurement."""

    plan: Plan
    found: dict[str, Entry]
    header: TableHeader
    provenance: dict[str, str]


def _header(space: SearchSpace, session: Session) -> TableHeader:
    settings = session.bench.settings
    said = session.header(settings.runtime)
    return TableHeader(
        device=session.bench.device.id,
        cpu=said.cpu,
        machine=said.machine,
        runtime=settings.runtime,
        runtime_version=f"{said.runtime_package} {said.runtime_version}",
        dtype=settings.dtype,
        threads=settings.threads,
        cores=tuple(said.cores) if isinstance(said.cores, list) else "unknown",
        governor=said.governor,
        layout="NHWC" if settings.runtime == "litert" else "NCHW",
        batch=1,
        date=date.today().isoformat(),
        space=space.name,
    )


def _provenance(
    space: SearchSpace, config: ProfileConfig, conditions: dict[str, list[float | str]]
) -> dict[str, str]:
    return {
        "method": f"hwnas profile, {config.rounds} to {config.max_rounds} shuffled rounds",
        "space_sha256": space.sha256,
        **{f"device_{name}": _range(values) for name, values in conditions.items()},
    }


def _fitted(
    measured: _Measured, ops: Sequence[Op], known: list[LatencyTable], rng: np.random.Generator
) -> LatencyTable:
    """The table of whole networks alone; noisy ones are left out, and counted."""
    provenance = measured.provenance
    networks = {
        arch.ops(): (arch, measured.found[f"net-{i}"]) for i, arch in enumerate(measured.plan.fit)
    }
    quiet = [(arch, entry.ms) for arch, entry in networks.values() if not entry.noisy]
    if len(quiet) < MIN_NETWORKS:
        raise TableError(
            f"{len(networks) - len(quiet)} of {len(networks)} networks stayed noisy, and a fit"
            f" needs {MIN_NETWORKS} quiet ones: measure on a quieter device, more networks, or with"
            " a larger profile.max_spread."
        )
    fitted = fit_table(ops, quiet, measured.header, rng, known=known)
    assert fitted.calibration is not None
    calibration = fitted.calibration.model_copy(
        update={"noisy_networks": len(networks) - len(quiet)}
    )
    method = f"{provenance['method']} of whole networks; {fitted.provenance['method']}"
    return fitted.model_copy(
        update={
            "calibration": calibration,
            "provenance": {**provenance, **fitted.provenance, "method": method},
        }
    )


def _range(values: list[float | str]) -> str:
    """What a condition of the device was over the whole measurement: ``31.5 to 38`` or
    ``schedutil``.
    """
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values) or min(numbers) == max(numbers):
        return ", ".join(sorted({str(value) for value in values}))
    return f"{min(numbers):g} to {max(numbers):g}"


def _warn(found: dict[str, Entry], progress: Progress) -> None:
    noisy = [name for name, entry in found.items() if entry.noisy]
    if noisy:
        progress.warning(
            f"{len(noisy)} of {len(found)} entries stayed noisy and are flagged:"
            f" {', '.join(noisy[:3])}."
        )
    slow = [name for name, entry in found.items() if entry.delegated is False]
    if slow:
        progress.warning(
            f"the delegate did not take {len(slow)} of {len(found)} models whole, so slower kernels"
            f" ran: {', '.join(slow[:3])}."
        )


def _calibration(plan: Plan, found: dict[str, Entry]) -> Calibration | None:
    """Fitted on the fit networks, judged on the test networks; noisy networks are
    counted, and left out where enough quiet ones remain.

    A slope of one or two networks that happened to be quiet is further off than one of
    a dozen noisy medians.
    """
    networks = [(arch, found[f"net-{i}"]) for i, arch in enumerate((*plan.fit, *plan.test))]
    quiet = [not entry.noisy for _, entry in networks]
    sums = [sum(found[op.key].ms for op in arch.ops()) for arch, _ in networks]
    nets = [entry.ms for _, entry in networks]
    cut = len(plan.fit)
    fit, test = (_usable(part, quiet) for part in (range(cut), range(cut, len(networks))))
    if not fit:
        return None
    chains = [arch.ops() for arch, _ in networks]
    calibration = fit_calibration(
        [chains[i] for i in fit], [sums[i] for i in fit], [nets[i] for i in fit]
    )
    held_out = (
        judge(
            calibration, [chains[i] for i in test], [sums[i] for i in test], [nets[i] for i in test]
        )
        if test
        else None
    )
    return calibration.model_copy(
        update={"held_out": held_out, "noisy_networks": quiet.count(False)}
    )


def _usable(networks: Sequence[int], quiet: Sequence[bool]) -> list[int]:
    """The quiet ones of these networks, or all where fewer than ``MIN_NETWORKS`` are quiet."""
    calm = [i for i in networks if quiet[i]]
    return calm if len(calm) >= MIN_NETWORKS else list(networks)


def _entry(session: Session, name: str) -> Entry:
    rounds = session.rounds(name)
    runs = np.concatenate([np.asarray(ms) for ms in rounds])
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
    """Five significant digits: a clock tells no more, and tables of thousands of ops
    stay readable.
    """
    return float(f"{value:.5g}")
