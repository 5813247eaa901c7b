"""Trainings in one process, in several and on a Ray cluster give the same bits, even if
some of them fail or are killed or interrupted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hwnas.config import StudyConfig
from hwnas.engine import flush_denormals
from hwnas.errors import ConfigError
from hwnas.progress import Progress
from hwnas.study import trainings
from hwnas.study.trainings import Training
from hwnas.testing import synthetic_table
from tests.search.staging import EVOLUTION, Saying, elastic_digits_space, experiment

SPACE = elastic_digits_space()
TABLE = synthetic_table(SPACE)
SEARCH = experiment(
    "spos", strategy={"name": "spos", **EVOLUTION}, epochs=0.5, evaluation_images=64, tolerance=0.3
)
FILES = ("arch.json", "search.json", "shared.safetensors", "supernet.safetensors", "metrics.jsonl")


def training(
    root: Path, seed: int, function: str = "tests.study.jobs:searches", name: str = ""
) -> Training:
    outputs = FILES if function.endswith(("searches", "run", "is_killed")) else []
    config = SEARCH.model_copy(update={"seed": seed})
    return Training(
        name or f"search-{seed}", function, config, SPACE, TABLE, root, {"seed": str(seed)}, outputs
    )


def contents(root: Path, seed: int) -> dict[str, bytes]:
    return {name: (root / f"search-{seed}" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two searches, one after the other, in this process."""
    flush_denormals()
    root, before = tmp_path_factory.mktemp("sequential"), torch.get_num_threads()
    progress = Saying()
    assert trainings.run([training(root, 1), training(root, 2)], StudyConfig(), 1, progress) == {}
    assert {"search-1: threads 1", "search-2: threads 1"} <= set(progress.said)
    assert torch.get_num_threads() == before
    assert contents(root, 1)["shared.safetensors"] != contents(root, 2)["shared.safetensors"]
    return root


@pytest.mark.slow
def test_two_processes_give_the_same_bits_whatever_else_fails(
    sequential: Path, tmp_path: Path
) -> None:
    progress = Saying()
    wanted = [
        training(tmp_path, 1, "tests.study.jobs:is_killed"),
        training(tmp_path, 9, "tests.study.jobs:diverges", "diverges"),
        training(tmp_path, 9, "tests.study.jobs:is_wrong", "is-wrong"),
        training(tmp_path, 2),
    ]
    failed = trainings.run(wanted, StudyConfig(processes=2), 1, progress)
    assert failed == {
        "search-1": (
            "its process was killed (SIGKILL), most likely because memory ran out: lower"
            " study.processes or data.workers, then the same command resumes from its checkpoint"
        ),
        "diverges": "the loss is nan at step 7.",
        "is-wrong": "KeyError: 'no such thing'",
    }
    assert {f"{name}: {reason}" for name, reason in failed.items()} <= set(progress.said)
    assert "search-2: threads 1" in progress.said
    assert contents(tmp_path, 2) == contents(sequential, 2)

    checkpoint = torch.load(tmp_path / "search-1/checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] < checkpoint["steps"]
    assert trainings.run([training(tmp_path, 1)], StudyConfig(processes=2), 1, progress) == {}
    assert contents(tmp_path, 1) == contents(sequential, 1)


def test_failures_in_one_process_are_reported(tmp_path: Path) -> None:
    progress = Saying()
    wanted = [
        training(tmp_path, 9, "tests.study.jobs:diverges", name) for name in ("first", "second")
    ]
    assert trainings.run(wanted, StudyConfig(), 1, progress) == dict.fromkeys(
        ("first", "second"), "the loss is nan at step 7."
    )
    assert "second: the loss is nan at step 7." in progress.said


def gone(pid: int) -> bool:
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc whether a process is there"
)
def test_an_interruption_ends_the_children(tmp_path: Path) -> None:
    class Impatient(Progress):
        def info(self, message: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainings.run(
            [training(tmp_path, 1, "tests.study.jobs:waits")],
            StudyConfig(processes=2),
            1,
            Impatient(),
        )
    assert gone(int((tmp_path / "search-1/pid").read_text()))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc whether a process is there"
)
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from hwnas.config import StudyConfig; from hwnas.progress"
        " import Progress; from hwnas.study import trainings; from tests.study.test_trainings"
        f" import training; trainings.run([training(Path({str(tmp_path)!r}), 1,"
        " 'tests.study.jobs:waits')], StudyConfig(processes=2), 1, Progress())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    pid_file = tmp_path / "search-1/pid"
    for _ in range(6000):  # a busy machine takes a minute to import torch
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.05)
    child = int(pid_file.read_text())
    os.kill(child, 0)  # the child is running
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(child)


