"""One measuring session: model files timed on a device in interleaved rounds. Profiling
and validation share it.

A round goes once through all items in a new random order, in one process per runtime,
so drift (clock rate, temperature, neighbours) hits all items alike. ``speed.py`` then
removes the changes of speed from one measurement to the next. The time of an item is
the median over rounds of the median over runs, at the median speed of the session. If
the rounds of an item still spread more than allowed, further rounds follow.

A session that keeps its rows in a file resumes after a kill: it does not repeat what an
earlier process has measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hwnas.config import DeviceConfig
from hwnas.core.arch import Architecture
from hwnas.core.clock import is_possible
from hwnas.core.ops import Op
from hwnas.core.table import LatencyTable
from hwnas.devices.device import Connection, Device
from hwnas.devices.messages import excerpt
from hwnas.devices.speed import slowness
from hwnas.errors import DeviceError
from hwnas.printable import printable
from hwnas.progress import Progress
from hwnas.runs import JsonLines, is_number

Build = Callable[[Sequence[Op] | Architecture, str, str], Path]
"""Builds a model file to time: (ops, runtime, dtype) -> its path. Networks that are not
chains of ops are given as architectures.
"""
Raw = dict[str, Any]
"""JSON data: a row as connections yield it and sample files store it, or a plan."""


@dataclass(frozen=True)
class Bench:
    """What a measurement needs: the device, a connection to it, its settings, a builder
    of model files, and a place to report progress.

    ``folder`` holds temporary files, and the rows that must survive a kill.
    """

    device: Device
    connection: Connection
    settings: DeviceConfig
    build: Build
    folder: Path
    progress: Progress = field(default_factory=Progress)

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores to pin to: those of the configuration, or else the connection's
        choice. Empty: not pinned. Raises DeviceError.
        """
        if self.settings.cores is not None:
            return self.settings.cores
        return tuple(self.connection.cores(self.settings.threads))


@dataclass(frozen=True)
class Item:
    """A model file to time, and the name by which rows refer to it.

    ``ops`` are the ops in the file: simulated devices compute its time from them.
    ``image`` is a file to feed instead of noise, for models whose time depends on their
    input. ``repeat_if_noisy``: whether further rounds follow if this item is noisy.
    """

    name: str
    runtime: str
    path: Path
    ops: tuple[Op, ...]
    image: Path | None = None
    repeat_if_noisy: bool = True


@dataclass(frozen=True)
class Schedule:
    """How often and how long items are timed.

    In each round, an item runs for at least ``min_ms`` milliseconds and at least
    ``min_runs`` times; None leaves either to the runner's default. Items with
    ``repeat_if_noisy`` whose rounds spread more than ``max_spread`` are timed in up to
    ``max_rounds`` rounds. With ``together``, these further rounds time all items, instead of only the
    noisy ones. The order of a round is drawn from ``seed`` and the number of the round.
    """

    rounds: int = 1
    max_rounds: int = 1
    max_spread: float = np.inf
    min_ms: float | None = None
    min_runs: int | None = None
    seed: tuple[int, ...] = ()
    together: bool = False


@dataclass(frozen=True)
class Plan:
    """The work of one runner process: items of one runtime in one round, in order, each
    once.
    """

    items: tuple[Item, ...]
    round_number: int
    threads: int
    cores: tuple[int, ...]
    schedule: Schedule

    @property
    def runtime(self) -> str:
        """The runtime that all items share."""
        return self.items[0].runtime

    def raw(self) -> Raw:
        """The plan in the format that ``deploy/runner.py`` documents."""
        limits = {"min_ms": self.schedule.min_ms, "min_runs": self.schedule.min_runs}
        # keys that are absent get the runner's defaults
        limits_set = {name: value for name, value in limits.items() if value is not None}
        return {
            "runtime": self.runtime,
            "threads": self.threads,
            "cores": list(self.cores) or None,
            **limits_set,
            "items": [self._item(item) for item in self.items],
        }

    def _item(self, item: Item) -> Raw:
        raw: Raw = {
            "id": item.name,
            "path": str(item.path.resolve()),
            "round": self.round_number,
            "ops": [op.key for op in item.ops],
        }
        if item.image is not None:
            raw["input"] = str(item.image.resolve())
        return raw


