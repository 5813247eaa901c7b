"""Searches that take seconds in the search stage: a small space, its experiment, and a
kill at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hwnas.config import Experiment
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.table import LatencyTable
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import StageContext
from hwnas.search import searching

DATA = {
    "name": "digits",
    "resolution": 8,
    "channels": 1,
    "mean": (0.3,),
    "std": (0.35,),
    "augment": "crop",
}
OPTIMIZER = {"name": "sgd", "lr": 2.0, "options": {}}


def elastic_digits_space(width: int = 16) -> MacroSpace:
    """A space for scikit-learn's digits, with searched widths at both ends and two
    slots that can be skipped.
    """
    first = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    stages = (
        SpaceStage(widths=(8, 16), slots=(("cn_k3",),)),
        SpaceStage(widths=(width,), stride=2, slots=(first, (*first, "skip"), (*first, "skip"))),
        SpaceStage(widths=(24, 32), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="tiny", resolution=8, in_channels=1, classes=10, stages=stages)


def experiment(name: str = "tunas", **search: Any) -> Experiment:
    settings = {
        "strategy": {"name": name}, "target_range": 0.5, "epochs": 1.0, "batch_size": 32, "optimizer": OPTIMIZER,
        "candidates": 3, "random_samples": 2, "recalibration_images": 256, **search,
    }  # fmt: skip
    return Experiment.model_validate(
        {"seed": 5, "checkpoint_seconds": 0.0, "data": DATA, "search": settings}
    )


def run(
    folder: Path,
    config: Experiment,
    table: LatencyTable | None,
    progress: Progress | None = None,
    space: MacroSpace | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    searching.run(
        StageContext(config, folder.parent, folder, progress or Progress()),
        space or elastic_digits_space(),
        table,
    )


class Saying(Progress):
    """Keeps all messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)

    def warning(self, message: str) -> None:
        self.said.append(message)


class Killed(BaseException):
    """Simulates a kill. No ``except Exception`` catches it."""


class Killing(Progress):
    """Raises ``Killed`` when the bar whose description contains ``where`` has advanced
    ``steps`` times.
    """

    def __init__(self, where: str, steps: int) -> None:
        self.where, self.steps = where, steps

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        outer, counts = self, self.where in description

        class Bar(ProgressBar):
            def advance(self, steps: int = 1, note: str = "") -> None:
                if counts:
                    outer.steps -= steps
                    if outer.steps <= 0:
                        raise Killed

        yield Bar()


EVOLUTION = {"generations": 2, "population": 6, "parents": 3, "mutations": 3, "crossovers": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "tunas": {"rl_lr": 0.02},
    "proxylessnas": {"alpha_lr": 0.05},
    "fbnet": {},
    "darts": {"alpha_lr": 0.02, "order": 2},
    "pdarts": {"alpha_lr": 0.02},
    "spos": EVOLUTION,
    "fairnas": {"generations": 2, "population": 6},
    "progressive_shrinking": EVOLUTION,
    "random": {},
    "random_standalone": {"trainings": 3},
}
"""Every built-in strategy, with options for a search that takes seconds."""
