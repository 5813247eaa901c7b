"""A board or a server as a device, over ssh.

The OpenSSH client program connects, so that what works as ``ssh HOST`` works here:
aliases, keys, agents, jump hosts.

``deploy/runner.py`` travels with every call, on stdin, and so is never out of date.
Only model files stay on the board, each under the hash of its content: they are sent
once, hundreds in one stream, and may be deleted there at any time.

Options of the device document: ``host`` (``pi@raspberrypi.local``, or an alias),
``port``, ``identity`` (a key file), ``config`` (an ssh_config file instead of
``~/.ssh/config``), ``python`` (the interpreter there; ``python3``) and ``folder``
(where the models stay; ``.cache/hwnas`` in the home folder there).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from threading import Timer
from typing import IO, Any

import numpy as np

from hwnas.devices.device import Device
from hwnas.document import file_sha256, nearest
from hwnas.errors import ConfigError, DeviceError
from hwnas.resources import resource_path

OPTIONS = ("host", "port", "identity", "config", "python", "folder")
_NAME = "[A-Za-z0-9_][A-Za-z0-9._+-]*"
_HOST = re.compile(f"({_NAME}@)?({_NAME}|[0-9A-Fa-f:.]+(%{_NAME})?)")

CONNECT_SECONDS = 15
START_SECONDS = 60.0
"""How long login, shell and Python of the board may take to start."""
ALIVE_SECONDS = 10
"""A board that leaves three questions in a row unanswered, asked this far apart, is dead."""
KEEP_SECONDS = 60
"""How long an unused connection stays open for the next call."""
SOCKET_PATH_MAX = 80
"""A longer path, with what ssh appends to it for a moment, does not fit every system's
socket addresses.
"""

_START = "; ".join(
    (
        "import sys",
        # as for a script: what lies about in the home folder is no module
        "sys.path[:] = [path for path in sys.path if path]",
        (
            'sys.version_info < (3, 8) and sys.exit("its Python %d.%d is too old, 3.8 is needed" %'
            " sys.version_info[:2])"
        ),
        "token, size = sys.argv.pop(1), int(sys.argv.pop(1))",
        "program = sys.stdin.buffer.read(size)",
        'sys.stdout.write("%c%s%c" % (10, token, 10))',
        "sys.stdout.flush()",
        'exec(compile(program, "runner.py", "exec"))',
    )
)
"""Runs the program that stdin begins with. Every Python parses it, and no shell changes
it: it is one line and has no backslash, no single quote and no exclamation mark. What
login scripts print comes before the token.
"""

_REMEDIES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one this computer knows; `{ssh}` tells how to forget the old one",
    ),
    (
        "Host key verification failed",
        "this computer does not know its host key; run `{ssh}` once and confirm it",
    ),
    (
        "Permission denied",
        (
            "it takes no key of yours; put one there with `ssh-copy-id`, or load it with `ssh-add`,"
            " until `{ssh}` asks nothing"
        ),
    ),
    (
        "Could not resolve hostname",
        "no machine of that name is known; correct the name or use its IP address",
    ),
)


class Ssh:
    """Runs ``deploy/runner.py`` on another machine. Raises ConfigError for a wrong
    option; nothing is contacted yet.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.runner = resource_path("deploy") / "runner.py"
        options = _checked(device)
        # commands start in the home folder
        self.python = re.sub("^~/", "./", options.get("python", "python3"))
        self.folder = options.get("folder", ".cache/hwnas")
        place = ["-p", options["port"]] if "port" in options else []
        for flag, name in (("-i", "identity"), ("-F", "config")):
            place += [flag, str(Path(options[name]).expanduser())] if name in options else []
        self.by_hand = shlex.join(["ssh", *place, options["host"]])
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": ALIVE_SECONDS,
            "ServerAliveCountMax": 3,
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            **({"IdentitiesOnly": "yes"} if "identity" in options else {}),
            **self._shared(),
        }
        self.ssh = [
            "ssh",
            "-T",
            "-x",
            "-a",
            *place,
            *(f"-o{key}={value}" for key, value in settings.items()),
            "--",
            options["host"],
        ]

    def _shared(self) -> dict[str, Any]:
        """The ssh settings by which all calls share a connection, through a socket in a
        folder of our own.
        """
        folder = Path(tempfile.mkdtemp(prefix="hwnas-"))
        weakref.finalize(self, _hang_up, folder, os.getpid())
        if len(str(folder)) > SOCKET_PATH_MAX:
            return {"ControlPath": "none"}
        return {
            "ControlMaster": "auto",
            "ControlPath": _socket(folder),
            "ControlPersist": KEEP_SECONDS,
        }

    @cached_property
    def board(self) -> dict[str, Any]:
        """What the runner tells about the board, asked once."""
        with self._runner("inspect") as process:
            answer: dict[str, Any] = self._json(_line(process), dict)
        return answer

    def cores(self, threads: int) -> tuple[int, ...]:
        """The device document's cores, else the board's last ones: the first serves the
        system's interrupts.
        """
        cores = self.device.cores or tuple(self.board["cores"][-threads:])
        if len(cores) < threads:
            raise DeviceError(
                f"{threads} threads need as many cores, but {self.device.id} offers {len(cores)}:"
                " lower device.threads."
            )
        return cores

    def runtimes(self) -> dict[str, str]:
        """What works there. Raises DeviceError where nothing does, with the command
        that changes it.
        """
        found: dict[str, str] = self.board["runtimes"]
        if not found:
            raise DeviceError(f"{self.device.id}: {next(iter(self.board['missing'].values()))}")
        return found

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan on the board and yield its rows as they are measured. Models that
        the board lacks are sent first.
        """
        del folder  # a job leaves no files
        names = {
            path: _name_there(Path(path))
            for item in plan["items"]
            for path in _files(item).values()
        }
        models = {name: Path(path) for path, name in names.items()}
        items = [
            {**item, **{key: names[path] for key, path in _files(item).items()}}
            for item in plan["items"]
        ]
        due = len(items)
        with self._runner("measure", "-", models=models) as process:
            lacking = self._lacking(process, models)
            if lacking:
                size_mb = sum(path.stat().st_size for path in lacking.values()) / 1e6
                yield {
                    "note": f"sending {len(lacking)} models ({size_mb:.1f} MB) to {self.device.id}"
                }
            self._send(process, lacking)
            _write(process, json.dumps({**plan, "items": items}).encode() + b"\n")
            for line in _stdout(process):
                if line.endswith(b"\n"):  # else the board died in the middle of it
                    row = self._json(line, dict)
                    if "error" in row:
                        row["error"] = _here(str(row["error"]), models)
                    due -= "id" in row
                    yield row
        if due:
            raise DeviceError(
                f"the runner on {self.device.id} left out {due} of {len(items)} items: run the"
                " command again."
            )

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Outputs of a model file for images. Images and outputs are streams; neither
        becomes a file on the board.
        """
        del folder
        models = {_name_there(model): model}
        pixels = images_NHWC.dtype == np.uint8
        images = np.ascontiguousarray(images_NHWC, np.uint8 if pixels else "<f4")
        with self._runner("predict", *models, "-", "-", models=models) as process:
            self._send(process, self._lacking(process, models))
            _write(
                process,
                json.dumps([*images.shape, *(["uint8"] if pixels else [])]).encode() + b"\n",
            )
            _write(process, images.data)
            shape = self._json(_line(process), list)
            content = _stdout(process).read()
        try:
            return np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise DeviceError(
                f"{model.name} gave {len(content)} bytes on {self.device.id} as outputs of shape"
                f" {shape}."
            ) from error

    def _lacking(
        self, process: subprocess.Popen[bytes], models: Mapping[str, Path]
    ) -> dict[str, Path]:
        """The models that the board lacks. What is no file here is not among them, and
        fails there as its own item.
        """
        sizes = {name: path.stat().st_size for name, path in models.items() if path.is_file()}
        _write(process, json.dumps(sizes).encode() + b"\n")
        lacking = self._json(_line(process), list)
        return {name: models[name] for name in sizes if name in lacking}

    def _send(self, process: subprocess.Popen[bytes], lacking: Mapping[str, Path]) -> None:
        for name, path in lacking.items():
            content = path.read_bytes()
            # under this name it would be wrong for good
            if not name.startswith(hashlib.sha256(content).hexdigest()):
                raise DeviceError(
                    f"{path} changed while it was sent to {self.device.id}: run the command again."
                )
            _write(process, content)

    @contextmanager
    def _runner(
        self, *arguments: str, models: Mapping[str, Path] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The runner at work on the board, its streams at hand; with ``models`` (by
        their names there) it wants to know them first.

        Raises DeviceError where it does not start or ends badly.
        """
        token, program = secrets.token_hex(8), self.runner.read_bytes()
        receiving = [] if models is None else ["--receive", self.folder]
        command = shlex.join(
            [self.python, "-c", _START, token, str(len(program)), *arguments, *receiving]
        )
        # `exit` keeps the shell there, which tells a runner that was killed from a
        # connection that was lost.
        with (
            tempfile.TemporaryFile() as errors,
            _start([*self.ssh, f"{command}; exit"], errors) as process,
        ):
            alarm = Timer(START_SECONDS, process.kill)
            alarm.start()
            begun, finished, said = False, False, ""
            try:
                _write(process, program)
                for line in _stdout(process):
                    begun = line.strip() == token.encode()
                    if begun:
                        break
                    said = line.decode(errors="replace").strip() or said
                alarm.cancel()
                if begun:
                    yield process
                    _stdin(process).close()
                    finished = True
                process.wait()
            except (BrokenPipeError, EOFError):
                process.wait()  # it ended early: its status and last words say why
            finally:
                alarm.cancel()
                process.kill()
                with suppress(BrokenPipeError):
                    _stdin(process).close()
            if not finished or process.returncode != 0:
                errors.seek(0)
                words = errors.read().decode(errors="replace")
                raise DeviceError(
                    _here(self._trouble(process.returncode, begun, words, said), models or {})
                )

    def _trouble(self, status: int, begun: bool, words: str, said: str) -> str:
        """A sentence for a runner that did not start (``begun``) or did not end well,
        from what came on stderr (and stdout).
        """
        board = self.device.id
        last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "")
        if status == 255 and begun:
            return (
                f"the connection to {board} was lost ({last or 'it no longer answers'}): check it,"
                " and run the command again to go on."
            )
        if status == 255:
            why = next(
                (remedy for sign, remedy in _REMEDIES if sign in words),
                f"{last or 'no answer'}; check that `{{ssh}}` works",
            )
            return f"{board} cannot be reached over ssh: {why.replace('{ssh}', self.by_hand)}."
        if begun and status > 128:
            name = (
                signal.Signals(status - 128).name
                if status - 128 in set(signal.Signals)
                else f"signal {status - 128}"
            )
            return (
                f"the runner on {board} was killed ({name}): if its memory is full, end other"
                " programs there."
            )
        if begun:
            return (
                f"{board}: {last}"
                if status in (2, 3, 4)
                else f"the runner on {board} stopped with status {status}: {last}"
            )
        if status < 0:
            return (
                f"{board} started nothing within {START_SECONDS:.0f} s: see with `{self.by_hand}`"
                " what its login scripts wait for."
            )
        python = f"name its interpreter in the device option python (now {self.python!r})"
        if status == 127:
            return (
                f"{board} has no such program as {self.python!r}: install it there (sudo apt"
                f" install python3), or {python}."
            )
        return f"{board} does not start the runner ({last or said or 'it says nothing'}): {python}."

    def _json(self, line: bytes, kind: type) -> Any:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            shown = line.decode(errors="replace").strip()[:80]
            raise DeviceError(
                f"the runner on {self.device.id} printed what does not parse: {shown!r}."
            )
        return value


def _checked(device: Device) -> dict[str, str]:
    """The options of a device document, each of them fit for a command line."""
    options = device.options
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"device {device.id} has an unknown option {unknown[0]!r};"
            f" {nearest(unknown[0], OPTIONS)}"
        )
    host = options.get("host", "")
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"device {device.id}: host = {host!r} is no name of a machine; write USER@HOST, or an"
            " alias of ~/.ssh/config."
        )
    port = options.get("port", "22")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"device {device.id}: port = {port!r} is no number from 1 to 65535.")
    for name in ("identity", "config"):
        if name in options and not Path(options[name]).expanduser().is_file():
            raise ConfigError(
                f"device {device.id}: {name} = {options[name]!r} is no file; correct the path."
            )
    for name in ("python", "folder"):
        if not options.get(name, "-").isprintable() or not options.get(name, "-"):
            raise ConfigError(f"device {device.id}: {name} = {options[name]!r} is no path.")
    return options


def _start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process with pipes. A file for stderr: nobody reads it on the way, and the
    shared connection keeps it open.
    """
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    except FileNotFoundError as error:
        raise DeviceError(
            "this computer has no ssh program: install the OpenSSH client (sudo apt install"
            " openssh-client)."
        ) from error


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _stdout(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _write(process: subprocess.Popen[bytes], content: bytes | memoryview) -> None:
    _stdin(process).write(content)
    _stdin(process).flush()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    line = _stdout(process).readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _files(item: Mapping[str, Any]) -> dict[str, str]:
    """The files that an item of a plan needs: its model, and an image to feed it where
    it has one.
    """
    return {key: item[key] for key in ("path", "input") if key in item}


def _name_there(path: Path) -> str:
    """A model's name on the board: the hash of its content. Where there is no such
    file, a name that the board does not have.
    """
    try:
        state = path.stat()
        return f"{_content_hash(path, state.st_mtime_ns, state.st_size)}{path.suffix}"
    except OSError:
        return f"{hashlib.sha256(str(path).encode()).hexdigest()}{path.suffix}"


@cache
def _content_hash(path: Path, mtime_ns: int, size: int) -> str:
    """sha256 of a file, taken once as long as the file is the same."""
    del mtime_ns, size
    return file_sha256(path)


def _here(text: str, models: Mapping[str, Path]) -> str:
    """What the board says, with the names that models have here."""
    for name, path in models.items():
        text = text.replace(name, str(path))
    return text


def _socket(folder: Path) -> str:
    return f'"{folder / "ssh"}"'


def _hang_up(folder: Path, owner: int) -> None:
    """End the shared connection. A forked process leaves it to its owner."""
    if os.getpid() != owner:
        return
    if (folder / "ssh").exists():
        command = [
            "ssh",
            "-F",
            os.devnull,
            f"-oControlPath={_socket(folder)}",
            "-O",
            "exit",
            "board",
        ]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(folder, ignore_errors=True)