def test_several_trainings_get_one_thread_each() -> None:
    assert (
        trainings.threads_of(StudyConfig(), 2)
        == trainings.threads_of(StudyConfig(processes=4), 2)
        == 1
    )
    assert trainings.threads_of(StudyConfig(), 1) is None
    assert trainings.threads_of(StudyConfig(threads=3), 2) == 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a real Ray cluster on this computer."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'hwnas[ray]'")
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield started.address
    started.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bits(sequential: Path, tmp_path: Path, cluster: str) -> None:
    """One starts, one resumes from a checkpoint that is sent there, and one fails."""
    search = "hwnas.search.searching:run"  # the cluster's machines have hwnas, but not its tests
    killed = training(tmp_path, 1, "tests.study.jobs:is_killed")
    assert "SIGKILL" in trainings.run([killed], StudyConfig(processes=2), 1, Progress())["search-1"]
    nowhere = SEARCH.data.model_copy(update={"name": "npz", "path": "/nowhere"})
    lost = replace(
        training(tmp_path, 3, search), experiment=SEARCH.model_copy(update={"data": nowhere})
    )
    progress = Saying()
    wanted = [training(tmp_path, 1, search), training(tmp_path, 2, search), lost]
    failed = trainings.run(wanted, StudyConfig(ray_address=cluster), 1, progress)
    assert list(failed) == ["search-3"] and "/nowhere" in failed["search-3"]
    assert contents(tmp_path, 1) == contents(sequential, 1) and contents(tmp_path, 2) == contents(
        sequential, 2
    )
    assert not list(tmp_path.glob("search-[12]/checkpoint.pt"))
    with pytest.raises(
        ConfigError, match=r"study.threads = 64, but the largest machine of .* has 2 CPUs"
    ):
        trainings.run(
            [training(tmp_path, 4, search)], StudyConfig(ray_address=cluster), 64, progress
        )


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "'127.0.0.1:1' cannot be reached"),
        ("here", "'here' is not an address"),
        ("ray://127.0.0.1:10001", "is an address for Ray clients"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_refused(
    tmp_path: Path, address: str, words: str
) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'hwnas[ray]'")
    with pytest.raises(ConfigError, match=words):
        trainings.run([training(tmp_path, 1)], StudyConfig(ray_address=address), 1, Progress())


def test_a_missing_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"needs Ray, which is not installed: run pip install 'hwnas\[ray\]'"
    ):
        trainings.run(
            [training(tmp_path, 1)], StudyConfig(ray_address="127.0.0.1:6379"), 1, Progress()
        )


def test_output_that_is_not_an_event_does_not_stop_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that prints something else and ends in the middle of a line has failed,
    and nothing else happens.
    """
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nread order\necho welcome\nprintf \'{"event": "adv\'\nexit 3\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    failed = trainings.run(
        [training(tmp_path, 1), training(tmp_path, 2)], StudyConfig(processes=2), 1, Progress()
    )
    assert failed.keys() == {"search-1", "search-2"}
    assert all("ended with exit code 3" in reason for reason in failed.values())
