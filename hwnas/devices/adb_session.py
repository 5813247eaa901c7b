"""The folder on a phone for the duration of one call: what it contains, what has to be
sent, and the script that runs there.

Files first go into a folder of the call, and the script moves them into place. Other
calls on the same phone therefore see a model either complete or not at all. A call that
was interrupted leaves only its folder behind, which later calls remove after a day.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from hwnas.devices import benchmark_model as tool
from hwnas.devices.adb_client import AdbClient, PhoneGoneError
from hwnas.devices.device import expanded
from hwnas.devices.messages import excerpt
from hwnas.devices.phone import QUESTIONS, PhoneState, read
from hwnas.document import file_sha256
from hwnas.errors import DeviceError, StorageError
from hwnas.resources import resource_path

SILENCE_S = 900.0
"""How long the tool may print nothing. Each of its two phases ends after 150 s, and
kernels for a GPU may take minutes to compile.
"""

OUTPUT_LINES = 1000
"""How many of the last lines of a process are kept."""
PROGRAMS = ("android_aarch64_benchmark_model", "benchmark_model")
"""The names under which the tool is looked up on PATH. The first is that of LiteRT's
download.
"""
SCRIPT = "android.sh"
SHARED_FOLDER = "/data/local/tmp"
"""The folder on a phone in which all programs of adb's user keep files."""


def guide() -> Path:
    """The file that tells users how to get benchmark_model."""
    return resource_path("deploy") / "ANDROID.md"


@dataclass(frozen=True)
class Program:
    """A build of benchmark_model. It has no version number, so the hash of its content
    serves as one.
    """

    path: Path
    sha256: str
    abi: str | None

    @property
    def name(self) -> str:
        """The name of the file on the phone."""
        return f"benchmark_model-{self.sha256[:12]}"

    @property
    def version(self) -> str:
        """The version in a table's header: ``sha256:0123456789ab``."""
        return f"sha256:{self.sha256[:12]}"

    def check(self, serial: str, state: PhoneState) -> None:
        """Raise DeviceError if the program cannot run on this phone."""
        if self.abi is None:
            raise DeviceError(
                f"{self.path} is not a program for Android: {guide()} explains where to get"
                " benchmark_model."
            )
        if state.abis and self.abi not in state.abis:
            raise DeviceError(
                f"{self.path} is for {self.abi}, but phone {serial} runs {', '.join(state.abis)}: "
                f"get the build for {state.abis[0]}, as {guide()} explains."
            )


def find_program(named: str | None) -> Program:
    """The build at the path ``named``, or else at ``$HWNAS_BENCHMARK_MODEL``, or else on
    PATH. Raises DeviceError if there is none.
    """
    # F_OK: a program for Android need not be executable on this computer
    on_path = [shutil.which(name, mode=os.F_OK) for name in PROGRAMS]
    places = [named, os.environ.get("HWNAS_BENCHMARK_MODEL"), *on_path]
    path = next((place for place in places if place), None)
    if path is None:
        raise DeviceError(
            "LiteRT's benchmark_model for Android was not found: set $HWNAS_BENCHMARK_MODEL or the"
            f" device option benchmark_model to its path; {guide()} explains where to get it."
        )
    program = expanded(path)
    try:
        with open(program, "rb") as file:
            head = file.read(20)
        return Program(program, file_sha256(program), tool.abi(head))
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        shown = excerpt(str(program))
        raise DeviceError(
            f"benchmark_model = {shown} cannot be read ({reason}): correct the path;"
            f" {guide()} explains where to get the program."
        ) from error


def ask(client: AdbClient) -> PhoneState:
    """The current state of the phone. Raises PhoneGoneError."""
    state = read(client.shell(QUESTIONS))
    if not state.properties:
        raise PhoneGoneError(f"phone {client.serial} does not answer getprop.")
    return state


@dataclass(frozen=True)
class Ended:
    """A process that ended on the phone: the number of its model or image, its exit status,
    the size of its output file, and what it printed.
    """

    number: int
    status: int
    output_bytes: int
    lines: tuple[str, ...]


