"""deploy/android.sh, run by this computer's POSIX shell with a program that does
nothing: what it leaves behind when it prints its last line.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hwnas.resources import resource_path

PROGRAM_TEXT = "#!/bin/sh\n"
PROGRAM = f"benchmark_model-{hashlib.sha256(PROGRAM_TEXT.encode()).hexdigest()[:12]}"
MODEL = f"{hashlib.sha256(b'').hexdigest()}.tflite"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a program and a model, and an ``rm`` that is slow enough to
    show a lock that is removed too late.
    """
    run = tmp_path / "hwnas" / "run-1"
    run.mkdir(parents=True)
    shutil.copy(resource_path("deploy") / "android.sh", run)
    (run / "batch").write_text(f"0 {MODEL}\n")
    (run / MODEL).write_text("")
    (run / "inputs").write_text("1234")
    scripts = {
        run / PROGRAM: PROGRAM_TEXT,
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
        (f"measure all 1 {PROGRAM}", "run-1 done"),
        (f"predict {MODEL} 4 {PROGRAM}", "run-1 done"),
        (f"predict {MODEL} 4 {PROGRAM}", "run-1 failed"),
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
    assert PROGRAM in left


@pytest.mark.parametrize("damaged", [MODEL, PROGRAM])
def test_a_file_that_arrives_damaged_is_not_used(run: Path, damaged: str) -> None:
    (run / damaged).write_text("something else")
    arguments = ["measure", "all", "1", PROGRAM]
    done = subprocess.run(
        ["sh", run / "android.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n") == ["", f"run-1 damaged {damaged}", ""]
    assert done.returncode == 1
    assert not (run.parent / damaged).exists() and not (run.parent / "models" / damaged).exists()
    assert "lock" not in [path.name for path in run.parent.iterdir()]


def test_a_phone_without_sha256sum_takes_the_files_as_they_are(run: Path) -> None:
    tools = run.parent.parent / "tools"
    tools.mkdir()
    for name in ("ln", "rm", "mkdir", "mv", "chmod", "readlink", "tr", "grep", "sleep"):
        program = shutil.which(name)
        assert program is not None
        (tools / name).symlink_to(program)
    (run / MODEL).write_text("something else")
    done = subprocess.run(
        [shutil.which("sh") or "sh", run / "android.sh", "measure", "all", "1", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tools)},
    )
    assert done.stdout.strip().endswith("run-1 done"), done.stderr


def test_what_is_placed_is_closed_to_others(run: Path) -> None:
    subprocess.run(["sh", run / "android.sh", "measure", "all", "1", PROGRAM], check=True)
    assert (run.parent / PROGRAM).stat().st_mode & 0o777 == 0o700
    assert (run.parent / "models").stat().st_mode & 0o777 == 0o700
