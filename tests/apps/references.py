"""Third-party programs that read our files, in their own environments (``make
references``).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def run_reference(environment: str, script: str, *arguments: str | Path) -> Any:
    """The JSON that a script of this folder prints (None for nothing), run in
    ``.venv-ENVIRONMENT``. Skips the test if that is missing.
    """
    folder = ROOT / f".venv-{environment}"
    if not (folder / "installed").exists():
        pytest.skip(f"{folder.name} is missing: make references")
    command = [str(folder / "bin" / "python"), str(FOLDER / script), *map(str, arguments)]
    # PYTHONPATH is left out, so that the checkout's own packages are not found.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) if done.stdout else None
