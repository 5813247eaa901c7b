"""A board or a server as a device, over ssh.

The OpenSSH client makes the connections, so whatever works with ``ssh HOST`` works
here: aliases, keys, agents, jump hosts.

Every call sends ``deploy/runner.py`` along, on stdin, so the board never has an old
version of it. Only model files stay on the board, each named by the hash of its
content, in a folder that only its user can enter. They are sent once, hundreds in one
stream, and may be deleted there at any time. The board verifies them by their hashes
before every use, and damaged ones are sent again.

Options of the device document: ``host`` (``pi@raspberrypi.local``, or an alias),
``port``, ``identity`` (a key file), ``config`` (an ssh_config file instead of
``~/.ssh/config``), ``python`` (the interpreter on the board; default ``python3``) and
``folder`` (where the models stay; default ``.cache/hwnas`` in the home folder).
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

from hwnas.devices.device import Device, expanded, is_file, pinned_cores
from hwnas.devices.messages import excerpt, last_line
from hwnas.document import file_sha256, nearest
from hwnas.errors import ConfigError, DeviceError
from hwnas.printable import quoted
from hwnas.resources import resource_path

OPTIONS = ("host", "port", "identity", "config", "python", "folder")
_NAME = "[A-Za-z0-9_][A-Za-z0-9._+-]*"
_HOST = re.compile(f"({_NAME}@)?({_NAME}|[0-9A-Fa-f:.]+(%{_NAME})?)")

CONNECT_SECONDS = 15
START_SECONDS = 60.0
"""How long the board may take to log in and to start its shell and Python."""
ALIVE_SECONDS = 10
"""Interval of the keep-alive messages. After three without an answer, the connection
counts as lost.
"""
KEEP_SECONDS = 60
"""How long an unused connection stays open for the next call."""
SOCKET_PATH_MAX = 80
"""The longest folder name for the shared socket. ssh appends to it for a moment, and the
whole path has to fit into the socket address of every system.
"""

_START = "; ".join(
    (
        "import sys",
        # as for a script: files in the home folder must not be imported as modules
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
"""Python code that runs the program at the beginning of stdin. The token on stdout
separates the output of login scripts from the program's.

