"""Progress on a terminal, with rich. Where there is no terminal, a line now and then,
and one at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as RichBars
from rich.progress import Task as BarState
from rich.progress import TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hwnas.progress import Pace, Progress, Task, duration

LINE_SECONDS = 30.0
"""How often a long task says where it is when nobody watches a terminal."""
BAR_WIDTH = (8, 24)
"""Columns of a bar, at least and at most: the rest of a line is for its numbers."""
BAR_PART = 0.1
"""Part of a wide terminal that a bar takes."""
DESCRIPTION_PART = 0.35
"""Part of a terminal that descriptions take at most; longer ones end with an ellipsis."""
SEPARATOR = "  "
"""Between the numbers of a note, which are shown whole or not at all."""


class TerminalProgress(Progress):
    """Bars and lines on standard error; standard output stays free for results."""

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, console: Console | None = None
    ) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self.quiet, self.verbose = quiet, verbose

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        """A bar; without a terminal, lines."""
        with self.tasks() as begin:
            bar = begin(description, total, done)
            yield bar
            bar.end()

    @contextmanager
    def tasks(self) -> Iterator[Callable[[str, int, int], Task]]:
        """Bars, one below the other; without a terminal, lines of each."""
        live = self.console.is_terminal and not self.quiet
        with _Bars(self.console, live=live) as bars:

            def begin(description: str, total: int, done: int) -> Task:
                pace = Pace(total, done)
                if not live:
                    return _LineTask(self.console, description, pace)
                return _BarTask(
                    bars,
                    bars.add_task(description, total=total, completed=done, pace=pace, note=""),
                    pace,
                )

            yield begin

    def info(self, message: str) -> None:
        """A line."""
        self.console.print(message, markup=False, soft_wrap=not self.console.is_terminal)

    def debug(self, message: str) -> None:
        """A dim line, in verbose mode."""
        if self.verbose:
            self.console.print(
                message, style="dim", markup=False, soft_wrap=not self.console.is_terminal
            )

    def warning(self, message: str) -> None:
        """A line in yellow."""
        self.console.print(
            f"warning: {message}",
            style="yellow",
            markup=False,
            soft_wrap=not self.console.is_terminal,
        )


class _Bars(RichBars):
    """Bars of one line each: description, bar, n of N, remaining time, and what fits of
    the note.
    """

    def __init__(self, console: Console, *, live: bool) -> None:
        self.shown_on = console  # rich draws once before it has set its own
        super().__init__(console=console, disable=not live, transient=True)

    def make_tasks_table(self, tasks: Iterable[BarState]) -> Table:
        """Rich's own columns share the width by what they would like to have; here the
        first four have what they need.
        """
        shown = [task for task in tasks if task.visible]
        width = self.shown_on.width
        counts = [_count(task) for task in shown]
        times = [_left(task.fields["pace"]) for task in shown]
        counted, timed = max(map(len, counts), default=0), max(map(len, times), default=0)
        # a blank after each column, and the terminal's last column stays empty
        free = max(0, width - counted - timed - 5)
        described = min(
            max((len(task.description) for task in shown), default=0),
            int(DESCRIPTION_PART * width),
            free,
        )
        bar_width = min(BAR_WIDTH[1], max(BAR_WIDTH[0], int(BAR_PART * width)), free - described)
        noted = free - described - bar_width
        table = Table.grid(padding=(0, 1, 0, 0))
        for column in (described, bar_width, counted, timed, noted):
            table.add_column(width=column, no_wrap=True, overflow="ellipsis")
        for task, count, left in zip(shown, counts, times, strict=True):
            bar = ProgressBar(
                total=max(task.total or 0, 1),
                completed=task.completed,
                width=bar_width,
                animation_time=task.get_time(),
            )
            described_text = Text(task.description, style="")
            note = Text(fitting(task.fields["note"], noted), style="dim")
            table.add_row(
                described_text,
                bar,
                Text(count, justify="right", style="progress.download"),
                Text(left, style="cyan"),
                note,
            )
        return table


def _count(task: BarState) -> str:
    total = f"{task.total or 0:.0f}"
    return f"{task.completed:{len(total)}.0f} of {total}"


def _left(pace: Pace) -> str:
    """What is left, to the second: a clock that runs."""
    if pace.remaining is None:
        return "-:-- left"
    minutes, seconds = divmod(round(pace.remaining), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{duration(pace.remaining)} left"
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{clock} left"


def fitting(note: str, width: int) -> str:
    """The first numbers of a note that fit into so many columns."""
    fields = note.split(SEPARATOR)
    kept = next(
        (
            count
            for count in range(len(fields), 0, -1)
            if len(SEPARATOR.join(fields[:count])) <= width
        ),
        0,
    )
    return SEPARATOR.join(fields[:kept])


class _BarTask(Task):
    """A bar."""

    def __init__(self, bars: RichBars, identity: TaskID, pace: Pace) -> None:
        self.bars, self.identity, self.pace, self.note = bars, identity, pace, ""

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.note = note or self.note
        self.pace.advance(steps)
        self.bars.update(self.identity, advance=steps, note=self.note)

    def end(self) -> None:
        self.bars.remove_task(self.identity)


class _LineTask(Task):
    """Where there is no terminal to draw a bar on: a line now and then."""

    def __init__(self, console: Console, description: str, pace: Pace) -> None:
        self.console, self.description, self.pace, self.note = console, description, pace, ""
        self.said = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.note = note or self.note
        self.pace.advance(steps)
        if time.monotonic() - self.said > LINE_SECONDS and self.pace.done < self.pace.total:
            self.said = time.monotonic()
            left = self.pace.remaining
            self._print("" if left is None else f", about {duration(left)} left")

    def end(self) -> None:
        self._print(f" in {duration(self.pace.seconds)}")

    def _print(self, when: str) -> None:
        text = (
            f"{self.description}: {self.pace.done} of {self.pace.total}{when}{SEPARATOR}{self.note}"
        )
        self.console.print(text.rstrip(), markup=False, soft_wrap=True)
