"""The file of a trained super-net in a run folder."""

from __future__ import annotations

from pathlib import Path

from hwnas.document import user_path
from hwnas.errors import ConfigError

SUPERNET_FILE = "shared.safetensors"
"""The file of the whole trained super-net, which other runs load by ``search.weights``."""


def supernet_path(folder: str, key: str = "search.weights") -> Path:
    """The super-net file of an earlier run. ``folder`` is the run's folder or its search
    folder; the configuration's ``key`` has named it.

    Raises ConfigError if there is no such file.
    """
    root = user_path(folder, key)
    if not root.is_dir():
        raise ConfigError(
            f"{key} = {folder!r} is not a folder: name the folder of a finished run that trained a"
            " super-net."
        )
    for path in (root / SUPERNET_FILE, root / "search" / SUPERNET_FILE):
        if path.is_file():
            return path
    raise ConfigError(
        f"{key} = {folder!r} has no {SUPERNET_FILE}: name the search folder of a finished run that"
        " trained a super-net."
    )