Every version of Python can parse this code, and no shell alters it: it is one line
without backslashes, single quotes and exclamation marks.
"""

_REMEDIES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key has changed; run `{ssh}` to see how to remove the old one",
    ),
    (
        "Host key verification failed",
        "this computer does not know its host key; run `{ssh}` once and confirm the key",
    ),
    (
        "Permission denied",
        (
            "it accepts none of your keys; install one with `ssh-copy-id`, or load it with"
            " `ssh-add`, until `{ssh}` works without a password"
        ),
    ),
    (
        "Could not resolve hostname",
        "its host name is unknown; correct the name or use its IP address",
    ),
)
"""What ssh prints -> the end of our sentence: what is wrong, and the fix."""


class Ssh:
    """Runs ``deploy/runner.py`` on another machine.

    Raises ConfigError if an option is wrong. The machine is contacted only by the first
    call of a method.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.runner = resource_path("deploy") / "runner.py"
        options = _checked(device)
        # commands start in the home folder, and a quoted ~ is not expanded
        self.python = re.sub("^~/", "./", options.get("python", "python3"))
        self.folder = options.get("folder", ".cache/hwnas")
        place = ["-p", options["port"]] if "port" in options else []
        for flag, name in (("-i", "identity"), ("-F", "config")):
            if name in options:
                place += [flag, str(expanded(options[name]))]
        # what error messages tell the user to run
        self.by_hand = shlex.join(["ssh", *place, options["host"]])

        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": ALIVE_SECONDS,
            "ServerAliveCountMax": 3,
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            **self._shared(),
        }
        if "identity" in options:
            # otherwise an agent with many keys uses up the attempts before ours is tried
            settings["IdentitiesOnly"] = "yes"
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
        """The ssh settings that make all calls share one connection, through a socket in a
        temporary folder.
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
        """The output of the runner's ``inspect`` on the board, asked only once."""
        with self._runner("inspect") as process:
            answer: dict[str, Any] = self._json(_line(process), dict)
        return answer

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores of the device document, or else the last ones of the board. Empty if the
        document says not to pin. Raises DeviceError if there are fewer than ``threads``.
        """
        return pinned_cores(self.device, threads, lambda: self.board["cores"])

    def runtimes(self) -> dict[str, str]:
        """The runtimes that work on the board. If there are none, raises DeviceError with
        the command that installs one.
        """
        runtimes: dict[str, str] = self.board["runtimes"]
        if not runtimes:
            remedy = next(iter(self.missing().values()))
            raise DeviceError(f"{self.device.id}: {remedy}")
        return runtimes

    def missing(self) -> dict[str, str]:
        """The runtimes that do not work on the board, each with a sentence that says why and
        how to install it.
        """
        return {name: excerpt(reason) for name, reason in self.board["missing"].items()}

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan on the board, and yield its rows as they are measured. Models that
        the board does not have yet are sent first.
        """
        del folder  # a job leaves no files on this computer
        models: dict[str, Path] = {}
        items = []
        for item in plan["items"]:
            remote_names = {key: _remote_name(Path(path)) for key, path in _files(item).items()}
            models |= {remote_names[key]: Path(path) for key, path in _files(item).items()}
            items.append({**item, **remote_names})

        remaining = len(items)
        with self._runner("measure", "-", models=models) as process:
            missing = self._missing(process, models)
            if missing:
                size_mb = sum(path.stat().st_size for path in missing.values()) / 1e6
                yield {
                    "note": f"sending {len(missing)} models ({size_mb:.1f} MB) to {self.device.id}"
                }
            self._send(process, missing)
            _write(process, json.dumps({**plan, "items": items}).encode() + b"\n")
            for line in _stdout(process):
                if line.endswith(b"\n"):  # otherwise the board died in the middle of it
                    row = self._json(line, dict)
                    if "error" in row:
                        row["error"] = _with_local_names(str(row["error"]), models)
                    remaining -= "id" in row
                    yield row
        if remaining:
            raise DeviceError(
                f"the runner on {self.device.id} left out {remaining} of {len(items)} items: run"
                " the command again."
            )

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Run a model file on images. Images and outputs are streamed; neither is stored on
        the board.
        """
        del folder
        models = {_remote_name(model): model}
        is_uint8 = images_NHWC.dtype == np.uint8
        images = np.ascontiguousarray(images_NHWC, np.uint8 if is_uint8 else "<f4")
        announced = [*images.shape, "uint8"] if is_uint8 else [*images.shape]
        with self._runner("predict", *models, "-", "-", models=models) as process:
            self._send(process, self._missing(process, models))
            _write(process, json.dumps(announced).encode() + b"\n")
            _write(process, images.data)
            shape = self._json(_line(process), list)
            content = _stdout(process).read()
        try:
            return np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise DeviceError(
                f"{self.device.id} sent {len(content)} bytes of outputs of {model.name}, which do"
                f" not fit their shape {shape}: run the command again."
            ) from error

    def _missing(
        self, process: subprocess.Popen[bytes], models: Mapping[str, Path]
    ) -> dict[str, Path]:
        """The models that the board does not have. A path that is not a file on this
        computer is left out, and its item fails on the board.
        """
        announced = {}
        for name, path in models.items():
            if path.is_file():
                announced[name] = (path.stat().st_size, name.partition(".")[0])
        _write(process, json.dumps(announced).encode() + b"\n")
        missing = self._json(_line(process), list)
        return {name: models[name] for name in announced if name in missing}

    def _send(self, process: subprocess.Popen[bytes], missing: Mapping[str, Path]) -> None:
        for name, path in missing.items():
            content = path.read_bytes()
            # Files stay on the board under their hash. Under the hash of another content,
            # this one would be used forever.
            if not name.startswith(hashlib.sha256(content).hexdigest()):
                raise DeviceError(
                    f"{path} changed while it was sent to {self.device.id}: run the command again."
                )
            _write(process, content)

    @contextmanager
    def _runner(
        self, *arguments: str, models: Mapping[str, Path] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start the runner on the board, and yield the local ssh process that holds its
        streams. With ``models`` (by their names on the board), the runner first expects a
        list of them.

        Raises DeviceError if the runner does not start or fails.
        """
        token = secrets.token_hex(8)
        program = self.runner.read_bytes()
        receiving = [] if models is None else [f"--receive={self.folder}"]
        command = shlex.join(
            [self.python, "-c", _START, token, str(len(program)), *arguments, *receiving]
        )
        # Without `exit`, the shell replaces itself by the runner. Then ssh ends with 255
        # both if the runner is killed and if the connection is lost.
        with (
            tempfile.TemporaryFile() as errors,
            _start([*self.ssh, f"{command}; exit"], errors) as process,
        ):
            alarm = Timer(START_SECONDS, process.kill)
            alarm.start()
            started = False
            finished = False
            login_output = ""
            try:
                _write(process, program)
                for line in _stdout(process):
                    started = line.strip() == token.encode()
                    if started:
                        break
                    login_output = line.decode(errors="replace").strip() or login_output
                alarm.cancel()
                if started:
                    yield process
                    _stdin(process).close()
                    finished = True
                process.wait()
            except (BrokenPipeError, EOFError):
                process.wait()  # it ended early: its status and its stderr tell why
            finally:
                alarm.cancel()
                process.kill()
                with suppress(BrokenPipeError):
                    _stdin(process).close()
            if not finished or process.returncode != 0:
                errors.seek(0)
                stderr = errors.read().decode(errors="replace")
                if started:
                    message = self._failure(process.returncode, stderr)
                else:
                    message = self._start_failure(process.returncode, stderr, login_output)
                raise DeviceError(_with_local_names(message, models or {}))

    def _failure(self, status: int, stderr: str) -> str:
        """The error message for a runner that started, but then failed."""
        board = self.device.id
        last = last_line(stderr)
        if status == 255:
            return (
                f"the connection to {board} was lost ({last or 'it no longer answers'}): check it,"
                " and run the command again to resume."
            )
        if status > 128:
            number = status - 128
            known = number in set(signal.Signals)
            name = signal.Signals(number).name if known else f"signal {number}"
            return (
                f"the runner on {board} was killed ({name}): the board may have run out of memory;"
                " end other programs on it, and run the command again."
            )
        # With these statuses, stderr is a sentence for the user.
        if status in (2, 3, 4):
            return f"{board}: {last}"
        return f"the runner on {board} stopped with exit status {status}: {last}"

    def _start_failure(self, status: int, stderr: str, login_output: str) -> str:
        """The error message for a runner that did not even start."""
        board = self.device.id
        last = last_line(stderr)
        if status == 255:  # of ssh itself
            remedy = next(
                (remedy for sign, remedy in _REMEDIES if sign in stderr),
                f"{last or 'no answer'}; check that `{{ssh}}` works",
            )
            return f"cannot reach {board} over ssh: {remedy.replace('{ssh}', self.by_hand)}."
        if status < 0:  # killed by our timer
            return (
                f"{board} did not start the runner within {START_SECONDS:.0f} s: run"
                f" `{self.by_hand}` to see what its login scripts are waiting for."
            )
        python = f"set the device option python to its interpreter (now {self.python!r})"
        if status == 127:
            return (
                f"{board} has no program {self.python!r}: install it there (sudo apt install"
                f" python3), or {python}."
            )
        reason = last or excerpt(login_output) or "it gave no reason"
        return f"{board} does not start the runner ({reason}): {python}."

    def _json(self, line: bytes, kind: type) -> Any:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            printed = line.decode(errors="replace").strip()[:80]
            raise DeviceError(
                f"the runner on {self.device.id} printed an unexpected line: {printed!r}."
            )
        return value


