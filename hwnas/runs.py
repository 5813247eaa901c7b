"""Run folders: one folder per experiment, one sub-folder per stage, each with a
manifest.

    runs/quickstart/
        config.json            the resolved configuration, defaults included
        profile/stage.json     manifest: hashes of the inputs and outputs, state
        profile/table.json     outputs
        search/ train/ export/ validate/ report/

A stage whose inputs have not changed and whose outputs match its manifest is skipped.
An interrupted stage resumes from its checkpoint. A stage whose inputs have changed
starts again, and the old folder is kept next to it as ``<stage>.old-<n>``.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from hwnas import __version__
from hwnas.config import Experiment, with_new_keys
from hwnas.document import (
    Document,
    explain,
    file_sha256,
    read_bytes,
    read_json,
    write_atomic,
)
from hwnas.errors import DocumentError, StorageError, UserError
from hwnas.progress import Progress

MANIFEST = "stage.json"


class StageManifest(Document):
    """What a stage read and wrote. ``inputs`` and ``outputs`` map names to sha256."""

    SCHEMA: ClassVar[str] = "hwnas.stage"

    stage: str
    state: Literal["started", "done"]
    hwnas: str
    inputs: dict[str, str]
    outputs: dict[str, str] = {}
    seconds: float = 0.0


@dataclass
class StageContext:
    """What a stage works with: the experiment, where to read, where to write, and where
    to report progress.
    """

    experiment: Experiment
    root: Path
    folder: Path
    progress: Progress = field(default_factory=Progress)

    def path(self, stage: str, name: str) -> Path:
        """A file of another stage of this run."""
        return self.root / stage / name


def state_of(folder: Path, inputs: Mapping[str, str]) -> Literal["done", "resume", "stale", "new"]:
    """The state of a stage folder with respect to ``inputs`` (name -> sha256)."""
    if not (folder / MANIFEST).exists():
        # files without a manifest may be anything, so they are moved aside, not used
        return "stale" if folder.exists() and any(folder.iterdir()) else "new"
    manifest = _manifest(folder)
    if manifest.inputs != dict(inputs):
        return "stale"
    if manifest.state == "started":
        return "resume"
    intact = all(
        (folder / name).is_file() and file_sha256(folder / name) == digest
        for name, digest in manifest.outputs.items()
    )
    return "done" if intact else "stale"


def _manifest(folder: Path) -> StageManifest:
    """The manifest of a stage folder. Raises DocumentError if it is damaged: without it,
    nobody knows what the files beside it were made from, and they may be worth days.
    """
    try:
        return StageManifest.load(folder / MANIFEST)
    except DocumentError as error:
        raise DocumentError(
            f"{str(error).removesuffix('.')}; restore it, or use --fresh, which moves"
            f" {folder.name} aside and starts the stage again."
        ) from error


def recorded_output(path: Path) -> str | None:
    """The sha256 of an output of a finished stage, as its manifest has it; None if the
    stage has not finished, or if the file is not one of its outputs.
    """
    if not (path.parent / MANIFEST).is_file():
        return None
    return _manifest(path.parent).outputs.get(path.name)


def changed_inputs(folder: Path, inputs: Mapping[str, str]) -> list[str]:
    """The names of the inputs that differ from those a stage folder was made with."""
    old_inputs: Mapping[str, str] = {}
    if (folder / MANIFEST).exists():
        old_inputs = _manifest(folder).inputs
    names = {*old_inputs, *inputs}
    return sorted(name for name in names if old_inputs.get(name) != inputs.get(name))


@contextmanager
def stage(folder: Path, name: str, inputs: Mapping[str, str], outputs: list[str]) -> Iterator[None]:
    """Run a stage's body inside its folder: writes the manifest as ``started`` before,
    and as ``done`` with the hashes of the outputs after it.
    """
    started = time.monotonic()
    # temporary files of a run that was killed
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    manifest = StageManifest(stage=name, state="started", hwnas=__version__, inputs=dict(inputs))
    manifest.save(folder / MANIFEST)
    yield
    hashes = {output: file_sha256(folder / output) for output in outputs}
    done = {"state": "done", "outputs": hashes, "seconds": round(time.monotonic() - started, 1)}
    manifest.model_copy(update=done).save(folder / MANIFEST)


def set_aside(folder: Path) -> Path:
    """Move a stage folder to ``<stage>.old-<n>``; earlier results are never deleted."""
    number = 1
    target = folder.with_name(f"{folder.name}.old-{number}")
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.old-{number}")
    try:
        folder.rename(target)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be moved to {target.name} ({error.strerror}): choose another --out"
            " folder."
        ) from error
    return target


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Lock a run folder for this process. Raises UserError if another process works in
    it.
    """
    with open(root / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another hwnas is running in {root}: wait for it, or choose another --out folder."
            ) from error
        yield


def prepare(root: Path) -> None:
    """Create the run folder. Raises StorageError, in one sentence, if it cannot be
    written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"run folder {root} cannot be created ({error.strerror}): choose another --out folder."
        ) from error
    if not os.access(root, os.W_OK):
        raise StorageError(f"run folder {root} is read-only: choose another --out folder.")


def save_config(root: Path, experiment: Experiment) -> None:
    """Write the resolved experiment into the run folder."""
    content = experiment.model_dump(mode="json", by_alias=True)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomic(root / "config.json", text.encode())


def load_config(root: Path) -> Experiment:
    """The experiment of a run folder. It holds every resolved key, so that changed
    defaults do not change the run.
    """
    try:
        content = read_json((root / "config.json").read_bytes(), "the file")
        # without warnings: hwnas wrote these keys, so the user could not act on one
        content = with_new_keys(content, str(root / "config.json"), warn=False)
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{root / 'config.json'}: {explain(error, Experiment)}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root} is not a run folder (its config.json: {error}): give the --out folder of an"
            " earlier hwnas run."
        ) from error


def is_number(value: object) -> bool:
    """Whether a value of a JSON text is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # false for NaN


class JsonLines:
    """An append-only file of JSON lines that survives being cut off in the middle of a
    line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, numbers: Collection[str] = ()) -> list[dict[str, Any]]:
        """All rows of ``each``."""
        return list(self.each(numbers))

    def each(self, numbers: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """The rows, one at a time: complete JSON objects, with a finite number under each
        of the keys ``numbers``.

        Other lines are left out: a last one without a newline, which a killed process
        left, and those that a bad disk or a person has changed. This is a log, and the
        rest of it is still of use.
        """
        if not self.path.exists():
            return
        for line in io.BytesIO(read_bytes(self.path)):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and all(is_number(row.get(key)) for key in numbers):
                yield row

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replace the whole file atomically. A resumed run drops the rows after its
        checkpoint this way.
        """
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    @contextmanager
    def appending(self) -> Iterator[Any]:
        """A function that appends one row and flushes it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # drop an incomplete last line, which the first new row would continue
            if self.path.exists():
                self.rewrite(self.read())
            # not in a ``with``: an OSError from the caller's body must not be caught here
            file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error

        def append(row: dict[str, Any]) -> None:
            remaining = (json.dumps(row) + "\n").encode()
            try:
                # an unbuffered write may be partial, as on a nearly full disk
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError as error:
                raise self._unwritable(error) from error

        with file:
            yield append

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path} cannot be written ({error.strerror}): free some space or choose another"
            " --out folder."
        )
