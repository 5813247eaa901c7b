"""Progress and tables on a terminal, with rich. Quiet bars where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.progress import Task as BarState

from hwnas.progress import Progress, Task

LINE_SECONDS = 30.0
"""How often a long task says where it is when nobody watches a terminal."""


class TerminalProgress(Progress):
    """Bars and lines on standard error; standard output stays free for results."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.quiet, self.verbose = quiet, verbose

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        """A bar; without a terminal, one line at the end."""
        with self.tasks() as begin:
            bar = begin(description, total, done)
            yield bar
            bar.end()

    @contextmanager
    def tasks(self) -> Iterator[Callable[[str, int, int], Task]]:
        """Bars, one below the other; without a terminal, one line at the end of each."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        live = self.console.is_terminal and not self.quiet
        with RichBars(*columns, console=self.console, disable=not live, transient=True) as bars:

            def begin(description: str, total: int, done: int) -> Task:
                return _BarTask(bars, bars.add_task(description, total=total, completed=done, note=""), None if live else self.console)

            yield begin

    def say(self, message: str) -> None:
        """A line."""
        self.console.print(message, markup=False, soft_wrap=not self.console.is_terminal)

    def detail(self, message: str) -> None:
        """A dim line, in verbose mode."""
        if self.verbose:
            self.console.print(message, style="dim", markup=False, soft_wrap=not self.console.is_terminal)

    def warn(self, message: str) -> None:
        """A line in yellow."""
        self.console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=not self.console.is_terminal)


class _BarTask(Task):
    """A bar; where there is no terminal to draw one (``log`` is set), a line now and then."""

    def __init__(self, bars: RichBars, identity: TaskID, log: Console | None) -> None:
        self.bars, self.identity, self.log, self.note = bars, identity, log, ""
        self.said = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.note = note or self.note
        self.bars.update(self.identity, advance=steps, note=self.note)
        if self.log is not None and time.monotonic() - self.said > LINE_SECONDS and not self._bar.finished:
            self.said = time.monotonic()
            self._print()

    def end(self) -> None:
        if self.log is not None:
            self._print()
        self.bars.remove_task(self.identity)

    @property
    def _bar(self) -> BarState:
        return next(task for task in self.bars.tasks if task.id == self.identity)

    def _print(self) -> None:
        assert self.log is not None
        bar = self._bar
        self.log.print(f"{bar.description}: {bar.completed:.0f} of {bar.total:.0f}  {self.note}".rstrip(), markup=False, soft_wrap=True)
