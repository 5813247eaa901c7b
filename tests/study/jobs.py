"""What trainings of the tests do in processes of their own: named, so that a child finds them."""

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
from hwnas.progress import Progress, Task
from hwnas.runs import StageContext
from hwnas.search import stage


def searches(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """A search that says by how many threads it computes."""
    ctx.progress.info(f"threads {torch.get_num_threads()}")
    print("what a library prints is no event", flush=True)
    stage.run(ctx, space, table)


def is_killed(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """A search whose process is killed after twelve steps."""

    class Deadly(Progress):
        @contextmanager
        def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
            class Bar(Task):
                left = 12

                def advance(self, steps: int = 1, note: str = "") -> None:
                    self.left -= steps
                    if self.left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            yield Bar()

    stage.run(replace(ctx, progress=Deadly()), space, table)


def diverges(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    raise DivergenceError("the loss is nan at step 7.\nMore of it.")


def is_wrong(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    raise KeyError("no such thing")


def waits(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """Says who it is, and takes a minute."""
    (ctx.folder / "pid").write_text(str(os.getpid()))
    ctx.progress.info("waiting")
    time.sleep(60)
