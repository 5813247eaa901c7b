"""What a long stage tells the person who waits. Below the command line nothing prints; stages report here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent progress: the default, and the interface. The command line passes one that draws bars."""

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        """A bar of ``total`` steps of which ``done`` are already behind (a resumed stage)."""
        yield Task()

    @contextmanager
    def tasks(self) -> Iterator[Callable[[str, int, int], Task]]:
        """Bars side by side: a function of a description, a total and what is done that begins one. ``Task.end`` ends it."""
        yield lambda description, total, done: Task()

    def say(self, message: str) -> None:
        """One line that matters (a result, a decision)."""

    def detail(self, message: str) -> None:
        """One line for those who asked for more (``-v``)."""

    def warn(self, message: str) -> None:
        """One line about something that is not as it should be, though work goes on."""


class Task:
    """A running bar. The base is silent."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more are done; ``note`` shows the numbers that matter now."""

    def end(self) -> None:
        """No more of it; what runs beside it goes on."""
