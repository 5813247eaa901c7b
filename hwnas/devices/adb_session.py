"""A folder of our own on a phone, for the time of one call: what is in it, what has to
be sent, and the script that runs there.

Files go into the call's own folder first, and the script moves them to their place:
another call on the same phone sees a model whole or not at all, and one that was cut
off leaves nothing behind but its folder, which later calls remove after a day.
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
from hwnas.devices.phone import QUESTIONS, PhoneState, read
from hwnas.document import file_sha256
from hwnas.errors import DeviceError, StorageError
from hwnas.resources import resource_path

SILENCE_S = 900.0
"""How long the tool may print nothing. Each of its two phases ends after 150 s; a GPU's
kernels may take minutes to compile.
"""

OUTPUT_LINES = 1000
PROGRAMS = ("android_aarch64_benchmark_model", "benchmark_model")
SCRIPT = "android.sh"


def guide() -> Path:
    """Where a person reads how to get benchmark_model."""
    return resource_path("deploy") / "ANDROID.md"


@dataclass(frozen=True)
class Program:
    """A build of benchmark_model. It prints no version, so its contents stand for one."""

    path: Path
    sha256: str
    abi: str | None

    @property
    def name(self) -> str:
        """Its name on the phone."""
        return f"benchmark_model-{self.sha256[:12]}"

    @property
    def version(self) -> str:
        """What a table's header says: ``sha256:0123456789ab``."""
        return f"sha256:{self.sha256[:12]}"

    def check(self, serial: str, state: PhoneState) -> None:
        """Raises DeviceError where it does not run on such a phone."""
        if self.abi is None:
            raise DeviceError(
                f"{self.path} is no program for Android: {guide()} says where to get"
                " benchmark_model."
            )
        if state.abis and self.abi not in state.abis:
            raise DeviceError(
                f"{self.path} is for {self.abi}, but phone {serial} runs {', '.join(state.abis)}: "
                f"get the build for {state.abis[0]}, as {guide()} says."
            )


def find_program(named: str | None) -> Program:
    """The build at a path, else at ``$HWNAS_BENCHMARK_MODEL``, else on PATH. Raises DeviceError."""
    named = named or os.environ.get("HWNAS_BENCHMARK_MODEL")
    found = named or next(
        filter(None, (shutil.which(name, mode=os.F_OK) for name in PROGRAMS)), None
    )
    if found is None:
        raise DeviceError(
            "LiteRT's benchmark_model for Android was not found: name it in $HWNAS_BENCHMARK_MODEL"
            f" or in the device's option benchmark_model; {guide()} says where to get it."
        )
    program = Path(found).expanduser()
    try:
        with open(program, "rb") as file:
            head = file.read(20)
        return Program(program, file_sha256(program), tool.abi(head))
    except OSError as error:
        raise DeviceError(
            f"benchmark_model = {program} cannot be read ({error.strerror}); {guide()} says where"
            " to get it."
        ) from error


def ask(client: AdbClient) -> PhoneState:
    """The phone's state now."""
    state = read(client.shell(QUESTIONS))
    if not state.properties:
        raise PhoneGoneError(f"phone {client.serial} does not say what it is.")
    return state


@dataclass(frozen=True)
class Ended:
    """A process that ended on the phone: the number of its model or image, and what it printed."""

    number: int
    status: int
    output_bytes: int
    lines: tuple[str, ...]