@dataclass(frozen=True)
class Header:
    """The machine as the runner describes it before it measures. Missing values are
    ``"unknown"``. ``cores`` are those that the runtime may use, and ``pinned`` tells
    whether that is because the plan names them.
    """

    runtime: str = "unknown"
    runtime_package: str = "unknown"
    runtime_version: str = "unknown"
    cpu: str = "unknown"
    machine: str = "unknown"
    governor: str = "unknown"
    cores: list[int] | Literal["unknown"] = "unknown"
    threads: int | Literal["unknown"] = "unknown"
    pinned: bool | Literal["unknown"] = "unknown"

    @staticmethod
    def of(raw: Raw) -> Header:
        """Parse the row that begins a measurement. Values of another type are unknown."""
        text_fields = (
            "runtime",
            "runtime_package",
            "runtime_version",
            "cpu",
            "machine",
            "governor",
        )
        cores = raw.get("cores")
        threads = raw.get("threads")
        pinned = raw.get("pinned")
        values: Raw = {name: printable(str(raw[name])) for name in text_fields if name in raw}
        if isinstance(cores, list) and all(map(_is_index, cores)):
            values["cores"] = cores
        if _is_index(threads):
            values["threads"] = threads
        if isinstance(pinned, bool):
            values["pinned"] = pinned
        return Header(**values)


FIXED_FIELDS = (
    "cpu",
    "machine",
    "runtime_package",
    "runtime_version",
    "cores",
    "governor",
    "threads",
)
"""Fields of ``Header`` that must not change while a table is measured."""


@dataclass(frozen=True)
class Measurement:
    """``ms``: the time of each run of an item in one round, in milliseconds.

    ``delegated``: whether a delegate of the runtime ran the whole graph, or
    ``"unknown"``. ``fed``: whether the item was fed its image.
    """

    name: str
    round: int
    ms: list[float]
    delegated: bool | str
    fed: bool


@dataclass(frozen=True)
class Failure:
    """An item that the device cannot run, and the device's error message."""

    name: str
    error: str


@dataclass(frozen=True)
class Conditions:
    """The state of the device at one moment: ``{"celsius": 31.5}``."""

    values: Mapping[str, float | str]


@dataclass(frozen=True)
class Note:
    """A sentence to show to the user while the measurement goes on."""

    text: str


Row = Header | Measurement | Failure | Conditions | Note


def parse_row(raw: object) -> Row:
    """Parse a row of a connection. Raises DeviceError if its format is unknown, or if it
    holds times that no clock measures: none, negative ones, NaN.
    """
    row = _parsed(raw) if isinstance(raw, dict) else None
    if row is None:
        raise DeviceError(
            f"the device sent {excerpt(repr(raw), 120)}, which is not a row of a measurement:"
            " check the connection to it."
        )
    return row


def _parsed(raw: Raw) -> Row | None:
    if "note" in raw:
        return Note(excerpt(str(raw["note"])))
    if "runner" in raw:
        return Header.of(raw)
    if "conditions" in raw:
        return _conditions(raw["conditions"])
    if "id" in raw and "error" in raw:
        return Failure(excerpt(str(raw["id"])), excerpt(str(raw["error"])))
    if {"id", "round", "ms"} <= raw.keys():
        return _measurement(raw)
    return None


def _conditions(values: object) -> Conditions | None:
    if not isinstance(values, dict):
        return None
    if not all(isinstance(value, str) or is_number(value) for value in values.values()):
        return None
    return Conditions(values)


def _measurement(raw: Raw) -> Measurement | None:
    runs_ms = raw["ms"]
    if not isinstance(raw["id"], str) or not _is_index(raw["round"]):
        return None
    if not isinstance(runs_ms, list) or not all(map(is_number, runs_ms)):
        return None
    # a single run may be shorter than a tick of a coarse clock, but not half of them
    if not runs_ms or min(runs_ms) < 0 or not is_possible(float(np.median(runs_ms))):
        return None
    delegated = raw.get("delegated", "unknown")
    return Measurement(
        name=raw["id"],
        round=raw["round"],
        ms=runs_ms,
        delegated=delegated if isinstance(delegated, bool) else "unknown",
        fed=raw.get("input") == "image",
    )


