"""The cache folder, which only this user can enter, and files in it whose content is
verified before they are used.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from hwnas.document import write_atomic
from hwnas.errors import StorageError

DIGEST_SUFFIX = ".sha256"


def cache_folder() -> Path:
    """``$HWNAS_CACHE``, or else ``~/.cache/hwnas``. It may be emptied at any time. Raises
    StorageError if the path begins with the home folder of an unknown user.
    """
    named = os.environ.get("HWNAS_CACHE") or "~/.cache/hwnas"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise StorageError(
            f"HWNAS_CACHE = {named!r} begins with a home folder that does not exist: set"
            " HWNAS_CACHE to a folder of your own."
        ) from error


def private_folder(path: Path) -> Path:
    """The folder itself, which is created if it does not exist. Nobody but this user can
    enter it afterwards.

    Raises StorageError if it cannot be created, or if it belongs to another user or to
    all users.
    """
    remedy = "set HWNAS_CACHE to a folder of your own."
    try:
        path.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        state = path.stat()
        if state.st_uid != os.geteuid():
            raise StorageError(
                f"the cache folder {path} belongs to another user, who could replace the files in"
                f" it: {remedy}"
            )
        if state.st_mode & stat.S_ISVTX:
            # /tmp belongs to root, and must stay open to everybody
            raise StorageError(f"the cache folder {path} is shared by all users: {remedy}")
        if stat.S_IMODE(state.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
            path.chmod(stat.S_IRWXU)
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(
            f"the cache folder {path} cannot be used ({reason}): {remedy}"
        ) from error
    return path


def write_verified(path: Path, content: bytes) -> None:
    """Write a file, and its digest next to it. Raises StorageError."""
    write_atomic(path, content)
    digest = _named(path)
    digest.update(content)
    write_atomic(_digest_path(path), digest.hexdigest().encode())


def is_intact(path: Path) -> bool:
    """Whether a file is what ``write_verified`` wrote at this path. False as well if the
    file or its digest is missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: _named(path)).hexdigest()
        return found.encode() == _digest_path(path).read_bytes()
    except OSError:
        return False


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + DIGEST_SUFFIX)


def _named(path: Path) -> hashlib._Hash:
    """A sha256 that begins with the name of the file and its folder: the file of another
    op is not intact under this name, even if its digest came along.
    """
    return hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode())
