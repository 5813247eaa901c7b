"""Profiling: from a space and a device to a calibrated latency table.

1. *Plan*: every op of the space, and whole networks sampled over the space's range of sizes, some to fit the calibration and
   some to judge it.
2. *Build*: a model file for each, cached by op key.
3. *Measure* in rounds (``session``): entries whose rounds spread more than allowed get further rounds.
4. *Judge the noise*: entries whose rounds still spread are flagged.
5. *Calibrate*: a map from entries to networks (core/table.py), fitted on some networks, judged on the others.

Where only whole networks can be timed, or op by op would take too long, ``profile.mode = "networks"`` measures sampled networks
alone, and the entries are fitted to them (tables/fit.py).

Rows are kept in ``samples.jsonl`` as they come, so that a killed profile resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from hwnas.config import ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.space import SearchSpace
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader, fit_calibration, judge
from hwnas.devices.session import Bench, Item, Schedule, Session, spread_of
from hwnas.errors import DeviceError, TableError
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.tables.fit import MIN_NETWORKS, fit_table
from hwnas.tables.prior import Prior


@dataclass(frozen=True)
class Plan:
    """What is measured: item id -> its chain of ops. Ops come under their keys, networks under ``net-<n>``."""

    ops: tuple[Op, ...]
    fit: tuple[Architecture, ...]
    test: tuple[Architecture, ...]

    @property
    def items(self) -> dict[str, tuple[Op, ...]]:
        """All items in order."""
        networks = {f"net-{i}": arch.ops() for i, arch in enumerate((*self.fit, *self.test))}
        return {op.key: (op,) for op in self.ops} | networks

    def built(self, name: str) -> tuple[Op, ...] | Architecture:
        """What the file of an item is made of."""
        number = name.removeprefix("net-")
        arch = (*self.fit, *self.test)[int(number)] if number != name else None
        return arch if arch is not None and (arch.detector is not None or arch.graph) else self.items[name]


def make_plan(space: SearchSpace, config: ProfileConfig, seed: int, named: Sequence[Architecture] = ()) -> Plan:
    """Every op of the space and of ``named`` networks, and the calibration networks: fit and test ones alternate over the range of sizes.

    In mode ``networks``: as many networks as asked for, the named ones beside them, and no op.
    """
    if config.mode == "networks":
        return Plan((), (*spread_networks(space, config.sampled, np.random.default_rng([seed, 77])), *named), ())
    count = config.fit_networks + config.test_networks
    networks = spread_networks(space, count, np.random.default_rng([seed, 77]))
    test = {int((i + 0.5) * count / config.test_networks) for i in range(config.test_networks)} if config.test_networks else set()
    return Plan(
        planned_ops(space, named),
        tuple(arch for i, arch in enumerate(networks) if i not in test),
        tuple(arch for i, arch in enumerate(networks) if i in test),
    )


def planned_ops(space: SearchSpace, named: Sequence[Architecture]) -> tuple[Op, ...]:
    """The ops of a space, then those of named networks that it lacks, each once."""
    return tuple(dict.fromkeys((*space.ops, *(op for arch in named for op in arch.ops()))))


def spread_networks(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """``count`` architectures spread evenly over the space's range of MACs, small to large.

    Uniform picks crowd around the middle, so each candidate draws from its own bias towards small or large options.
    """
    if count == 0:
        return []
    orders = _cheap_first(space)
    candidates = []
    for _ in range(50 * count):
        bias, picks = rng.normal(0.0, 2.0), {}
        for choice in space.choices:
            p = np.exp(bias * np.linspace(-1, 1, len(choice.options)))
            picks[choice.key] = choice.options[int(orders[choice.key][rng.choice(len(p), p=p / p.sum())])]
        candidates.append(space.decode(picks))
    candidates.sort(key=lambda arch: arch.macs)
    macs = np.array([arch.macs for arch in candidates], dtype=float)
    wanted = np.linspace(macs[0], macs[-1], count)
    chosen = dict.fromkeys(int(np.abs(macs - value).argmin()) for value in wanted)
    spare = (int(i) for i in rng.permutation(len(candidates)) if int(i) not in chosen)
    indices = sorted([*chosen, *(next(spare) for _ in range(count - len(chosen)))])
    return [candidates[i] for i in indices]


def _cheap_first(space: SearchSpace) -> dict[str, np.ndarray]:
    """Choice key -> its option positions, fewest MACs first, averaged over what else the terms depend on."""
    macs = {choice.key: np.zeros(len(choice.options)) for choice in space.choices}
    for term in space.terms():
        array = np.array([0 if op is None else op.macs for op in term.ops], dtype=float).reshape(term.shape)
        for axis, key in enumerate(term.keys):
            macs[key] += array.mean(axis=tuple(i for i in range(array.ndim) if i != axis))
    return {key: np.argsort(values, kind="stable") for key, values in macs.items()}


def profile(bench: Bench, space: SearchSpace, config: ProfileConfig, seed: int = 0, named: Sequence[Architecture] = ()) -> LatencyTable:
    """Measure ``space``, and the ops of ``named`` networks, on a device and return the table. Raises DeviceError or TableError."""
    settings, progress = bench.settings, bench.progress
    known = [LatencyTable.load(Path(path).expanduser()) for path in config.prior] if config.mode == "networks" else []
    Prior.of(planned_ops(space, named), known)  # refuses a table that is no prior of this space before anything is measured
    usable = bench.connection.runtimes()
    if settings.runtime not in usable:
        has = ", ".join(usable.values()) or "no runtime"
        raise DeviceError(f"{bench.device.id} does not run {settings.runtime} (it has {has}): install it there, or set device.runtime.")
    plan = make_plan(space, config, seed, named)
    session = Session(bench, _items(plan, bench), _schedule(config, seed), JsonLines(bench.folder / "samples.jsonl"))
    session.run("measuring")
    found = {name: _entry(session, name) for name in plan.items}
    _warn(found, progress)
    measured = _Measured(plan, found, _header(space, session), _provenance(space, config, session.conditions))
    if config.mode == "networks":
        return _fitted(measured, planned_ops(space, named), known, np.random.default_rng([seed, 78]))
    entries = {op.key: found[op.key] for op in plan.ops}
    calibration = _calibration(plan, found)
    return LatencyTable(header=measured.header, entries=entries, calibration=calibration, provenance=measured.provenance)


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


def _provenance(space: SearchSpace, config: ProfileConfig, conditions: dict[str, list[float | str]]) -> dict[str, str]:
    return {
        "method": f"hwnas profile, {config.rounds} to {config.max_rounds} shuffled rounds",
        "space_sha256": space.sha256,
        **{f"device_{name}": _range(values) for name, values in conditions.items()},
    }


def _fitted(measured: _Measured, ops: Sequence[Op], known: list[LatencyTable], rng: np.random.Generator) -> LatencyTable:
    """The table of whole networks alone; noisy ones are left out, and counted."""
    provenance = measured.provenance
    networks = {arch.ops(): (arch, measured.found[f"net-{i}"]) for i, arch in enumerate(measured.plan.fit)}
    quiet = [(arch, entry.ms) for arch, entry in networks.values() if not entry.noisy]
    if len(quiet) < MIN_NETWORKS:
        raise TableError(
            f"{len(networks) - len(quiet)} of {len(networks)} networks stayed noisy, and a fit needs {MIN_NETWORKS} quiet ones: "
            "measure on a quieter device, more networks, or with a larger profile.max_spread."
        )
    fitted = fit_table(ops, quiet, measured.header, rng, known=known)
    assert fitted.calibration is not None
    calibration = fitted.calibration.model_copy(update={"noisy_networks": len(networks) - len(quiet)})
    method = f"{provenance['method']} of whole networks; {fitted.provenance['method']}"
    return fitted.model_copy(update={"calibration": calibration, "provenance": {**provenance, **fitted.provenance, "method": method}})


def _range(values: list[float | str]) -> str:
    """What a condition of the device was over the whole measurement: ``31.5 to 38`` or ``schedutil``."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values) or min(numbers) == max(numbers):
        return ", ".join(sorted({str(value) for value in values}))
    return f"{min(numbers):g} to {max(numbers):g}"


