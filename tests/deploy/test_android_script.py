"""deploy/android.sh, run by this computer's POSIX shell with a program that does
nothing: what it leaves behind when it prints its last line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hwnas.resources import resource_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a program and a model, and an ``rm`` that is slow enough to
    show a lock that is removed too late.
    """
    run = tmp_path / "hwnas" / "run-1"
    run.mkdir(parents=True)
    shutil.copy(resource_path("deploy") / "android.sh", run)
    (run / "batch").write_text("0 model.tflite\n")
    (run / "model.tflite").write_text("")
    (run / "inputs").write_text("1234")
    scripts = {
        run / "benchmark_model-1": "#!/bin/sh\n",
        tmp_path / "bin" / "rm": f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("rm")} "$@"\n',
    }
    for path, text in scripts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return run


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ("measure all 1 benchmark_model-1", "run-1 done"),
        ("predict model.tflite 4 benchmark_model-1", "run-1 done"),
        ("predict model.tflite 4 benchmark_model-1", "run-1 failed"),
    ],
)
def test_the_lock_is_gone_before_the_last_line_is_printed(
    run: Path, arguments: str, last: str
) -> None:
    if last.endswith("failed"):
        (run / "input").mkdir()  # so that dd cannot write it
    environment = os.environ | {"PATH": f"{run.parent.parent / 'bin'}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["sh", run / "android.sh", *arguments.split()],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        last_line = next(
            line
            for line in process.stdout
            if line.startswith((f"{run.name} done", f"{run.name} failed"))
        )
        left = [path.name for path in run.parent.iterdir()]
        process.stdout.read()
    assert last_line.startswith(last)
    assert "lock" not in left
    assert "benchmark_model-1" in left