def _checked(device: Device) -> dict[str, str]:
    """The options of a device document, safe to use in a command line. Raises ConfigError."""
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
            f"device {device.id}: host = {quoted(host)} is not a host name; write USER@HOST, or an"
            " alias"
            " of ~/.ssh/config."
        )
    port = options.get("port", "22")
    # checked by length first, because int() refuses thousands of digits
    is_number = port.isascii() and port.isdecimal() and len(port) <= 5
    if not is_number or not 0 < int(port) < 65536:
        raise ConfigError(
            f"device {device.id}: port = {quoted(port)} is not a number from 1 to 65535."
        )
    for name in ("identity", "config"):
        if name in options and not is_file(options[name]):
            raise ConfigError(
                f"device {device.id}: {name} = {quoted(options[name])} is not a file; correct the"
                " path."
            )
    for name in ("python", "folder"):
        value = options.get(name, "-")
        if not value.isprintable() or not value:
            raise ConfigError(
                f"device {device.id}: {name} = {quoted(value)} is not a path; correct it, or leave"
                " it"
                " out."
            )
    return options


def _start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process with pipes for stdin and stdout.

    stderr goes to a file, because nobody reads it in the meantime, and the shared
    connection keeps it open after the process has ended.
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
    """The next line of stdout. Raises EOFError if the process ended before it."""
    line = _stdout(process).readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _files(item: Mapping[str, Any]) -> dict[str, str]:
    """The files that an item of a plan needs: its model, and the image to feed it, if
    any.
    """
    return {key: item[key] for key in ("path", "input") if key in item}


def _remote_name(path: Path) -> str:
    """The name of a file on the board: the hash of its content. If the file does not
    exist, a name that the board does not have.
    """
    try:
        state = path.stat()
        return f"{_content_hash(path, state.st_mtime_ns, state.st_size)}{path.suffix}"
    except OSError:
        return f"{hashlib.sha256(str(path).encode()).hexdigest()}{path.suffix}"


@cache
def _content_hash(path: Path, mtime_ns: int, size: int) -> str:
    """sha256 of a file, computed again only if its time stamp or size has changed."""
    del mtime_ns, size
    return file_sha256(path)


def _with_local_names(text: str, models: Mapping[str, Path]) -> str:
    """A message of the board, with the names that models have on this computer. Only a
    model that does not exist is named by its whole path, which has to be corrected here.
    """
    for name, path in models.items():
        text = text.replace(name, path.name if path.is_file() else str(path))
    return text


def _socket(folder: Path) -> str:
    """Quoted, as ssh's options need it for paths with spaces."""
    return f'"{folder / "ssh"}"'


def _hang_up(folder: Path, owner: int) -> None:
    """Close the shared connection, but only in the process that opened it: a forked process
    must not take it away from its parent.
    """
    if os.getpid() != owner:
        return
    if (folder / "ssh").exists():
        options = ["-F", os.devnull, f"-oControlPath={_socket(folder)}", "-O", "exit"]
        # ssh wants a host name here, but only uses the socket
        command = ["ssh", *options, "board"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(folder, ignore_errors=True)
