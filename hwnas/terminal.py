"""Progress on a terminal, with rich. Without a terminal, a line every now and then and
one at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as RichBars
from rich.progress import Task as BarState
from rich.progress import TaskID
from rich.progress_bar import ProgressBar as RichBar
from rich.table import Table
from rich.text import Text

from hwnas.printable import one_line, printable
from hwnas.progress import Pace, Progress, ProgressBar, duration

LINE_SECONDS = 30.0
"""How often a long task prints a line if there is no terminal."""
BAR_WIDTH = (8, 24)
"""Columns of a bar, at least and at most; the rest of the line is for numbers."""
BAR_FRACTION = 0.1
"""The fraction of a wide terminal that a bar takes."""
DESCRIPTION_FRACTION = 0.35
"""The fraction of a terminal that descriptions take at most; longer ones end with an
ellipsis.
"""
SEPARATOR = "  "
"""Separates the numbers of a note; each is shown completely or not at all."""


class TerminalProgress(Progress):
    """Bars and lines on standard error; standard output stays free for results."""

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, console: Console | None = None
    ) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self.quiet = quiet
        self.verbose = verbose

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        """A bar; without a terminal, lines."""
        with self.tasks() as begin:
            bar = begin(description, total, done)
            yield bar
            bar.end()

    @contextmanager
    def tasks(self) -> Iterator[Callable[[str, int, int], ProgressBar]]:
        """Bars, one below the other; without a terminal, lines for each task."""
        live = self.console.is_terminal and not self.quiet
        with _Bars(self.console, live=live) as bars:

            def begin(description: str, total: int, done: int) -> ProgressBar:
                description = one_line(description)
                pace = Pace(total, done)
                if not live:
                    return _PrintedBar(self.console, description, pace)
                identity = bars.add_task(
                    description, total=total, completed=done, pace=pace, note=""
                )
                return _TerminalBar(bars, identity, pace)

            yield begin

    def info(self, message: str) -> None:
        """A line."""
        self._print(message)

    def debug(self, message: str) -> None:
        """A dim line, in verbose mode."""
        if self.verbose:
            self._print(message, style="dim")

    def warning(self, message: str) -> None:
        """A line in yellow."""
        self._print(f"warning: {message}", style="yellow")

    def _print(self, message: str, style: str | None = None) -> None:
        # messages name files and classes, which cannot control the terminal that way
        self.console.print(
            printable(message),
            style=style,
            markup=False,
            soft_wrap=not self.console.is_terminal,
        )


class _Bars(RichBars):
    """Bars of one line each: description, bar, n of N, remaining time, and as much of
    the note as fits.
    """

    def __init__(self, console: Console, *, live: bool) -> None:
        self.shown_on = console  # rich draws once before it sets its own attribute
        super().__init__(console=console, disable=not live, transient=True)

    def make_tasks_table(self, tasks: Iterable[BarState]) -> Table:
        """The bars as a table. rich's own columns share the width in proportion to their
        content; here the first four columns get what they need, and the note the rest.
        """
        shown = [task for task in tasks if task.visible]
        counts = [_count(task) for task in shown]
        times = [_left(task.fields["pace"]) for task in shown]
        widths = self._widths([task.description for task in shown], counts, times)
        table = Table.grid(padding=(0, 1, 0, 0))
        for width in widths:
            table.add_column(width=width, no_wrap=True, overflow="ellipsis")
        for task, count, left in zip(shown, counts, times, strict=True):
            bar = RichBar(
                total=max(task.total or 0, 1),
                completed=task.completed,
                width=widths[1],
                animation_time=task.get_time(),
            )
            table.add_row(
                Text(task.description, style=""),
                bar,
                Text(count, justify="right", style="progress.download"),
                Text(left, style="cyan"),
                Text(fitting(task.fields["note"], widths[4]), style="dim"),
            )
        return table

    def _widths(
        self, descriptions: list[str], counts: list[str], times: list[str]
    ) -> tuple[int, int, int, int, int]:
        """The widths of description, bar, count, time and note."""
        width = self.shown_on.width
        count_width = max(map(len, counts), default=0)
        time_width = max(map(len, times), default=0)
        # a blank after each column, and the terminal's last column stays empty
        free = max(0, width - count_width - time_width - 5)
        longest = max(map(len, descriptions), default=0)
        description_width = min(longest, int(DESCRIPTION_FRACTION * width), free)
        at_least, at_most = BAR_WIDTH
        bar_width = min(at_most, max(at_least, int(BAR_FRACTION * width)), free - description_width)
        note_width = free - description_width - bar_width
        return description_width, bar_width, count_width, time_width, note_width


def _count(task: BarState) -> str:
    total = f"{task.total or 0:.0f}"
    return f"{task.completed:{len(total)}.0f} of {total}"


def _left(pace: Pace) -> str:
    """The remaining time to the second, like a running clock."""
    if pace.remaining is None:
        return "-:-- left"
    minutes, seconds = divmod(round(pace.remaining), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{duration(pace.remaining)} left"
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{clock} left"


def fitting(note: str, width: int) -> str:
    """The first numbers of a note that fit into ``width`` columns."""
    fields = note.split(SEPARATOR)
    for count in range(len(fields), 0, -1):
        text = SEPARATOR.join(fields[:count])
        if len(text) <= width:
            return text
    return ""


class _TerminalBar(ProgressBar):
    """A bar."""

    def __init__(self, bars: RichBars, identity: TaskID, pace: Pace) -> None:
        self.bars = bars
        self.identity = identity
        self.pace = pace
        self.note = ""

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.note = note or self.note
        self.pace.advance(steps)
        self.bars.update(self.identity, advance=steps, note=self.note)

    def end(self) -> None:
        self.bars.remove_task(self.identity)


class _PrintedBar(ProgressBar):
    """Lines in place of a bar if there is no terminal."""

    def __init__(self, console: Console, description: str, pace: Pace) -> None:
        self.console = console
        self.description = description
        self.pace = pace
        self.note = ""
        self.printed_at = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.note = note or self.note
        self.pace.advance(steps)
        is_due = time.monotonic() - self.printed_at > LINE_SECONDS
        if is_due and self.pace.done < self.pace.total:
            self.printed_at = time.monotonic()
            left = self.pace.remaining
            self._print("" if left is None else f", about {duration(left)} left")

    def end(self) -> None:
        self._print(f" in {duration(self.pace.seconds)}")

    def _print(self, when: str) -> None:
        text = (
            f"{self.description}: {self.pace.done} of {self.pace.total}{when}{SEPARATOR}{self.note}"
        )
        self.console.print(text.rstrip(), markup=False, soft_wrap=True)
