"""Fifty times SIGKILL at random moments: in every stage of a small experiment, in the
training of a detector and in a study of two super-nets. Every run is resumed until it
ends, and its results are compared with those of an undisturbed one, byte for byte.

pytest tests/benchmarks/test_kills.py --benchmark-only -s
"""

from __future__ import annotations

import csv
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import Experiment
from hwnas.document import file_sha256
from hwnas.runs import MANIFEST, StageManifest, prepare, save_config
from hwnas.stages import STAGES
from tests.commands import Command, run
from tests.conftest import write_tiny
from tests.search.staging import elastic_digits_space
from tests.search.staging import experiment as search_experiment
from tests.train.rectangles import settings as detection_settings

KILLS = 50
SEED = 18
LATEST = 0.9
"""Kills come up to this many times the undisturbed part's seconds after its beginning.
Some come between two parts all the same, because speeds vary.
"""
NOT_COMPARED = {"config.json", "stage.json", "report.html", "samples.jsonl", ".lock"}
"""Files that hold times, the path of the run folder, or one line for every session on the
device (the raw samples).
"""
BETWEEN = "between parts"


@dataclass(frozen=True)
class Job:
    """A command that works in ``root``, through the folders ``parts`` in this order."""

    arguments: Sequence[str]
    root: Path
    parts: Sequence[str]

    def hashes(self) -> dict[str, str]:
        """The sha256 of every file that must be the same."""
        files = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
        kept = [path for path in files if path.name not in NOT_COMPARED]
        return {str(path.relative_to(self.root)): file_sha256(path) for path in kept}

    def seconds(self, part: str) -> float:
        """How long a part took. The job must be done."""
        return StageManifest.load(self.root / part / MANIFEST).seconds

    def unfinished(self) -> str:
        """The part that has started and not finished."""
        for part in self.parts:
            path = self.root / part / MANIFEST
            if path.is_file() and StageManifest.load(path).state == "started":
                return part
        return BETWEEN


def whole_experiment(folder: Path) -> Job:
    """All stages, on a simulated device that takes its time."""
    root = folder / "run"
    arguments = ["run", str(write_tiny(folder, delay_ms=2)), "--out", str(root), "-q"]
    return Job(arguments, root, tuple(STAGES))


def detector(folder: Path) -> Job:
    """The training of a detector, with a checkpoint after every step."""
    content = detection_settings(folder, epochs=12) | {"checkpoint_seconds": 0}
    root = folder / "run"
    save(Experiment.model_validate(content), root)
    # three times, because this is the only part
    return Job(["train", str(root), "-q"], root, ("train",) * 3)


def study(folder: Path) -> Job:
    """Two super-nets, and how they rank twelve networks."""
    folder.mkdir(parents=True)
    write_truth(folder)
    plain = search_experiment("spos", evaluation_images=64, target_range=None, epochs=0.3)
    changes = {
        "space": {"name": str(folder / "space.json")},
        "study": {
            "truth": str(folder / "truth.csv"),
            "architectures": 12,
            "top_k": 3,
            "bootstrap": 30,
            "scores": ["accuracy", "loss", "angle", "macs"],
            "seeds": [5, 6],
        },
    }
    content = plain.model_dump(mode="json", by_alias=True) | changes
    root = folder / "run"
    save(Experiment.model_validate(content), root)
    parts = ("supernet-5", "supernet-6", "rank")
    return Job(["study", "rank", str(root), "-q"], root, parts)


def write_truth(folder: Path) -> None:
    """A space document, and made-up accuracies of thirty of its networks."""
    space = elastic_digits_space()
    space.save(folder / "space.json")
    rng = np.random.default_rng(0)
    accuracies: dict[str, float] = {}
    while len(accuracies) < 30:
        index = space.canonical(space.index(space.sample(rng)))
        accuracies[json.dumps(space.at(index))] = float(rng.uniform(0.5, 0.9))
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arch", "acc1"])
        rows.writerows(accuracies.items())


def save(experiment: Experiment, root: Path) -> None:
    """Make a run folder with the configuration of an experiment."""
    prepare(root)
    save_config(root, experiment)


def killed(job: Job, undisturbed: Job, rng: np.random.Generator, most: int) -> Counter[str]:
    """Do a job, killed at a random moment of every part, but at most ``most`` times.
    Returns how often it was killed where.
    """
    kills: Counter[str] = Counter()
    for part in job.parts:
        if kills.total() == most:
            break
        delay = float(rng.uniform(0, LATEST * undisturbed.seconds(part)))
        command = Command(job.arguments)
        code = command.kill_once(after((job.root / part / MANIFEST).exists, delay))
        if code == -signal.SIGKILL:
            kills[job.unfinished()] += 1
        else:
            assert code == 0, command.stderr  # it was over before
    run(job.arguments)
    return kills


def after(reached: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """Whether ``reached`` has been true for some seconds."""
    moments: list[float] = []

    def has_passed() -> bool:
        if not moments and reached():
            moments.append(time.monotonic() + seconds)
        return bool(moments) and time.monotonic() >= moments[0]

    return has_passed


def test_fifty_kills_change_no_result(benchmark: Any, tmp_path: Path) -> None:
    # twice the whole experiment, because it has most of the parts
    kinds = (whole_experiment, whole_experiment, detector, study)
    undisturbed = {}
    for kind in set(kinds):
        job = kind(tmp_path / kind.__name__)
        run(job.arguments)
        undisturbed[kind] = job

    def kill_all() -> tuple[int, Counter[str], list[str]]:
        rng = np.random.default_rng(SEED)
        kills: Counter[str] = Counter()
        changed = []
        runs = 0
        while kills.total() < KILLS:
            kind = kinds[runs % len(kinds)]
            job = kind(tmp_path / f"{runs}-{kind.__name__}")
            expected = undisturbed[kind]
            places = killed(job, expected, rng, KILLS - kills.total())
            kills.update({f"{kind.__name__}, {place}": n for place, n in places.items()})
            before, now = expected.hashes(), job.hashes()
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    changed.append(f"{job.root / name} after kills in {dict(places)}")
            runs += 1
        return runs, kills, changed

    runs, kills, changed = benchmark.pedantic(kill_all, rounds=1, iterations=1)
    print()
    for place, count in sorted(kills.items()):
        print(f"{place:40} {count}")
    print(f"{kills.total()} kills in {runs} runs; files that differ: {len(changed)}")
    for line in changed:
        print(line)
    assert not changed
