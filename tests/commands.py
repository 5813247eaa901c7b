"""``hwnas`` commands in processes of their own, as a shell would run them.

A new Python takes ten seconds of CPU to import torch and its friends. These processes
are forked from one that has imported them already, and run ``hwnas.cli.main``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "hwnas.pipeline",
        "hwnas.estimate.plan",
        "hwnas.profile.stage",
        "hwnas.search.searching",
        "hwnas.train.training",
        "hwnas.export.exporting",
        "hwnas.export.onnx_detector",
        "hwnas.export.tflite_detector",
        "hwnas.validate.validating",
        "hwnas.report.stage",
        "hwnas.tasks.boxes",
        "hwnas.tasks.labels",
        "hwnas.unused",
        "sklearn.datasets",
        # imported by the first step of an optimiser
        "torch._dynamo",
    ]
)


class Command:
    """A running command: ``hwnas`` with ``arguments``, in the folder ``cwd`` (default:
    the present one). Its output goes to files.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hwnas-command-"))
        settings = (list(arguments), str(cwd or Path.cwd()), str(self.folder), dict(os.environ))
        self.process = FORKSERVER.Process(target=_main, args=settings)
        self.process.start()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has printed on standard error so far."""
        return (self.folder / "stderr").read_text()

    def wait(self, seconds: float = 600) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the command runs for more than {seconds} s: {self.stderr}")
        return self.process.exitcode

    def kill_once(self, reached: Callable[[], bool], seconds: float = 180) -> int:
        """Send SIGKILL as soon as ``reached()``, and return what ``wait`` does: the
        command's own exit code if it ended before.
        """
        deadline = time.monotonic() + seconds
        while not reached() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        self.process.kill()
        return self.wait()


def run(arguments: Sequence[str], cwd: Path | None = None) -> Command:
    """Run a command to its end, which must be a success."""
    command = Command(arguments, cwd)
    assert command.wait() == 0, command.stderr
    return command


def _main(arguments: list[str], cwd: str, folder: str, environment: Mapping[str, str]) -> None:
    """Become the command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    sys.argv = ["hwnas", *arguments]

    from hwnas.cli import main

    main()
