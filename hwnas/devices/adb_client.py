"""The ``adb`` program, and one phone behind it.

Every call is an argument list. What ``adb shell`` gets is by its nature a string for
the phone's own shell: callers build it from constants and from values that they have
checked, with ``shlex.join``. adb's server is left as it is: never killed, and found
where adb itself finds it (``ANDROID_ADB_SERVER_PORT``, ``ADB_SERVER_SOCKET``).
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

from hwnas.errors import ConfigError, DeviceError

SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%()\[\] -]*")
"""Serial numbers of phones and emulators, HOST:PORT, and the names that wireless
debugging gives.
"""

ANSWER_S = 120.0
"""How long a phone may take over a small question, or over the next piece of a file,
before it counts as gone.
"""

STATES = {
    "unauthorized": (
        "does not trust this computer yet: unlock it and accept the dialog 'Allow USB debugging'"
    ),
    "authorizing": (
        "is still being asked whether it trusts this computer: unlock it and accept the dialog"
        " 'Allow USB debugging'"
    ),
    "offline": "is offline: plug it in again, or run 'adb reconnect offline'",
    "no permissions": (
        "may not be opened by this user: install Android's udev rules, 'apt install"
        " android-sdk-platform-tools-common'"
    ),
    "recovery": "is in its recovery system: restart it",
    "sideload": "is in its recovery system: restart it",
    "bootloader": "is in its boot loader: restart it",
}
"""What is wrong with a phone in a state other than ``device``, and what helps."""


class PhoneGoneError(DeviceError):
    """The phone does not answer any more; it may come back."""


@dataclass(frozen=True)
class Attached:
    """A phone that adb's server knows: its state (``device`` is the good one) and its
    model, where it tells.
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
    """Serial number -> phone, of all that adb knows. Starts adb's server where none
    runs. Raises DeviceError.
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
                "adb's server does not answer: 'adb kill-server' ends it, and the next command"
                " starts another."
            ) from error
    if done.returncode != 0:
        raise DeviceError(f"adb does not work: {_last_line(done.stderr)}")
    found = {}
    for line in done.stdout.partition("List of devices attached")[2].splitlines():
        match = re.match(rf"(\S.*?)\s+(device|{'|'.join(STATES)}|[a-z]+)\b(.*)", line)
        if match:
            model = re.search(r"\bmodel:(\S+)", match[3])
            found[match[1]] = Attached(match[2], model[1].replace("_", " ") if model else "")
    return found


def attached_phones() -> dict[str, str]:
    """Serial number -> model, or what is wrong, of the phones that adb knows right now.

    For listings: quick, never an error, and without side effects. It asks a running
    server only, since starting one takes seconds and leaves it running; ``adb devices``
    starts it.
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
    return {
        serial: phone.model or "Android" if phone.state == "device" else phone.state
        for serial, phone in phones.items()
    }


def check_serial(serial: str) -> str:
    """The serial number itself. Raises ValueError where it cannot be one."""
    if not SERIAL.fullmatch(serial):
        raise ValueError(
            "no phone has such a serial number; 'adb devices' lists those that are attached"
        )
    return serial


def choose(serial: str | None) -> str:
    """A serial number that is ready: the one asked for, else ``ANDROID_SERIAL``'s, else
    the only one attached. Raises DeviceError.
    """
    if serial is None and (named := os.environ.get("ANDROID_SERIAL")):
        try:
            serial = check_serial(named)
        except ValueError as error:
            raise ConfigError(f"ANDROID_SERIAL = {named!r}: {error}.") from error
    phones = attached()
    names = ", ".join(phones)
    if serial is not None:
        if serial not in phones:
            known = (
                f"attached: {names}"
                if phones
                else "plug it in and allow USB debugging in its developer options"
            )
            raise PhoneGoneError(f"phone {serial} is not attached; {known}.")
    elif not phones:
        raise PhoneGoneError(
            "no phone is attached: plug one in and allow USB debugging in its developer options."
        )
    elif len(phones) > 1:
        raise DeviceError(
            f"{len(phones)} phones are attached ({names}): say which with device.name ="
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
    """One attached phone. Calls raise PhoneGoneError where it does not answer any more."""

    def __init__(self, serial: str) -> None:
        self.serial = serial

    def shell(self, command: str) -> str:
        """What a command of the phone's shell prints, its errors included."""
        return self._run(["shell", _merged(command)], ANSWER_S).stdout

    def push(self, files: Sequence[Path], folder: str) -> None:
        """Copy files into a folder of the phone, under their own names. Raises
        DeviceError where it is full.
        """
        done = self._run(["push", *map(str, files), f"{folder}/"], 10 * ANSWER_S)
        if done.returncode != 0:
            if "No space left" in done.stdout:
                raise DeviceError(
                    f"phone {self.serial} is full: free some space on it, or empty its"
                    f" {folder.rpartition('/')[0]}."
                )
            raise DeviceError(
                f"phone {self.serial} does not take {files[0].name}: {_last_line(done.stdout)}"
            )

    def pull(self, file: str, target: Path) -> None:
        """Copy a file of the phone here."""
        done = self._run(["pull", file, str(target)], 10 * ANSWER_S)
        if done.returncode != 0:
            raise DeviceError(
                f"phone {self.serial} does not give {file}: {_last_line(done.stdout)}"
            )

    def stream(self, command: str, silence_s: float) -> Iterator[str]:
        """The lines that a command of the phone's shell prints, as they come.

        They simply end where the phone goes away, so the command has to say that it is
        done. Raises DeviceError after ``silence_s`` without a word.
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
        unfinished = b""
        while True:
            if not select.select([output], [], [], silence_s)[0]:
                raise DeviceError(
                    f"phone {self.serial} said nothing for {silence_s:.0f} s: restart it, and go on"
                    " with the same command."
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
            raise PhoneGoneError(f"phone {self.serial} does not answer.") from error
        if done.returncode != 0 and not self.present():
            raise PhoneGoneError(f"phone {self.serial} went away: {_last_line(done.stdout)}")
        return done

    def present(self) -> bool:
        """Whether the phone is attached and answers."""
        return attached().get(self.serial, Attached("gone")).state == "device"

    def wait(self, seconds: float, poll_s: float) -> bool:
        """Wait until the phone is back; False where it is not after ``seconds``."""
        end = time.monotonic() + seconds
        while not self.present():
            if time.monotonic() >= end:
                return False
            if re.search(r":\d+$", self.serial):
                self._reconnect()
            time.sleep(poll_s)
        return True

    def _reconnect(self) -> None:
        """A phone in the network comes back only when it is called; adb's server itself
        tries every ten seconds, ten times.
        """
        for verb in ("disconnect", "connect"):
            try:
                subprocess.run(
                    ["adb", verb, self.serial], capture_output=True, timeout=ANSWER_S, check=False
                )
            except subprocess.TimeoutExpired:
                return


def _merged(command: str) -> str:
    """The command with its errors among its output: adb passes the two on separately,
    and lines would be torn.
    """
    return f"{{ {command}\n}} 2>&1"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return (
        lines[-1].removeprefix("adb: ").removeprefix("error: ") if lines else "it gave no reason."
    )
