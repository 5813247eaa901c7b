"""``checkpoint.pt``: the state of a training between two runs, in a file whose damage is
noticed.

It is a file of ``torch.save``, thus a zip file, whose comment holds the sha256 of
everything before the comment. ``torch.load`` reads it like any other. The file before
the last stays beside it as ``checkpoint.previous.pt`` and takes over if the newest is
damaged.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from hwnas.document import read_bytes, write_atomic
from hwnas.errors import CheckpointError, DocumentError, StorageError
from hwnas.failures import is_out_of_memory
from hwnas.progress import Progress

ZIP_START = b"PK\x03\x04"
"""How a zip file with content begins."""

COMMENT = b"hwnas sha256 "
"""What precedes the hash, in hex, in the comment of the zip file."""

NO_COMMENT = b"\x00\x00"
"""The last two bytes of a zip file without a comment: its length."""


class _DamagedError(Exception):
    """The content of a file is not what was written."""


class StateFile:
    """The newest state in ``folder``, and the one before it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint.previous.pt"

    def exists(self) -> bool:
        """Whether there is a state to resume from."""
        return self.path.exists() or self.previous.exists()

    def write(self, state: dict[str, Any]) -> None:
        """Write a state atomically; the newest so far becomes the previous. Raises
        StorageError.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with buffer.getbuffer() as content:
            assert content[-2:] == NO_COMMENT
            digest = hashlib.sha256(content)
        buffer.seek(-len(NO_COMMENT), os.SEEK_END)
        buffer.write(_comment(digest.hexdigest()))
        if self.path.exists():
            self._keep_newest()
        write_atomic(self.path, buffer.getvalue())

    def _keep_newest(self) -> None:
        """Make the newest file the previous one as well, until a newer one replaces it."""
        # ``runs.stage`` removes what a kill leaves behind, as its name begins with a dot
        second_name = self.path.with_name(f".{self.previous.name}")
        second_name.unlink(missing_ok=True)
        try:
            # a link, so that at no moment the newest is missing
            os.link(self.path, second_name)
        except OSError:
            # file systems without links: ``read`` also finds the previous file alone
            _rename(self.path, self.previous)
        else:
            _rename(second_name, self.previous)

    def read(self, device: torch.device, progress: Progress) -> Any:
        """The newest state, with its tensors on ``device``. If that file is damaged, the
        previous one, with a warning; it then is the newest.

        Raises CheckpointError if no undamaged file is left.
        """
        if not self.path.exists():
            _rename(self.previous, self.path)
        try:
            return _read(self.path, device)
        except _DamagedError as error:
            advice = "restore it, or use --fresh to start again"
            if not self.previous.exists():
                raise CheckpointError(f"checkpoint {self.path} {error}: {advice}.") from error
            try:
                state = _read(self.previous, device)
            except _DamagedError as second:
                raise CheckpointError(
                    f"checkpoint {self.path} {error}, and so is {self.previous.name}: {advice}."
                ) from second
            # or the next checkpoint would take the damaged file for the previous one
            _rename(self.previous, self.path)
            progress.warning(
                f"checkpoint {self.path} {error}: resuming from the one before it instead."
            )
            return state

    def remove(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def _rename(old: Path, new: Path) -> None:
    """Rename a file, and replace ``new`` if it exists."""
    try:
        os.replace(old, new)
    except OSError as error:
        raise StorageError(
            f"{old} cannot be renamed to {new.name} ({error.strerror}): make its folder writable,"
            " or choose another --out folder."
        ) from error


def _comment(digest: str) -> bytes:
    """The end of a zip file whose comment holds a hash: the comment's length, 2 bytes,
    and the comment.
    """
    comment = COMMENT + digest.encode()
    return len(comment).to_bytes(2, "little") + comment


def _read(path: Path, device: torch.device) -> Any:
    """The state in a file. Raises _DamagedError if it is not what was written, and
    CheckpointError if it cannot be read at the moment.
    """
    try:
        content = read_bytes(path)
    except DocumentError as error:
        raise CheckpointError(str(error)) from error
    try:
        is_intact = content.startswith(ZIP_START) and _is_intact(content)
        if is_intact:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # zipfile and torch raise whatever damage leads to
        if is_out_of_memory(error):
            raise
        raise _DamagedError("is damaged or not a checkpoint") from error
    raise _DamagedError("is damaged")


def _is_intact(content: bytes) -> bool:
    """Whether the content of a zip file matches its hash or, in checkpoints of before
    there was one, its checksums.
    """
    length = len(_comment(hashlib.sha256().hexdigest()))
    digest = hashlib.sha256(memoryview(content)[:-length])
    digest.update(NO_COMMENT)
    if content.endswith(_comment(digest.hexdigest())):
        return True
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return not archive.comment and archive.testzip() is None
