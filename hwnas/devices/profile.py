"""Profiling: from a space and a device to a calibrated latency table.

1. *Plan*: every op of the space, and whole networks sampled over the space's range of sizes, some to fit the calibration and
   some to judge it.
2. *Build*: a model file for each, cached by op key.
3. *Measure* in rounds. A round is one process that goes once through everything in a new random order, so that whatever drifts
   (clock, temperature, neighbours) hits all entries alike. An entry is the median over rounds of the median over runs.
4. *Judge the noise*: entries whose rounds spread more than allowed get further rounds; those that still do are flagged.
5. *Calibrate*: a map from entries to networks (core/table.py), fitted on some networks, judged on the others.

Where only whole networks can be timed, or op by op would take too long, ``profile.mode = "networks"`` measures sampled networks
alone, and the entries are fitted to them (tables/fit.py).

Rows are appended to ``samples.jsonl`` as they come, so that a killed profile resumes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import DeviceConfig, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.space import SearchSpace
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader, fit_calibration, judge
from hwnas.devices.device import Connection, Device
from hwnas.errors import DeviceError, TableError
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.tables.fit import MIN_NETWORKS, fit_table
from hwnas.tables.prior import Prior

Build = Callable[[tuple[Op, ...] | Architecture, str, str], Path]
"""From a chain of ops (or from a network with a detector, which is no chain), a runtime and a dtype to the file to time."""
Row = dict[str, Any]
CONDITIONS = ("cpu", "machine", "runtime_package", "runtime_version", "cores", "governor", "threads")
"""What must be the same in all rounds of a table."""


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


def profile(
    space: SearchSpace,
    device: Device,
    connection: Connection,
    build: Build,
    settings: DeviceConfig,
    config: ProfileConfig,
    folder: Path,
    progress: Progress,
    seed: int = 0,
    named: Sequence[Architecture] = (),
) -> LatencyTable:
    """Measure ``space``, and the ops of ``named`` networks, on ``device`` and return the table.

    ``build(ops, runtime, dtype)`` gives the file of a chain of ops.
    """
    known = [LatencyTable.load(Path(path).expanduser()) for path in config.prior] if config.mode == "networks" else []
    Prior.of(planned_ops(space, named), known)  # refuses a table that is no prior of this space before anything is measured
    usable = connection.runtimes()
    if settings.runtime not in usable:
        has = ", ".join(usable.values()) or "no runtime"
        raise DeviceError(f"{device.id} does not run {settings.runtime} (it has {has}): install it there, or set device.runtime.")
    plan = make_plan(space, config, seed, named)
    files = {}
    with progress.task(f"building {len(plan.items)} models", len(plan.items)) as task:
        for name in plan.items:
            files[name] = build(plan.built(name), settings.runtime, settings.dtype)
            task.advance()
    samples = JsonLines(folder / "samples.jsonl")
    measure = _Measurement(plan, files, connection, settings, config, samples, folder, seed, progress.say)
    with progress.task("measuring", config.rounds * len(files), measure.rows) as task:
        for number in range(config.rounds):
            measure.round(number, list(files), task.advance)
    for number in range(config.rounds, config.max_rounds):
        noisy = [name for name in files if spread_of(measure.rounds(name)) > config.max_spread]
        if not noisy:
            break
        progress.detail(f"noisy after {number} rounds: {', '.join(noisy)}")
        with progress.task(f"measuring {len(noisy)} noisy entries again", len(noisy)) as task:
            measure.round(number, noisy, task.advance)
    found = {name: _entry(measure.rounds(name), config.max_spread, measure.delegated[name]) for name in plan.items}
    _warn(found, progress)
    header, provenance = _header(space, device, settings, measure.header), _provenance(space, config, measure.conditions)
    if config.mode == "networks":
        return _fitted(planned_ops(space, named), plan, found, known, header, provenance, np.random.default_rng([seed, 78]))
    return LatencyTable(
        header=header, entries={op.key: found[op.key] for op in plan.ops}, calibration=_calibration(plan, found), provenance=provenance
    )


class _Measurement:
    """The rows measured so far, and how to get more."""

    def __init__(
        self,
        plan: Plan,
        files: dict[str, Path],
        connection: Connection,
        settings: DeviceConfig,
        config: ProfileConfig,
        samples: JsonLines,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.files, self.connection, self.settings = plan, files, connection, settings
        self.config, self.samples, self.folder, self.seed, self.say = config, samples, folder, seed, say
        self.header: Row = {}
        self.conditions: dict[str, list[float | str]] = defaultdict(list)
        self.done: dict[str, dict[int, list[float]]] = {name: {} for name in files}
        self.delegated: dict[str, bool | str] = {}
        for row in samples.read():
            self._keep(row)

    def _keep(self, row: Row) -> None:
        if "runner" in row:
            changed = [name for name in CONDITIONS if self.header and self.header.get(name) != row.get(name)]
            if changed:
                raise DeviceError(
                    f"{changed[0]} was {self.header.get(changed[0])!r} when this profile began and is {row.get(changed[0])!r} now: "
                    "the rounds do not belong together, so start again with --fresh."
                )
            self.header = row
        elif "conditions" in row:
            for name, value in row["conditions"].items():
                self.conditions[name].append(value)
        elif row["id"] in self.done:
            self.done[row["id"]][row["round"]] = row["ms"]
            self.delegated[row["id"]] = row.get("delegated", "unknown")

    @property
    def rows(self) -> int:
        """How many items have been measured, rounds counted apart."""
        return sum(map(len, self.done.values()))

    def rounds(self, name: str) -> list[list[float]]:
        """The runs of each round of an item, in milliseconds."""
        return [runs for _, runs in sorted(self.done[name].items())]

    def round(self, number: int, names: list[str], advance: Callable[[], None]) -> None:
        """Measure what is missing of a round, in the round's own random order."""
        order = np.random.default_rng([self.seed, number]).permutation(len(names))
        todo = [names[i] for i in order if number not in self.done[names[i]]]
        if not todo:
            return
        items = self.plan.items
        plan = {
            "runtime": self.settings.runtime,
            "threads": self.settings.threads,
            "cores": list(self.settings.cores or self.connection.cores(self.settings.threads)),
            "min_ms": self.config.min_ms,
            "min_runs": self.config.min_runs,
            "items": [{"id": name, "path": str(self.files[name]), "round": number, "ops": [op.key for op in items[name]]} for name in todo],
        }
        with self.samples.appending() as append:
            for row in self.connection.measure(plan, self.folder):
                if "note" in row:
                    self.say(row["note"])
                    continue
                if "error" in row:
                    raise DeviceError(f"{row['id']} does not run with {self.settings.runtime}: {row['error']}")
                append(row)
                self._keep(row)
                if "id" in row:
                    advance()


