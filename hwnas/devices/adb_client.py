"""The ``adb`` program, and one phone behind it.

Every call is an argument list. ``adb shell`` is the exception: it takes one string for
the phone's shell. Callers build it with ``shlex.join`` from constants and from values
that they have checked.

adb's server is never killed. It is used wherever adb itself finds it
(``ANDROID_ADB_SERVER_PORT``, ``ADB_SERVER_SOCKET``).
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hwnas.devices.messages import last_line
from hwnas.errors import ConfigError, DeviceError

SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%()\[\] -]*")
"""Serial numbers of phones and emulators, HOST:PORT, and the names from wireless
debugging.
"""

ANSWER_S = 120.0
"""How long a phone may take to answer a short command before it counts as gone. Copying
files may take ten times as long.
"""

STATES = {
    "unauthorized": (
        "does not trust this computer yet: unlock it and accept the dialog 'Allow USB debugging'"
    ),
    "authorizing": (
        "is waiting for permission: unlock it and accept the dialog 'Allow USB debugging'"
    ),
    "offline": "is offline: plug it in again, or run 'adb reconnect offline'",
    "no permissions": (
        "cannot be opened by this user: install Android's udev rules, 'apt install"
        " android-sdk-platform-tools-common'"
    ),
    "recovery": "is in its recovery system: restart it",
    "sideload": "is in its recovery system: restart it",
    "bootloader": "is in its boot loader: restart it",
}
"""State other than ``device`` -> what is wrong with the phone, and the fix."""


class PhoneGoneError(DeviceError):
    """The phone no longer answers. It may come back."""


@dataclass(frozen=True)
class Attached:
    """A phone that adb's server knows: its state (``device`` if it is ready) and its
    model, empty if unknown.
    """

    state: str
    model: str = ""


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DeviceError(
            "adb is not installed: 'apt install adb' (Debian, Ubuntu), 'brew install --cask"
            " android-platform-tools' (macOS), or Android's SDK Platform-Tools."
        ) from error


def attached() -> dict[str, Attached]:
    """All phones that adb knows, by serial number. Starts adb's server if none runs.
    Raises DeviceError.
    """
    with _installed():
        try:
            done = subprocess.run(
                ["adb", "devices", "-l"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                "adb's server does not answer: end it with 'adb kill-server'; the next command"
                " starts a new one."
            ) from error
    if done.returncode != 0:
        raise DeviceError(f"adb does not work: {_last_line(done.stderr)}")
    phones = {}
    for line in done.stdout.partition("List of devices attached")[2].splitlines():
        match = re.match(rf"(\S.*?)\s+(device|{'|'.join(STATES)}|[a-z]+)\b(.*)", line)
        if match:
            model = re.search(r"\bmodel:(\S+)", match[3])
            phones[match[1]] = Attached(match[2], model[1].replace("_", " ") if model else "")
    return phones


def attached_phones() -> dict[str, str]:
    """The phones that adb knows right now: serial number -> model, or the state if a phone
    is not ready.

    For listings: quick, without side effects, and never raises an error. It only asks a
    server that is already running, because starting one takes seconds and leaves it
    running. ``adb devices`` starts it.
    """
    port = os.environ.get("ANDROID_ADB_SERVER_PORT", "5037")
    if "ADB_SERVER_SOCKET" not in os.environ:
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=0.2).close()
        except (OSError, ValueError, OverflowError):
            return {}
    try:
        phones = attached()
    except DeviceError:
        return {}
    descriptions = {}
    for serial, phone in phones.items():
        ready = phone.state == "device"
        descriptions[serial] = (phone.model or "Android") if ready else phone.state
    return descriptions


def check_serial(serial: str) -> str:
    """The serial number itself. Raises ValueError if no phone can have it."""
    if not SERIAL.fullmatch(serial):
        raise ValueError(
            "not a valid serial number; 'adb devices' lists those of the attached phones"
        )
    return serial


def choose(serial: str | None) -> str:
    """The serial number of a phone that is ready: the one asked for, or else the one in
    ``ANDROID_SERIAL``, or else the only one attached.

    Raises DeviceError if there is no such phone, or if the choice is ambiguous.
    """
    from_environment = os.environ.get("ANDROID_SERIAL")
    if serial is None and from_environment:
        try:
            serial = check_serial(from_environment)
        except ValueError as error:
            raise ConfigError(f"ANDROID_SERIAL = {from_environment!r}: {error}.") from error
    phones = attached()
    names = ", ".join(phones)
    if serial is not None:
        if serial not in phones:
            remedy = "plug it in and allow USB debugging in its developer options"
            if phones:
                remedy = f"attached: {names}"
            raise PhoneGoneError(f"phone {serial} is not attached; {remedy}.")
    elif not phones:
        raise PhoneGoneError(
            "no phone is attached: plug one in and allow USB debugging in its developer options."
        )
    elif len(phones) > 1:
        raise DeviceError(
            f"{len(phones)} phones are attached ({names}): choose one with device.name ="
            " 'adb:SERIAL'."
        )
    else:
        serial = next(iter(phones))
    state = phones[serial].state
    if state != "device":
        raise PhoneGoneError(
            f"phone {serial} {STATES.get(state, f'is in the state {state!r}: restart it')}."
        )
    return serial


class AdbClient:
    """One attached phone. Calls raise PhoneGoneError if it no longer answers."""

    def __init__(self, serial: str) -> None:
        self.serial = serial

    def shell(self, command: str) -> str:
        """Run a command in the phone's shell, and return its stdout and stderr combined."""
        return self._run(["shell", _merged(command)], ANSWER_S).stdout

    def push(self, files: Sequence[Path], folder: str) -> None:
        """Copy files into a folder on the phone, under their own names. Raises DeviceError
        if the phone is full.
        """
        done = self._run(["push", *map(str, files), f"{folder}/"], 10 * ANSWER_S)
        if done.returncode != 0:
            if "No space left" in done.stdout:
                raise DeviceError(
                    f"phone {self.serial} is full: free some space on it, or delete its folder"
                    f" {folder.rpartition('/')[0]}."
                )
            raise DeviceError(
                f"cannot copy {files[0].name} to phone {self.serial}: {_last_line(done.stdout)}"
            )

    def pull(self, file: str, target: Path) -> None:
        """Copy a file from the phone to this computer. Raises DeviceError if that fails."""
        done = self._run(["pull", file, str(target)], 10 * ANSWER_S)
        if done.returncode != 0:
            raise DeviceError(
                f"cannot copy {file} from phone {self.serial}: {_last_line(done.stdout)}"
            )

    def stream(self, command: str, silence_s: float) -> Iterator[str]:
        """Run a command in the phone's shell, and yield its lines as they arrive.

        If the phone goes away, the lines simply end. The command therefore has to print
        that it is done. Raises DeviceError after ``silence_s`` without output.
        """
        with _installed():
            process = subprocess.Popen(
                ["adb", "-s", self.serial, "shell", _merged(command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        with process:
            assert process.stdout is not None
            try:
                yield from self._lines(process.stdout, silence_s)
            finally:
                process.kill()

    def _lines(self, output: IO[bytes], silence_s: float) -> Iterator[str]:
        """Lines by hand, because reading a line from the pipe would block without a limit."""
        unfinished = b""
        while True:
            if not select.select([output], [], [], silence_s)[0]:
                raise DeviceError(
                    f"phone {self.serial} printed nothing for {silence_s:.0f} s: restart it, and"
                    " run the same command again to resume."
                )
            data = os.read(output.fileno(), 65536)
            if not data:
                return
            *lines, unfinished = (unfinished + data).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").rstrip("\r")

    def _run(self, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        command = ["adb", "-s", self.serial, *arguments]
        try:
            with _installed():
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=timeout_s,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            raise PhoneGoneError(
                f"phone {self.serial} did not answer within {timeout_s:.0f} s."
            ) from error
        # adb passes on the exit status of the phone's shell, so a failure alone does not
        # tell whether the phone is gone.
        if done.returncode != 0 and not self.present():
            raise PhoneGoneError(f"phone {self.serial} went away: {_last_line(done.stdout)}")
        return done

    def present(self) -> bool:
        """Whether the phone is attached and answers."""
        return attached().get(self.serial, Attached("gone")).state == "device"

    def wait(self, seconds: float, poll_s: float) -> bool:
        """Wait until the phone is back. Returns False if it is not after ``seconds``."""
        end = time.monotonic() + seconds
        while not self.present():
            if time.monotonic() >= end:
                return False
            if re.search(r":\d+$", self.serial):
                self._reconnect()
            time.sleep(poll_s)
        return True

    def _reconnect(self) -> None:
        """Connect again to a phone in the network. adb's server itself tries only ten
        times, every ten seconds.
        """
        for verb in ("disconnect", "connect"):
            try:
                subprocess.run(
                    ["adb", verb, self.serial], capture_output=True, timeout=ANSWER_S, check=False
                )
            except subprocess.TimeoutExpired:
                return


def _merged(command: str) -> str:
    """The command with stderr redirected to stdout. adb forwards the two separately, and
    their lines would be mixed up.
    """
    return f"{{ {command}\n}} 2>&1"


def _last_line(text: str) -> str:
    said = last_line(text).removeprefix("adb: ").removeprefix("error: ")
    return said or "it gave no reason."
