"""What the tests' trainings run in child processes, which find these jobs by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from hwnas.core.space import MacroSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import DivergenceError
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import StageContext
from hwnas.search import searching


def searches(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """A search that reports its number of threads."""
    ctx.progress.info(f"threads {torch.get_num_threads()}")
    print("what a library prints is no event", flush=True)
    searching.run(ctx, space, table)


def is_killed(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """A search whose process is killed after twelve steps."""

    class Deadly(Progress):
        @contextmanager
        def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
            class Bar(ProgressBar):
                left = 12

                def advance(self, steps: int = 1, note: str = "") -> None:
                    self.left -= steps
                    if self.left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            yield Bar()

    searching.run(replace(ctx, progress=Deadly()), space, table)


def diverges(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    raise DivergenceError("the loss is nan at step 7.\nMore of it.")


def is_wrong(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    raise KeyError("no such thing")


def waits(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """Leaves its process id, and takes a minute."""
    (ctx.folder / "pid").write_text(str(os.getpid()))
    ctx.progress.info("waiting")
    time.sleep(60)