class AdbSession:
    """A context manager for one call. Call ``open`` before anything else, and again after
    the phone was away.

    ``folder`` is our folder on the phone, ``work`` a folder for temporary files on this
    computer.
    """

    def __init__(self, client: AdbClient, folder: str, program: Program, work: Path) -> None:
        self.client = client
        self.folder = folder
        self.program = program
        self.work = work
        self.name = f"run-{secrets.token_hex(6)}"
        self._state: PhoneState | None = None
        self._on_phone: dict[str, int] = {}
        """Name -> size in bytes of the files on the phone."""
        self._to_send: dict[str, Path] = {}
        self._unverified: dict[str, Path] = {}
        """The files of this call that were on the phone before, to be verified by ``send``."""
        self._verified: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(DeviceError):
            self.client.shell(shlex.join(["rm", "-rf", f"{self.folder}/{self.name}"]))

    def open(self) -> PhoneState:
        """The latest known state of the phone. On the first call and after ``forget``, this
        checks the phone and lists its files.
        """
        if self._state is None:
            state = self.ask()
            self.program.check(self.client.serial, state)
            self._on_phone = self._prepare()
            # the script always, so that it is never an old version
            self._to_send = {SCRIPT: resource_path("deploy") / SCRIPT}
            self._unverified = {}
            self._verified = set()
            self._queue(self.program.name, self.program.path)
        assert self._state is not None
        return self._state

    def ask(self) -> PhoneState:
        """The current state of the phone. Raises PhoneGoneError."""
        self._state = ask(self.client)
        return self._state

    def forget(self) -> None:
        """Drop what is known about the phone, because it went away."""
        self._state = None

    def _prepare(self) -> dict[str, int]:
        """Create our folders, closed to other users, and remove those of interrupted calls.
        Returns name -> size in bytes of the files on the phone. Raises DeviceError if the
        folder is not writable.
        """
        folder, run = shlex.quote(self.folder), shlex.quote(self.name)
        # the folder of all programs must stay open to them
        closed = "." if self.folder != SHARED_FOLDER else ""
        answer = self.client.shell(
            f"umask 077; mkdir -p {folder}/models {folder}/{run} && cd {folder} &&"
            f" chmod 700 models {run} {closed} && {{ find . -maxdepth 1 -name"
            " 'run-*' -mtime +1 -exec rm -rf {} + ; stat -c '%s %n' benchmark_model-* models/* ;"
            " echo ready ; }"
        )
        rows = [line.split() for line in answer.splitlines()]
        if ["ready"] not in rows:
            first = (line.strip() for line in answer.splitlines() if line.strip())
            reason = excerpt(next(first, "it gave no reason"))
            raise DeviceError(
                f"cannot write to {self.folder} on phone {self.client.serial}: {reason}."
            )
        sizes = {}
        for row in rows:
            if len(row) == 2 and row[0].isdecimal():
                size, name = row
                sizes[name.removeprefix("models/")] = int(size)
        return sizes

    def add(self, model: Path) -> str:
        """Queue a model for the next ``send`` if the phone does not have it. Returns its
        name on the phone. Raises OSError.
        """
        name = f"{file_sha256(model)}.tflite"
        self._queue(name, model)
        return name

    def _queue(self, name: str, path: Path) -> None:
        """Queue a file for the next ``send`` unless one of its size is on the phone, which
        then has to be verified.
        """
        if self._on_phone.get(name) != path.stat().st_size:
            self._to_send[name] = path
        elif name not in self._verified:
            self._unverified[name] = path

    def _queue_damaged(self) -> None:
        """Queue the files that are on the phone with another content than their names say.
        If the phone has no sha256sum, these are all files.
        """
        if not self._unverified:
            return
        places = {name: self._place(name) for name in self._unverified}
        answer = self.client.shell(
            f"cd {shlex.quote(self.folder)} && {shlex.join(['sha256sum', *places.values()])}"
        )
        hashes = {}
        for row in map(str.split, answer.splitlines()):
            if len(row) == 2:
                found, place = row
                hashes[place] = found
        for name, path in self._unverified.items():
            if hashes.get(places[name]) == self._sha256(name):
                self._verified.add(name)
            else:
                self._to_send[name] = path
        self._unverified = {}

    def _place(self, name: str) -> str:
        """Where a file is on the phone, relative to our folder."""
        return name if name == self.program.name else f"models/{name}"

    def _sha256(self, name: str) -> str:
        """The hash of the content that the file of this name must have."""
        return self.program.sha256 if name == self.program.name else name.partition(".")[0]

    def send(self, texts: Mapping[str, bytes]) -> None:
        """Push all queued files and these small ones (name -> content), in one call of adb.
        Files that were damaged on the phone are pushed again.
        """
        self._queue_damaged()
        with TemporaryDirectory(dir=self.work, prefix=".adb-") as folder:
            local = Path(folder)
            try:
                for name, path in self._to_send.items():
                    (local / name).symlink_to(path.resolve())
                for name, content in texts.items():
                    (local / name).write_bytes(content)
            except OSError as error:
                raise StorageError(
                    f"cannot write to {self.work} ({error.strerror}): free some disk space."
                ) from error
            self.client.push(
                [local / name for name in (*self._to_send, *texts)], f"{self.folder}/{self.name}"
            )
        self._on_phone |= {name: path.stat().st_size for name, path in self._to_send.items()}
        # the script verifies them before it uses them
        self._verified |= self._to_send.keys()
        self._to_send = {}

    def receive(self, name: str) -> bytes:
        """The content of a file in the call's folder."""
        with TemporaryDirectory(dir=self.work, prefix=".adb-") as folder:
            self.client.pull(f"{self.folder}/{self.name}/{name}", Path(folder) / name)
            return (Path(folder) / name).read_bytes()

    def run(self, arguments: Sequence[str]) -> Iterator[Ended | None]:
        """Run the script. Yields each process as it ends, and None while another call's
        batch runs first.

        Raises PhoneGoneError if the script does not finish, DeviceError if the phone is full
        or a file was damaged on its way.
        """
        lines: deque[str] = deque(maxlen=OUTPUT_LINES)
        command = shlex.join(["sh", f"{self.folder}/{self.name}/{SCRIPT}", *arguments])
        for line in self.client.stream(command, SILENCE_S):
            name, _, rest = line.partition(" ")
            words = rest.split()
            # the script marks its own lines with the call's name; others are the tool's
            if name != self.name:
                lines.append(line)
            elif words[0] == "end":
                yield Ended(int(words[1]), int(words[2]), int(words[3]), tuple(lines))
            elif words[0] == "waiting":
                yield None
            elif words[0] == "done":
                return
            elif words[0] == "failed":
                raise DeviceError(
                    f"phone {self.client.serial}: {excerpt(' '.join(words[1:]))}: free some space"
                    " on it, and"
                    " run the command again."
                )
            elif words[0] == "damaged":
                raise DeviceError(
                    f"{excerpt(words[1])} was damaged on its way to phone {self.client.serial}: run"
                    " the"
                    " command again, with another cable if that happens again."
                )
            else:
                lines.clear()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        raise PhoneGoneError(
            f"phone {self.client.serial} stopped in the middle; its last output was"
            f" {excerpt(last)!r}."
        )