class AdbSession:
    """Use as a context manager; ``open`` it before anything else, and again after the
    phone was away.

    ``folder`` is ours on the phone, ``work`` a place for temporary files here.
    """

    def __init__(self, client: AdbClient, folder: str, program: Program, work: Path) -> None:
        self.client, self.folder, self.program, self.work = client, folder, program, work
        self.name = f"run-{secrets.token_hex(6)}"
        self._state: PhoneState | None = None
        self._there: dict[str, int] = {}
        self._to_send: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(DeviceError):
            self.client.shell(shlex.join(["rm", "-rf", f"{self.folder}/{self.name}"]))

    def open(self) -> PhoneState:
        """Look what the phone is and what is on it, where that is not known, and return
        its latest state.
        """
        if self._state is None:
            state = self.ask()
            self.program.check(self.client.serial, state)
            self._there = self._prepare()
            self._to_send = {SCRIPT: resource_path("deploy") / SCRIPT}
            if self._there.get(self.program.name) != self.program.path.stat().st_size:
                self._to_send[self.program.name] = self.program.path
        assert self._state is not None
        return self._state

    def ask(self) -> PhoneState:
        """The phone's state now."""
        self._state = ask(self.client)
        return self._state

    def forget(self) -> None:
        """The phone went away: what was known of it may not hold any more."""
        self._state = None

    def _prepare(self) -> dict[str, int]:
        """Make our folders, remove those of calls that were cut off, and return name ->
        size in bytes of what is there.
        """
        folder, run = shlex.quote(self.folder), shlex.quote(self.name)
        answer = self.client.shell(
            f"mkdir -p {folder}/models {folder}/{run} && cd {folder} && {{ find . -maxdepth 1 -name"
            " 'run-*' -mtime +1 -exec rm -rf {} + ; stat -c '%s %n' benchmark_model-* models/* ;"
            " echo ready ; }"
        )
        rows = [line.split() for line in answer.splitlines()]
        if ["ready"] not in rows:
            why = next(
                (line.strip() for line in answer.splitlines() if line.strip()), "it gave no reason"
            )
            raise DeviceError(
                f"phone {self.client.serial} lets nothing be written into {self.folder}: {why}."
            )
        return {
            row[1].removeprefix("models/"): int(row[0])
            for row in rows
            if len(row) == 2 and row[0].isdecimal()
        }

    def add(self, model: Path) -> str:
        """The model's name on the phone; it goes there with the next ``send`` where it
        is not there. Raises OSError.
        """
        name = f"{file_sha256(model)}.tflite"
        if self._there.get(name) != model.stat().st_size:
            self._to_send[name] = model
        return name

    def send(self, texts: Mapping[str, bytes]) -> None:
        """Push what was added and these small files, in one go."""
        with TemporaryDirectory(dir=self.work, prefix=".adb-") as folder:
            local = Path(folder)
            try:
                for name, path in self._to_send.items():
                    (local / name).symlink_to(path.resolve())
                for name, content in texts.items():
                    (local / name).write_bytes(content)
            except OSError as error:
                raise StorageError(
                    f"{self.work} takes no more files ({error.strerror}): free some space."
                ) from error
            self.client.push(
                [local / name for name in (*self._to_send, *texts)], f"{self.folder}/{self.name}"
            )
        self._there |= {name: path.stat().st_size for name, path in self._to_send.items()}
        self._to_send = {}

    def receive(self, name: str) -> bytes:
        """A file of the call's folder."""
        with TemporaryDirectory(dir=self.work, prefix=".adb-") as folder:
            self.client.pull(f"{self.folder}/{self.name}/{name}", Path(folder) / name)
            return (Path(folder) / name).read_bytes()

    def run(self, arguments: Sequence[str]) -> Iterator[Ended | None]:
        """Run the script, and yield each process as it ends, or None while another
        call's batch goes first.

        Raises PhoneGoneError where it does not come to its end, DeviceError where the
        phone takes no files.
        """
        lines: deque[str] = deque(maxlen=OUTPUT_LINES)
        command = shlex.join(["sh", f"{self.folder}/{self.name}/{SCRIPT}", *arguments])
        for line in self.client.stream(command, SILENCE_S):
            name, _, said = line.partition(" ")
            words = said.split()
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
                    f"phone {self.client.serial}: {' '.join(words[1:])}: free some space on it, and"
                    " run the command again."
                )
            else:
                lines.clear()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        raise PhoneGoneError(
            f"phone {self.client.serial} stopped in the middle; the last that it said was"
            f" {last[:100]!r}."
        )
