"""One measuring session: model files timed on a device in interleaved rounds. Profiling
and validation share it.

A round goes once through everything in a new random order, in one process per runtime,
so that whatever drifts (clock, temperature, neighbours) hits all items alike. What
still changes from one measurement to the next is taken out (``speed.py``): the time of
an item is the median over rounds of the median over runs, at the median speed of the
session. Where rounds spread more than allowed even so, further rounds follow.

A session that keeps its rows in a file resumes after a kill: what a round has measured
is not measured again.
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
from hwnas.core.ops import Op
from hwnas.core.table import LatencyTable
from hwnas.devices.device import Connection, Device
from hwnas.devices.speed import slowness
from hwnas.errors import DeviceError
from hwnas.progress import Progress
from hwnas.runs import JsonLines

Build = Callable[[Sequence[Op] | Architecture, str, str], Path]
"""From a chain of ops (or from a network that is no chain), a runtime and a dtype to
the file to time.
"""
Raw = dict[str, Any]
"""A row as a connection yields it and as a file of samples keeps it."""


@dataclass(frozen=True)
class Bench:
    """Where files are timed: a device, the way to it and how it is used; what makes the
    files; whom to tell.

    ``folder`` is for what is under way, and for what has to survive a kill.
    """

    device: Device
    connection: Connection
    settings: DeviceConfig
    build: Build
    folder: Path
    progress: Progress = field(default_factory=Progress)

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores to pin to: those of the configuration, else the device's own
        choice. Raises DeviceError.
        """
        return tuple(self.settings.cores or self.connection.cores(self.settings.threads))


@dataclass(frozen=True)
class Item:
    """A model file to time, under the name that its rows carry.

    ``ops`` are for devices whose clock is a formula. ``image`` is a file that is fed
    instead of noise, for models whose time depends on what they see. ``judged``:
    whether its noise calls for further rounds.
    """

    name: str
    runtime: str
    path: Path
    ops: tuple[Op, ...]
    image: Path | None = None
    judged: bool = True