def spread_of(rounds: Iterable[list[float]]) -> float:
    """Interquartile range of the rounds' medians divided by their median."""
    medians = [float(np.median(runs)) for runs in rounds]
    low, middle, high = np.percentile(medians, [25, 50, 75])
    return float((high - low) / middle)


def _header(space: SearchSpace, device: Device, settings: DeviceConfig, header: Row) -> TableHeader:
    runs: dict[str, str] = defaultdict(lambda: "unknown", {key: str(value) for key, value in header.items()})
    return TableHeader(
        device=device.id,
        cpu=runs["cpu"],
        machine=runs["machine"],
        runtime=settings.runtime,
        runtime_version=f"{runs['runtime_package']} {runs['runtime_version']}",
        dtype=settings.dtype,
        threads=settings.threads,
        cores=tuple(header["cores"]) if isinstance(header.get("cores"), list) else "unknown",
        governor=runs["governor"],
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


def _fitted(
    ops: Sequence[Op],
    plan: Plan,
    found: dict[str, Entry],
    known: list[LatencyTable],
    header: TableHeader,
    provenance: dict[str, str],
    rng: np.random.Generator,
) -> LatencyTable:
    """The table of whole networks alone; noisy ones are left out, and counted."""
    networks = {arch.ops(): (arch, found[f"net-{i}"]) for i, arch in enumerate(plan.fit)}
    quiet = [(arch, entry.ms) for arch, entry in networks.values() if not entry.noisy]
    if len(quiet) < MIN_NETWORKS:
        raise TableError(
            f"{len(networks) - len(quiet)} of {len(networks)} networks stayed noisy, and a fit needs {MIN_NETWORKS} quiet ones: "
            "measure on a quieter device, more networks, or with a larger profile.max_spread."
        )
    fitted = fit_table(ops, quiet, header, rng, known=known)
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


def _entry(rounds: list[list[float]], max_spread: float, delegated: Any) -> Entry:
    runs = np.concatenate([np.asarray(ms) for ms in rounds])
    spread = spread_of(rounds)
    return Entry(
        ms=_rounded(np.median([np.median(ms) for ms in rounds])),
        p10_ms=_rounded(np.percentile(runs, 10)),
        p90_ms=_rounded(np.percentile(runs, 90)),
        runs=len(runs),
        rounds=len(rounds),
        spread=_rounded(spread),
        noisy=spread > max_spread,
        delegated=delegated,
    )


def _rounded(value: float) -> float:
    """Five significant digits: a clock tells no more, and tables of thousands of ops stay readable."""
    return float(f"{value:.5g}")
