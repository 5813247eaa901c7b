"""Programs of others that take our files, in environments of their own (``make judges``)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def judge(environment: str, script: str, *arguments: str | Path) -> Any:
    """What a script of this folder prints as JSON (None for nothing), run by
    ``.venv-ENVIRONMENT``. Skips the test where it is missing.
    """
    folder = ROOT / f".venv-{environment}"
    if not (folder / "installed").exists():
        pytest.skip(f"{folder.name} is missing: make judges")
    command = [str(folder / "bin" / "python"), str(FOLDER / script), *map(str, arguments)]
    # The checkout's own packages must not be found: PYTHONPATH is left out.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) if done.stdout else None
