"""The parts of an estimate, and the stopwatch that limits how long estimating takes.

    seconds of a stage = sum over its parts of  count * seconds each

Seconds are wall-clock seconds on this computer at its current load.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hwnas.progress import duration

ALIKE = 1.25
"""Least and most seconds whose ratio is below this are shown as a single number."""
SHOWN_PARTS = 3
"""Most parts of a stage that are shown, the longest ones."""


@dataclass(frozen=True)
class Part:
    """Something that a stage does ``count`` times, or up to ``most`` times, with
    ``each`` seconds every time.
    """

    name: str
    count: float
    each: float
    most: float | None = None

    @property
    def seconds(self) -> float:
        """Expected seconds."""
        return self.count * self.each

    @property
    def most_seconds(self) -> float:
        """Seconds at most."""
        return max(self.count, self.most or 0) * self.each


@dataclass(frozen=True)
class TimeEstimate:
    """What a stage takes.

    ``unknown`` is the reason if it, or a part of it, is unknown. ``current``: the stage
    is up to date and will not run.
    """

    parts: tuple[Part, ...] = ()
    memory_bytes: int | None = None
    disk_bytes: float = 0.0
    unknown: str = ""
    current: bool = False

    @property
    def seconds(self) -> float:
        """Expected seconds of all known parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def most_seconds(self) -> float:
        """Seconds of all known parts at most."""
        return sum(part.most_seconds for part in self.parts)

    def __str__(self) -> str:
        if self.current:
            return "up to date, skipped"
        known = []
        if self.parts:
            known.append(_time_text(self))
            if self.memory_bytes:
                known.append(f"{size(self.memory_bytes)} of memory")
        if self.disk_bytes:
            known.append(f"{size(self.disk_bytes)} on disk")
        clauses = []
        if known:
            clauses.append(", ".join(known))
        if self.unknown:
            clauses.append(f"unknown: {self.unknown}")
        return "; ".join(clauses)


def _time_text(estimate: TimeEstimate) -> str:
    longest = sorted(estimate.parts, key=lambda part: -part.most_seconds)[:SHOWN_PARTS]
    parts = ", ".join(f"{part.name} {span(part.seconds, part.most_seconds)}" for part in longest)
    return f"about {span(estimate.seconds, estimate.most_seconds)} ({parts})"


def span(least: float, most: float) -> str:
    """A range of seconds in words, such as ``3 to 6 min``; ``3 min`` if both are
    similar.
    """
    low, high = duration(least), duration(most)
    if low == high or most < ALIKE * least:
        return high
    unit = f" {high.split(' ')[-1]}"
    return f"{low.removesuffix(unit)} to {high}"


def size(count: float) -> str:
    """A number of bytes in words, such as ``1.2 GB`` or ``12 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 10 * factor:
            return f"{count / factor:.0f} {unit}"
        if count >= factor:
            return f"{count / factor:.2g} {unit}"
    return f"{count / 1e3:.0f} kB"


def total(estimates: Iterable[TimeEstimate]) -> str:
    """All stages together, in words: "at least" if something is unknown,
    else "about".
    """
    pending = [estimate for estimate in estimates if not estimate.current]
    if not pending:
        return "nothing to do"
    known = [estimate for estimate in pending if estimate.parts]
    if not known:
        return "unknown"
    least = sum(estimate.seconds for estimate in known)
    most = sum(estimate.most_seconds for estimate in known)
    # Stages run one after another, so memory does not add up; files stay, so disk does.
    memory = max((estimate.memory_bytes or 0) for estimate in known)
    disk = sum(estimate.disk_bytes for estimate in known)
    qualifier = "at least" if any(estimate.unknown for estimate in pending) else "about"
    return f"{qualifier} {span(least, most)}, {size(memory)} of memory, {size(disk)} on disk"


class Stopwatch:
    """Times calls within a budget of ``seconds``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = seconds
        self._start = clock()

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.used >= self._seconds

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = self._clock()
        call()
        return self._clock() - start

    def mean(self, calls: Sequence[Callable[[], object]], fraction: float) -> float:
        """Mean seconds of those ``calls`` that fit into a ``fraction`` of the budget,
        at least one. The first call only warms up, unless there is no other.
        """
        until = self._clock() + fraction * self._seconds
        times: list[float] = []
        for call in calls:
            times.append(self.once(call))
            if self._clock() >= until or (self.over and len(times) > 1):
                break
        counted = times[1:] or times
        return sum(counted) / len(counted)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, Linux kilobytes.
    return peak if sys.platform == "darwin" else 1024 * peak