def _is_index(value: object) -> bool:
    """Whether a JSON value is an integer from 0, as for rounds, cores and threads."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def measured_rows(connection: Connection, plan: Plan, folder: Path) -> Iterator[tuple[Row, Raw]]:
    """Measure a plan, and yield each row as it arrives, parsed and raw. Raises
    DeviceError if the measurement or any single item fails.
    """
    for raw in connection.measure(plan.raw(), folder):
        row = parse_row(raw)
        if isinstance(row, Failure):
            raise DeviceError(f"{row.name} does not run with {plan.runtime}: {row.error}")
        yield row, raw


class Session:
    """The rows measured so far, and the means to measure more.

    If ``samples`` is given, the session resumes from the rows in that file and appends
    new ones to it. Damaged rows are left out, so their items are measured again. ``run``
    raises DeviceError if the device has changed since the rows were measured, and appends
    nothing then; the constructor raises it if the device has changed within the file.

    Example:
        >>> session = Session(bench, items, Schedule(rounds=7, max_rounds=15, max_spread=0.1))     # doctest: +SKIP
        >>> session.run("measuring")                                                               # doctest: +SKIP
        >>> session.ms("model.tflite")                                                             # doctest: +SKIP
        1.234
    """

    def __init__(
        self,
        bench: Bench,
        items: Iterable[Item],
        schedule: Schedule,
        samples: JsonLines | None = None,
    ) -> None:
        self.bench, self.schedule, self.samples = bench, schedule, samples
        self.items = {item.name: item for item in items}
        self.headers: dict[str, Header] = {}
        self.conditions: dict[str, list[float | str]] = defaultdict(list)
        self.delegated: dict[str, bool | str] = {}
        self.fed: set[str] = set()
        """The items that were fed their image."""
        self._done: dict[tuple[str, int], list[float]] = {}
        """(item, round) -> the time of each run in milliseconds."""
        self._order: dict[tuple[str, int], None] = {}
        """(item, round) in the order of a session that is never killed. ``speed.py``
        needs the order, and a resumed session must give the same times.
        """
        if samples is not None:
            self._resume(samples)

    def run(self, description: str) -> None:
        """Measure all rounds, then further ones while items are noisy. Raises DeviceError
        if the measurement fails or if the device has changed.
        """
        schedule = self.schedule
        progress = self.bench.progress
        total = schedule.rounds * len(self.items)
        with progress.task(description, total, self._done_count) as task:
            for number in range(schedule.rounds):
                self._round(number, list(self.items), task.advance)

        for number in range(schedule.rounds, schedule.max_rounds):
            noisy = self.noisy
            if not noisy:
                return
            progress.debug(f"noisy after {number} rounds: {', '.join(noisy)}")
            again = list(self.items) if schedule.together else noisy
            message = f"measuring {len(again)} items again ({len(noisy)} noisy)"
            with progress.task(message, len(again)) as task:
                self._round(number, again, task.advance)

    def _resume(self, samples: JsonLines) -> None:
        """Keep the rows of a file. Raises DeviceError if the device changed in between."""
        damaged = 0
        header: Header | None = None
        for raw in samples.read():
            try:
                row = parse_row(raw)
            except DeviceError:
                damaged += 1
                continue
            if isinstance(row, Header):
                header = row
                continue
            # A header counts only once a row follows it: otherwise, the device may have
            # been refused at that point.
            if header is not None:
                self._keep(header)
                header = None
            self._keep(row)
        if damaged:
            self.bench.progress.info(
                f"damaged rows in {samples.path.name}: {damaged}; what they held is measured again"
            )

    def rounds(self, name: str) -> list[list[float]]:
        """The rounds of an item, each with the time of each run in milliseconds at the
        median speed of the session.
        """
        return self._rounds_ms[name]

    def ms(self, name: str) -> float:
        """The time of an item in milliseconds at the median speed of the session: the
        median over rounds of the median over runs.
        """
        return float(np.median([np.median(runs) for runs in self.rounds(name)]))

    @property
    def noisy(self) -> list[str]:
        """The ``repeat_if_noisy`` items whose rounds spread more than ``max_spread``."""
        noisy: list[str] = []
        for item in self.items.values():
            if not item.repeat_if_noisy:
                continue
            if spread_of(self.rounds(item.name)) > self.schedule.max_spread:
                noisy.append(item.name)
        return noisy

    def header(self, runtime: str) -> Header:
        """The latest header of a runtime."""
        return self.headers.get(runtime, Header())

    def drift(self, ops: Sequence[Op], table: LatencyTable) -> float:
        """The time of ops in this session divided by that of their table entries. Each op
        must be an item named by its key.
        """
        now_ms = sum(self.ms(op.key) for op in ops)
        table_ms = sum(table.entries[op.key].ms for op in ops)
        return now_ms / table_ms

    @cached_property
    def cores(self) -> tuple[int, ...]:
        """The cores to pin to. The device is asked only once, and not at all if nothing is
        left to measure.
        """
        return self.bench.cores

    @property
    def _done_count(self) -> int:
        """The number of finished measurements: an item counts once per round."""
        return len(self._done)

    @cached_property
    def _rounds_ms(self) -> dict[str, list[list[float]]]:
        """Item -> its rounds in order, each with the time of each run in milliseconds at
        the median speed of the session. Cached until ``_forget_times``.
        """
        measured = {key: self._done[key] for key in self._order if key in self._done}
        names = [name for name, _ in measured]
        medians = [float(np.median(runs)) for runs in measured.values()]
        factors = slowness(names, medians)

        rounds: dict[str, list[list[float]]] = {name: [] for name in self.items}
        for name, runs, factor in zip(names, measured.values(), factors, strict=True):
            rounds[name].append([run / float(factor) for run in runs])
        return rounds

    def _forget_times(self) -> None:
        """Drop the cached ``_rounds_ms``: ``_order`` or ``_done`` has changed."""
        self.__dict__.pop("_rounds_ms", None)

    def _round(self, number: int, names: Sequence[str], advance: Callable[[], None]) -> None:
        """Measure whatever is missing of a round, in the random order of that round."""
        rng = np.random.default_rng([*self.schedule.seed, number])
        by_runtime: dict[str, list[Item]] = defaultdict(list)
        for name in names:
            by_runtime[self.items[name].runtime].append(self.items[name])
        for _, items in sorted(by_runtime.items()):
            shuffled = [items[i] for i in rng.permutation(len(items))]
            self._order |= dict.fromkeys((item.name, number) for item in shuffled)
            self._forget_times()
            todo = tuple(item for item in shuffled if (item.name, number) not in self._done)
            if todo:
                threads = self.bench.settings.threads
                plan = Plan(todo, number, threads, self.cores, self.schedule)
                self._measure(plan, advance)

    def _measure(self, plan: Plan, advance: Callable[[], None]) -> None:
        with _appending(self.samples) as append:
            for row, raw in measured_rows(self.bench.connection, plan, self.bench.folder):
                if isinstance(row, Note):
                    self.bench.progress.info(row.text)
                    continue
                # first, so that the rows of a device that is refused do not get into the file
                self._keep(row)
                append(raw)
                if isinstance(row, Measurement):
                    advance()

    def _keep(self, row: Row) -> None:
        if isinstance(row, Header):
            self._check(row)
            self.headers[row.runtime] = row
        elif isinstance(row, Conditions):
            for name, value in row.values.items():
                self.conditions[name].append(value)
        elif isinstance(row, Measurement) and row.name in self.items:
            self._done[row.name, row.round] = row.ms
            self._forget_times()
            self.delegated[row.name] = row.delegated
            if row.fed:
                self.fed.add(row.name)

    def _check(self, header: Header) -> None:
        """Raise DeviceError if a header differs from the previous one of its runtime: the
        device was replaced or set up differently in the meantime.

        Sessions without a file are not checked. They are short, so the device hardly
        changes while they run.
        """
        before = self.headers.get(header.runtime)
        if before is None or self.samples is None:
            return
        for name in FIXED_FIELDS:
            old = getattr(before, name)
            new = getattr(header, name)
            if old != new:
                raise DeviceError(
                    f"{name} was {old!r} when this session began and is {new!r} now: rounds"
                    " measured under different conditions cannot be combined, so start again with"
                    " --fresh."
                )


@contextmanager
def _appending(samples: JsonLines | None) -> Iterator[Callable[[Raw], None]]:
    """A function that appends a row to the sample file, or does nothing without a file."""
    if samples is None:
        yield lambda raw: None
        return
    with samples.appending() as append:
        yield append


def spread_of(rounds: Iterable[Sequence[float]]) -> float:
    """Interquartile range of the rounds' medians divided by their median."""
    medians = [float(np.median(runs)) for runs in rounds]
    low, middle, high = np.percentile(medians, [25, 50, 75])
    return float((high - low) / middle)
