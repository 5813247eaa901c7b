"""What users see while they wait: bars on terminals of several widths, lines elsewhere,
and the time left.
"""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
from rich.console import Console

from hwnas import terminal
from hwnas.engine import note_of
from hwnas.progress import Pace, duration
from hwnas.terminal import TerminalProgress, fitting
from tests.conftest import write_tiny

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = "entropy-loss-of-a-long-name: training mobile32-progressive_shrinking"
NOTE = (
    "loss 1.23  quality 0.456  accuracy 0.41  latency 0.512 ms  expected 0.498 ms  reward 0.45 "
    " entropy 12.3"
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def frame(width: int, bars: list[tuple[str, int, int, str]]) -> list[str]:
    """The final lines of bars given as (description, total, done, note), after two more
    steps of each.
    """
    drawn = io.StringIO()
    with TerminalProgress(
        console=Console(file=drawn, width=width, force_terminal=True, color_system=None)
    ).tasks() as begin:
        for description, total, done, note in bars:
            task = begin(description, total, done)
            task.advance(note=note)
            task.advance()
    return lines_of(drawn.getvalue())[-len(bars) :]


def lines_of(drawn: str) -> list[str]:
    """All that was written to a terminal, line by line, even if it was erased later."""
    lines = [ESCAPES.sub("", line).rstrip() for line in re.split(r"[\r\n]+", drawn)]
    return [line for line in lines if line]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_shows_the_count_the_time_left_and_what_fits_of_the_note(width: int) -> None:
    (line,) = frame(width, [("searching (tunas)", 560, 12, NOTE)])
    assert len(line) <= width
    match = re.fullmatch(r"searching \(tunas\) ([━╸╺ ]+) 14 of 560 (\d+:\d\d left) (.*)", line)
    assert match, line
    assert len(match[1]) >= 8
    shown = match[3].split("  ")
    assert shown == NOTE.split("  ")[: len(shown)], "uncut values, in order"
    assert len(shown) >= {60: 1, 80: 2, 120: 4}[width]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_long_descriptions_are_shortened_and_bars_stay_one_line_each(width: int) -> None:
    lines = frame(
        width, [(LONG, 123456, 99999, NOTE), ("b", 3, 0, ""), (LONG, 100, 0, "accuracy 40.1%")]
    )
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert all("left" in line for line in lines)
    assert "…" in lines[0]
    assert "100001 of 123456" in lines[0]
    assert "2 of 3" in lines[1]
    assert len({line.index(" left") for line in lines}) == 1, "columns are aligned"


def test_numbers_in_a_note_are_shown_in_full_or_not_at_all() -> None:
    assert fitting("loss 1.23  quality 0.5", 22) == "loss 1.23  quality 0.5"
    assert fitting("loss 1.23  quality 0.5", 21) == "loss 1.23"
    assert fitting("loss 1.23  quality 0.5", 8) == ""


def test_what_matters_comes_first_in_a_note() -> None:
    metrics = {
        "held_out_loss": 2.0,
        "entropy": 3.0,
        "train_accuracy": 0.5,
        "expected_ms": 1.5,
        "loss": 0.12345,
        "reward": 0.3,
    }
    assert (
        note_of(metrics)
        == "loss 0.123  accuracy 0.5  expected 1.5 ms  reward 0.3  entropy 3  held_out_loss 2"
    )


def test_the_pace_ignores_earlier_steps_and_a_slow_first_one() -> None:
    clock = Clock()
    pace = Pace(total=100, done=50, clock=clock)
    assert pace.remaining is None
    clock.now += 30
    pace.advance(1)  # slow, but all that is known so far
    assert pace.remaining == pytest.approx(49 * 30)
    for _ in range(4):
        clock.now += 2
        pace.advance(1)
    assert pace.remaining == pytest.approx(45 * 2)
    clock.now += 1
    assert pace.remaining == pytest.approx(45 * 2 - 1), "it counts down between steps"
    assert pace.seconds == 39


def test_the_pace_follows_a_computer_that_slows_down() -> None:
    clock = Clock()
    pace = Pace(total=1000, clock=clock)
    for _ in range(100):
        clock.now += 1
        pace.advance(1)
    assert pace.remaining == pytest.approx(900)
    for _ in range(20):
        clock.now += 10
        pace.advance(1)
    assert pace.remaining == pytest.approx(880 * 10)


def test_steps_longer_than_the_window_have_a_pace() -> None:
    clock = Clock()
    pace = Pace(total=5, clock=clock)
    for _ in range(3):
        clock.now += 400
        pace.advance(1)
    assert pace.remaining == pytest.approx(800)
    clock.now += 3000
    assert pace.remaining == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "less than 1 s"),
        (1, "1 s"),
        (89.4, "89 s"),
        (95, "2 min"),
        (3540, "59 min"),
        (3590, "1 h"),
        (4900, "1 h 22 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_lines_show_progress_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(terminal, "LINE_SECONDS", -1.0)
    with TerminalProgress(console=Console(file=log, width=80)).task(
        "searching (tunas)", 4, 1
    ) as task:
        task.advance(note=NOTE)
        task.advance()
        task.advance()
    lines = log.getvalue().splitlines()
    assert len(lines) == 3, "no line is repeated or wrapped"
    assert (
        re.fullmatch(
            r"searching \(tunas\): 2 of 4, about less than 1 s left  " + re.escape(NOTE), lines[0]
        )
        or "left" in lines[0]
    )
    assert lines[1].startswith("searching (tunas): 3 of 4, about ")
    assert re.fullmatch(
        r"searching \(tunas\): 4 of 4 in less than 1 s  " + re.escape(NOTE), lines[2]
    )


def test_names_in_messages_cannot_control_the_terminal() -> None:
    log = io.StringIO()
    progress = TerminalProgress(console=Console(file=log, width=200), verbose=True)
    progress.info("class \x1b[2J\u202ecat")
    progress.debug("file \x9b31m")
    progress.warning("a\rb\nc")
    with progress.task("on \x1b]0;x\x07\nphone", 1) as task:
        task.advance()
    lines = log.getvalue().splitlines()
    assert lines[:4] == [
        "class \\u001b[2J\\u202ecat",
        "file \\u009b31m",
        "warning: a\\u000db",
        "c",
    ]
    assert lines[4].startswith("on \\u001b]0;x\\u0007 phone: 1 of 1")


@contextmanager
def terminal_of(columns: int) -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal."""
    leader, follower = pty.openpty()
    ioctl(follower, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    yield leader, follower
    os.close(leader)


@pytest.mark.slow
def test_every_frame_of_a_run_fits_into_80_columns(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hwnas",
        "run",
        str(write_tiny(tmp_path, delay_ms=5)),
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("COLUMNS", "LINES", "NO_COLOR")
    } | {"TERM": "xterm"}
    with terminal_of(80) as (leader, follower):
        process = subprocess.Popen(
            command, stderr=follower, stdout=subprocess.DEVNULL, env=environment
        )
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        assert process.wait() in (0, 1)
    lines = lines_of(shown.decode())
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if " left" in line]
    for begin in ("building", "measuring", "searching (tunas)", "ranking", "training"):
        assert any(line.startswith(begin) for line in bars), begin
    for line in bars:
        assert re.fullmatch(r".{5,28}? [━╸╺ ]{8} +\d+ of \d+ +(\d+:\d\d|-:--) left( .*)?", line), (
            line
        )


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""