def _warn(found: dict[str, Entry], progress: Progress) -> None:
    noisy = [name for name, entry in found.items() if entry.noisy]
    if noisy:
        progress.warn(f"{len(noisy)} of {len(found)} entries stayed noisy and are flagged: {', '.join(noisy[:3])}.")
    slow = [name for name, entry in found.items() if entry.delegated is False]
    if slow:
        progress.warn(f"the delegate did not take {len(slow)} of {len(found)} models whole, so slower kernels ran: {', '.join(slow[:3])}.")


def _calibration(plan: Plan, found: dict[str, Entry]) -> Calibration | None:
    """Fitted on the fit networks, judged on the test networks; noisy networks are left out of both, and counted."""
    networks = [(arch, found[f"net-{i}"]) for i, arch in enumerate((*plan.fit, *plan.test))]
    quiet = [not entry.noisy for _, entry in networks]
    sums = [sum(found[op.key].ms for op in arch.ops()) for arch, _ in networks]
    nets = [entry.ms for _, entry in networks]
    cut = len(plan.fit)
    fit, test = ([i for i in part if quiet[i]] for part in (range(cut), range(cut, len(networks))))
    if not fit:
        return None
    chains = [arch.ops() for arch, _ in networks]
    calibration = fit_calibration([chains[i] for i in fit], [sums[i] for i in fit], [nets[i] for i in fit])
    held_out = judge(calibration, [chains[i] for i in test], [sums[i] for i in test], [nets[i] for i in test]) if test else None
    return calibration.model_copy(update={"held_out": held_out, "noisy_networks": quiet.count(False)})


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
    """Five significant digits: a clock tells no more, and tables of thousands of ops stay readable."""
    return float(f"{value:.5g}")
