"""Driving the command line in this process with input that somebody has damaged, and what
must hold whatever the damage is.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hwnas import cli
from hwnas.printable import printable

SECONDS = 20.0
"""More processor time than any command on these small inputs takes, on slow machines too."""

LONGEST_ERROR = 3000
"""Characters of the longest sentence about one problem."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The sentences that begin with ``error:``."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run(*arguments: object) -> Outcome:
    """Run ``hwnas`` with arguments. Any exception of another kind is passed on."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["hwnas", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"  # of a run folder; it is empty
    }


def survives(folder: Path, *arguments: object, writes: tuple[str, ...] = ()) -> Outcome:
    """Run a command on damaged input in ``folder``, and check what must hold.

    It ends in time with one of the documented exit codes, and an error is one sentence.
    Nothing but the files and folders ``writes`` changes, and of those, none is left
    half-written.
    """
    before = contents(folder)
    started = time.process_time()
    outcome = run(*arguments)
    seconds = time.process_time() - started

    said = f"hwnas {' '.join(map(str, arguments))[:200]}: {outcome}"
    assert seconds < SECONDS, said
    assert outcome.code in (0, 1, 2, 3), said
    assert "Traceback" not in outcome.err, said
    assert outcome.out == printable(outcome.out) and outcome.err == printable(outcome.err), said
    assert len(outcome.errors) <= 1, said
    if outcome.code in (2, 3):
        assert len(outcome.errors) == 1 or "Usage:" in outcome.err, said
    for error in outcome.errors:
        assert len(error) <= LONGEST_ERROR, said

    for name, content in contents(folder).items():
        if not name.startswith(writes):
            assert before.get(name) == content, f"{name} has changed; {said}"
        assert not Path(name).name.startswith("."), f"{name} was left behind; {said}"
    return outcome
