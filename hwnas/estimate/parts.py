"""What an estimate is made of, and the clock that bounds how long making it takes.

    seconds of a stage = sum over its parts of  how often * seconds each

Seconds are wall-clock seconds of this computer at its present load.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hwnas.progress import duration

ALIKE = 1.25
"""Least and most seconds whose ratio is below this are said as one number."""
SHOWN_PARTS = 3
"""Parts of a stage that are named, the longest ones."""


@dataclass(frozen=True)
class Part:
    """Something that a stage does ``count`` times, or up to ``most`` times, and that
    takes ``each`` seconds.
    """

    name: str
    count: float
    each: float
    most: float | None = None

    @property
    def seconds(self) -> float:
        """All together."""
        return self.count * self.each

    @property
    def most_seconds(self) -> float:
        """All together, at most."""
        return max(self.count, self.most or 0) * self.each


@dataclass(frozen=True)
class Estimate:
    """What a stage takes. ``unknown`` says why (a part of) it is not known; ``current``
    that nothing is left to do.
    """

    parts: tuple[Part, ...] = ()
    memory_bytes: int | None = None
    disk_bytes: float = 0.0
    unknown: str = ""
    current: bool = False

    @property
    def seconds(self) -> float:
        """Of all parts that are known."""
        return sum(part.seconds for part in self.parts)

    @property
    def most_seconds(self) -> float:
        """Of all parts that are known, at most."""
        return sum(part.most_seconds for part in self.parts)

    def __str__(self) -> str:
        if self.current:
            return "up to date, skipped"
        known = [_time(self)] if self.parts else []
        known += (
            [f"{size(self.memory_bytes)} of memory"] if self.memory_bytes and self.parts else []
        )
        known += [f"{size(self.disk_bytes)} on disk"] if self.disk_bytes else []
        return "; ".join(
            [
                *([", ".join(known)] if known else []),
                *([f"unknown: {self.unknown}"] if self.unknown else []),
            ]
        )


def _time(estimate: Estimate) -> str:
    longest = sorted(estimate.parts, key=lambda part: -part.most_seconds)[:SHOWN_PARTS]
    named = ", ".join(f"{part.name} {span(part.seconds, part.most_seconds)}" for part in longest)
    return f"about {span(estimate.seconds, estimate.most_seconds)} ({named})"


def span(least: float, most: float) -> str:
    """Two lengths of time as one where they are nearly alike: ``3 min`` or ``3 to 6 min``."""
    low, high = duration(least), duration(most)
    if low == high or most < ALIKE * least:
        return high
    unit = f" {high.split(' ')[-1]}"
    return f"{low.removesuffix(unit)} to {high}"


def size(count: float) -> str:
    """Bytes as a person would say them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return (
                f"{count / factor:.2g} {unit}"
                if count < 10 * factor
                else f"{count / factor:.0f} {unit}"
            )
    return f"{count / 1e3:.0f} kB"


def total(estimates: Iterable[Estimate]) -> str:
    """All stages together, in words. What is unknown is left out, and said so."""
    left = [each for each in estimates if not each.current]
    if not left:
        return "nothing to do"
    known = [each for each in left if each.parts]
    if not known:
        return "unknown"
    partly = any(each.unknown for each in left)
    time_needed = span(
        sum(each.seconds for each in known), sum(each.most_seconds for each in known)
    )
    memory = max((each.memory_bytes or 0) for each in known)
    disk = sum(each.disk_bytes for each in known)
    return (
        f"{'at least' if partly else 'about'} {time_needed}, {size(memory)} of memory, {size(disk)}"
        " on disk"
    )


class Stopwatch:
    """Times calls, and stops when a number of seconds is used up."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._seconds, self._begun_at = clock, seconds, clock()

    @property
    def used(self) -> float:
        """Seconds so far."""
        return self._clock() - self._begun_at

    @property
    def over(self) -> bool:
        """Whether there is no time left."""
        return self.used >= self._seconds

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        begun_at = self._clock()
        call()
        return self._clock() - begun_at

    def mean(self, calls: Sequence[Callable[[], object]], part: float) -> float:
        """Mean seconds of the calls that fit into a ``part`` of all seconds, one at
        least. The first only warms up, unless it is alone.
        """
        begun_at = self._clock()
        until = begun_at + part * self._seconds
        times: list[float] = []
        for call in calls:
            times.append(self.once(call))
            if self._clock() >= until or (self.over and len(times) > 1):
                break
        counted = times[1:] or times
        return sum(counted) / len(counted)


def peak_memory() -> int:
    """Bytes that this process has had resident at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