@dataclass(frozen=True)
class Schedule:
    """How often everything is timed, and how long: ``min_ms`` and ``min_runs`` a round,
    by default the runner's own.

    Items whose rounds spread more than ``max_spread`` are timed in up to ``max_rounds``
    rounds; where they belong ``together``, so is everything else. The order of a round
    is drawn from ``seed`` and the round's number.
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
    """What one process of a runner does: the items of one runtime, once each, in order,
    in one round.
    """

    items: tuple[Item, ...]
    number: int
    threads: int
    cores: tuple[int, ...]
    schedule: Schedule

    @property
    def runtime(self) -> str:
        """Of all items."""
        return self.items[0].runtime

    def raw(self) -> Raw:
        """As a connection takes it (``deploy/runner.py`` documents it)."""
        limits = {"min_ms": self.schedule.min_ms, "min_runs": self.schedule.min_runs}
        return {
            "runtime": self.runtime,
            "threads": self.threads,
            "cores": list(self.cores),
            **{name: value for name, value in limits.items() if value is not None},
            "items": [self._item(item) for item in self.items],
        }

    def _item(self, item: Item) -> Raw:
        path = str(item.path.resolve())
        fed = {} if item.image is None else {"input": str(item.image.resolve())}
        return {
            "id": item.name,
            "path": path,
            "round": self.number,
            "ops": [op.key for op in item.ops],
            **fed,
        }


@dataclass(frozen=True)
class Header:
    """What a runner says of the machine before it measures. What it does not say is
    ``"unknown"``.
    """

    runtime: str = "unknown"
    runtime_package: str = "unknown"
    runtime_version: str = "unknown"
    cpu: str = "unknown"
    machine: str = "unknown"
    governor: str = "unknown"
    cores: list[int] | Literal["unknown"] = "unknown"
    threads: int | Literal["unknown"] = "unknown"

    @staticmethod
    def of(raw: Raw) -> Header:
        """A header of the row that begins a measurement."""
        words = ("runtime", "runtime_package", "runtime_version", "cpu", "machine", "governor")
        cores = raw.get("cores")
        return Header(
            **{name: str(raw[name]) for name in words if name in raw},
            cores=cores if isinstance(cores, list) else "unknown",
            threads=raw.get("threads", "unknown"),
        )


CONDITIONS = (
    "cpu",
    "machine",
    "runtime_package",
    "runtime_version",
    "cores",
    "governor",
    "threads",
)
"""What must be the same in all headers of a table."""


@dataclass(frozen=True)
class Measurement:
    """Every single run of an item in a round, in milliseconds.

    ``delegated`` says whether the runtime's delegate took the whole graph, ``fed``
    whether the item got its image.
    """

    name: str
    round: int
    ms: list[float]
    delegated: bool | str
    fed: bool


@dataclass(frozen=True)
class Failure:
    """An item that the device does not run, and its words for it."""

    name: str
    error: str


@dataclass(frozen=True)
class Conditions:
    """The state of the device at a moment: ``{"celsius": 31.5}``."""

    values: Mapping[str, float | str]


@dataclass(frozen=True)
class Note:
    """A sentence for the person who waits."""

    text: str


Row = Header | Measurement | Failure | Conditions | Note


def typed(raw: Raw) -> Row:
    """What a row of a connection says. Raises DeviceError where it is no row."""
    if "note" in raw:
        return Note(raw["note"])
    if "runner" in raw:
        return Header.of(raw)
    if "conditions" in raw:
        return Conditions(raw["conditions"])
    if "id" in raw and "error" in raw:
        return Failure(raw["id"], raw["error"])
    if {"id", "round", "ms"} <= raw.keys():
        delegated, fed = raw.get("delegated", "unknown"), raw.get("input") == "image"
        return Measurement(raw["id"], raw["round"], raw["ms"], delegated, fed)
    raise DeviceError(
        f"the device answered {str(raw)[:80]}, which is no row of a measurement: check its"
        " connection."
    )


def answers(connection: Connection, plan: Plan, folder: Path) -> Iterator[tuple[Row, Raw]]:
    """The rows of a plan as they come, each beside what it was read from. Raises
    DeviceError, also where an item fails.
    """
    for raw in connection.measure(plan.raw(), folder):
        row = typed(raw)
        if isinstance(row, Failure):
            raise DeviceError(f"{row.name} does not run with {plan.runtime}: {row.error}")
        yield row, raw


class Session:
    """The rows measured so far, and how to get more. With ``samples``, what that file
    holds is taken up, and added to.

    Raises DeviceError where the samples are of other conditions.

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
        """Items that got their image."""
        self._done: dict[tuple[str, int], list[float]] = {}
        """(item, round) -> its runs in milliseconds."""
        self._order: dict[tuple[str, int], None] = {}
        """(item, round) in the order in which a session that is never killed measures."""
        for raw in samples.read() if samples is not None else ():
            self._keep(typed(raw))

    def run(self, description: str) -> None:
        """All rounds, and further ones while items are noisy. Raises DeviceError."""
        schedule, progress = self.schedule, self.bench.progress
        with progress.task(description, schedule.rounds * len(self.items), self._count) as task:
            for number in range(schedule.rounds):
                self._round(number, list(self.items), task.advance)
        for number in range(schedule.rounds, schedule.max_rounds):
            noisy = self.noisy
            if not noisy:
                return
            progress.debug(f"noisy after {number} rounds: {', '.join(noisy)}")
            again = list(self.items) if schedule.together else noisy
            with progress.task(f"measuring {len(noisy)} noisy entries again", len(again)) as task:
                self._round(number, again, task.advance)

    def rounds(self, name: str) -> list[list[float]]:
        """The runs of each round of an item, in milliseconds at the session's median speed."""
        return self._at_one_speed[name]

    def ms(self, name: str) -> float:
        """The time of an item in milliseconds at the session's median speed: the median
        over rounds of the median over runs.
        """
        return float(np.median([np.median(runs) for runs in self.rounds(name)]))

    @property
    def noisy(self) -> list[str]:
        """The judged items whose rounds spread more than allowed."""
        judged = [item.name for item in self.items.values() if item.judged]
        return [name for name in judged if spread_of(self.rounds(name)) > self.schedule.max_spread]

    def header(self, runtime: str) -> Header:
        """What the runner of a runtime said last."""
        return self.headers.get(runtime, Header())

    def drift(self, ops: Sequence[Op], table: LatencyTable) -> float:
        """The time of ops now against that of their entries in a table. Each is an item
        under its key.
        """
        return sum(self.ms(op.key) for op in ops) / sum(table.entries[op.key].ms for op in ops)

    @cached_property
    def cores(self) -> tuple[int, ...]:
        """The cores that everything is pinned to. A device is asked once, and not where
        nothing is left to measure.
        """
        return self.bench.cores

    @property
    def _count(self) -> int:
        """How many items have been measured, rounds counted apart."""
        return len(self._done)

    @cached_property
    def _at_one_speed(self) -> dict[str, list[list[float]]]:
        """Item -> its rounds in order, each with its runs."""
        measured = {key: self._done[key] for key in self._order if key in self._done}
        slow = slowness(
            [name for name, _ in measured], [float(np.median(runs)) for runs in measured.values()]
        )
        found: dict[str, list[list[float]]] = {name: [] for name in self.items}
        for ((name, _), runs), factor in zip(measured.items(), slow, strict=True):
            found[name].append([run / float(factor) for run in runs])
        return found

    def _round(self, number: int, names: Sequence[str], advance: Callable[[], None]) -> None:
        """Measure what is missing of a round, in the round's own random order."""
        rng = np.random.default_rng([*self.schedule.seed, number])
        by_runtime: dict[str, list[Item]] = defaultdict(list)
        for name in names:
            by_runtime[self.items[name].runtime].append(self.items[name])
        for _, items in sorted(by_runtime.items()):
            shuffled = [items[i] for i in rng.permutation(len(items))]
            self._order |= dict.fromkeys((item.name, number) for item in shuffled)
            self.__dict__.pop("_at_one_speed", None)
            todo = tuple(item for item in shuffled if (item.name, number) not in self._done)
            if todo:
                self._measure(
                    Plan(todo, number, self.bench.settings.threads, self.cores, self.schedule),
                    advance,
                )

    def _measure(self, plan: Plan, advance: Callable[[], None]) -> None:
        with _appending(self.samples) as append:
            for row, raw in answers(self.bench.connection, plan, self.bench.folder):
                if isinstance(row, Note):
                    self.bench.progress.info(row.text)
                    continue
                append(raw)
                self._keep(row)
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
            self.__dict__.pop("_at_one_speed", None)
            self.delegated[row.name] = row.delegated
            self.fed |= {row.name} if row.fed else set()

    def _check(self, header: Header) -> None:
        """Kept rows may be of another day, when the device was another one or otherwise set up."""
        before = self.headers.get(header.runtime)
        if before is None or self.samples is None:
            return
        for name in CONDITIONS:
            was, is_now = getattr(before, name), getattr(header, name)
            if was != is_now:
                raise DeviceError(
                    f"{name} was {was!r} when this profile began and is {is_now!r} now: "
                    "the rounds do not belong together, so start again with --fresh."
                )


@contextmanager
def _appending(samples: JsonLines | None) -> Iterator[Callable[[Raw], None]]:
    """What adds a row to a file of samples, or drops it where there is no such file."""
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
