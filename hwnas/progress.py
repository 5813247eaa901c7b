"""Progress of a long stage, for the person who waits. Below the command line nothing
prints; stages report here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACE_SECONDS = 60.0
"""The window over which the pace of a task is measured: long enough to average over
checkpoints, short enough to follow the load of the computer.
"""


class Progress:
    """Silent progress: the default and the interface. The command line passes a
    subclass that draws bars.
    """

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        """A bar of ``total`` steps, of which ``done`` were done before (a resumed
        stage).
        """
        yield ProgressBar()

    @contextmanager
    def tasks(self) -> Iterator[Callable[[str, int, int], ProgressBar]]:
        """Bars side by side: a function of a description, a total and the steps done
        that starts a bar. ``ProgressBar.end`` ends it.
        """
        yield lambda description, total, done: ProgressBar()

    def info(self, message: str) -> None:
        """One line that matters (a result, a decision)."""

    def debug(self, message: str) -> None:
        """One line for users who asked for more (``-v``)."""

    def warning(self, message: str) -> None:
        """One line about a problem that does not stop the work."""


class ProgressBar:
    """A running bar. The base is silent."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more are done. ``note`` shows the current numbers, the most
        important first, separated by two blanks.
        """

    def end(self) -> None:
        """End this bar; the others continue."""


Task = ProgressBar
"""The old name, which is accepted for one release."""


class Pace:
    """How fast a task runs, measured by when its steps ended, and so how long the rest
    takes.

    Steps that were done before the task began say nothing about its pace. Nor does the
    first one, once there are others: it compiles, opens files or fills caches.
    ``clock`` returns seconds.
    """

    def __init__(
        self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done = done
        self._clock = clock
        self.begun_at = clock()
        self._begun_with = done
        self._marks: deque[tuple[float, int]] = deque()
        """(time, steps done then): all within ``PACE_SECONDS``, and at least two."""

    def advance(self, steps: int) -> None:
        """``steps`` more are done."""
        self.done += steps
        now = self._clock()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - PACE_SECONDS:
            self._marks.popleft()

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return self._clock() - self.begun_at

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest will take; None if no step has been done yet."""
        per_step = self._seconds_per_step()
        if self.done >= self.total:
            return 0.0
        if per_step is None:
            return None
        since_the_last = self._clock() - self._marks[-1][0]
        return max(0.0, (self.total - self.done) * per_step - since_the_last)

    def _seconds_per_step(self) -> float | None:
        if not self._marks:
            return None
        last_at, last_done = self._marks[-1]
        first_at, first_done = self.begun_at, self._begun_with
        if len(self._marks) > 1:
            first_at, first_done = self._marks[0]
        steps = last_done - first_done
        return (last_at - first_at) / steps if steps > 0 else None


def duration(seconds: float) -> str:
    """A length of time in one or two units: ``40 s``, ``3 min``, ``1 h 20 min``, ``2 d
    5 h``.
    """
    if seconds < 0.95:  # "1 s" begins where rounding to a tenth would show 1.0
        return "less than 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        hours, rest = divmod(minutes, 60)
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, rest = divmod(round(minutes / 60), 24)
    return f"{days} d {rest} h" if rest else f"{days} d"
