"""Run folders: one folder per experiment, one sub-folder per stage, each with a manifest.

    runs/quickstart/
        config.json            the resolved configuration, defaults included
        profile/stage.json     manifest: hashes of what went in, hashes of what came out, state
        profile/table.json     outputs
        search/ train/ export/ validate/ report/

A stage whose inputs have not changed and whose outputs are as its manifest says is
skipped. One that was interrupted goes on from its checkpoint. One whose inputs changed
starts anew, and the old folder is kept beside it as ``<stage>.old-<n>``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from hwnas import __version__
from hwnas.config import Experiment, with_new_keys
from hwnas.document import Document, explain, file_sha256, write_atomic
from hwnas.errors import StorageError, UserError
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
    """What a stage function gets: the experiment, where to read, where to write, and
    whom to tell.
    """

    experiment: Experiment
    root: Path
    folder: Path
    progress: Progress = field(default_factory=Progress)

    def path(self, stage: str, name: str) -> Path:
        """A file of another stage of this run."""
        return self.root / stage / name


def state_of(folder: Path, inputs: Mapping[str, str]) -> Literal["done", "resume", "stale", "new"]:
    """Where a stage folder stands with respect to ``inputs`` (name -> sha256)."""
    if not (folder / MANIFEST).exists():
        return "stale" if folder.exists() and any(folder.iterdir()) else "new"
    manifest = StageManifest.load(folder / MANIFEST)
    if manifest.inputs != dict(inputs):
        return "stale"
    if manifest.state == "started":
        return "resume"
    intact = all(
        (folder / name).is_file() and file_sha256(folder / name) == digest
        for name, digest in manifest.outputs.items()
    )
    return "done" if intact else "stale"


def changed_inputs(folder: Path, inputs: Mapping[str, str]) -> list[str]:
    """The names of the inputs that differ from those a stage folder was made from."""
    made_from = StageManifest.load(folder / MANIFEST).inputs if (folder / MANIFEST).exists() else {}
    return sorted(name for name in {*made_from, *inputs} if made_from.get(name) != inputs.get(name))


@contextmanager
def stage(folder: Path, name: str, inputs: Mapping[str, str], outputs: list[str]) -> Iterator[None]:
    """Run a stage's body inside its folder: manifest ``started`` before, ``done`` with
    output hashes after.
    """
    started = time.monotonic()
    for leftover in folder.glob(".*"):  # what a kill cut off
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    manifest = StageManifest(stage=name, state="started", hwnas=__version__, inputs=dict(inputs))
    manifest.save(folder / MANIFEST)
    yield
    hashes = {output: file_sha256(folder / output) for output in outputs}
    done = {"state": "done", "outputs": hashes, "seconds": round(time.monotonic() - started, 1)}
    manifest.model_copy(update=done).save(folder / MANIFEST)


def set_aside(folder: Path) -> Path:
    """Move a stage folder to ``<stage>.old-<n>``: earlier results are never deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
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
    """Hold a run folder for this process alone. Raises UserError where another one is
    at work in it.
    """
    with open(root / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another hwnas is at work in {root}: wait for it, or choose another --out folder."
            ) from error
        yield


def prepare(root: Path) -> None:
    """Make the run folder, or say in one sentence why it cannot be written to."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"run folder {root} cannot be made ({error.strerror}): choose another --out folder."
        ) from error
    if not os.access(root, os.W_OK):
        raise StorageError(f"run folder {root} is read-only: choose another --out folder.")


def save_config(root: Path, experiment: Experiment) -> None:
    """Write the resolved experiment into the run folder."""
    content = experiment.model_dump(mode="json", by_alias=True)
    write_atomic(
        root / "config.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    )


def load_config(root: Path) -> Experiment:
    """The experiment of a run folder: every key as it was resolved, so that it is the
    same run whatever the defaults are now.
    """
    try:
        content = json.loads((root / "config.json").read_text())
        return Experiment.model_validate(with_new_keys(content, str(root / "config.json")))
    except ValidationError as error:
        raise UserError(f"{root / 'config.json'}: {explain(error, Experiment)}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root} is not a run folder (its config.json: {error}): give the --out folder of an"
            " earlier hwnas run."
        ) from error


class JsonLines:
    """An append-only file of JSON lines that survives being cut off in the middle of a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The complete lines. A last line without its end, left by a kill, is dropped."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replace the whole file atomically (a resumed run drops what lies behind its
        checkpoint).
        """
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    @contextmanager
    def appending(self) -> Iterator[Any]:
        """A function that appends one row and flushes it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.rewrite(self.read())
            # no ``with`` around all: what the caller's body raises is not ours to explain
            file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error

        def append(row: dict[str, Any]) -> None:
            rest = (json.dumps(row) + "\n").encode()
            try:
                while rest:  # a nearly full disk takes a part first and refuses the rest
                    rest = rest[file.write(rest) :]
            except OSError as error:
                raise self._unwritable(error) from error

        with file:
            yield append

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path} cannot be written ({error.strerror}): free some space or choose another"
            " --out folder."
        )
