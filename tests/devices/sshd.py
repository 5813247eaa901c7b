"""A real OpenSSH server on loopback, with its own port, keys and home folder, and none
of the user's settings.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hwnas.core.ops import Classifier, Conv, MBConv, Op
from hwnas.devices.device import Device
from hwnas.export.timing import timing_file

OPS = (
    Conv(8, 3, 8, kernel=3, act="relu"),
    MBConv(8, 8, 8, 24, 3, act="relu", residual=True),
    Classifier(8, 8, 10),
)
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PRIVILEGE_SEPARATION = Path("/run/sshd")

SERVER_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
SetEnv HOME={folder}/home
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
CLIENT_CONFIG = """
Host board
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
Host *
    User {user}
    IdentityAgent none
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile none
"""


class Server:
    """A running server. ``config`` is an ssh_config file in which it is called
    ``board``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.home = folder, folder / "config", folder / "home"
        self.home.mkdir()
        for name in ("host_key", "key", "other_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        (folder / "sshd_config").write_text(SERVER_CONFIG.format(folder=folder, port=self.port))
        self.config.write_text(
            CLIENT_CONFIG.format(folder=folder, port=self.port, user=getpass.getuser())
        )
        self.trust("host_key")
        assert SSHD is not None
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [SSHD, "-D", "-e", "-f", folder / "sshd_config"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def trust(self, key: str) -> None:
        """Make clients expect this host key."""
        public = (self.folder / f"{key}.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def device(self, **options: str) -> Device:
        """The server as a device that uses this interpreter and keeps models in
        ``home/models``.
        """
        defaults = {
            "host": "board",
            "config": str(self.config),
            "python": sys.executable,
            "folder": "models",
        }
        return Device(
            id="board", soc="a loopback server", connection="ssh", options={**defaults, **options}
        )

    def processes(self) -> list[int]:
        """The server's sessions and everything that runs in them, parents first."""
        parents = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(status.parent.name)] = int(
                    status.read_text().rpartition(")")[2].split()[1]
                )
        pids = [self.process.pid]
        for pid in pids:  # the list grows as it is walked
            pids += [child for child, parent in sorted(parents.items()) if parent == pid]
        return pids[1:]

    def runners(self) -> list[int]:
        """The runners at work: Python processes that got their program on stdin."""
        return [
            pid
            for pid in self.processes()
            if alive(pid) and "".join(command_line(pid)[2:3]).startswith("import sys")
        ]

    def sessions(self) -> list[int]:
        """The server's own processes that handle its connections."""
        return [pid for pid in self.processes() if command_line(pid)[0].startswith("sshd")]

    def stop(self) -> None:
        """Kill the server and everything that runs in it."""
        for pid in [self.process.pid, *self.processes()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def command_line(pid: int) -> list[str]:
    """The arguments of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all of these processes end within ``seconds``."""
    give_up = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < give_up:
        time.sleep(0.02)
    return not any(map(alive, pids))


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Run a server with its files in ``folder``. Skips the test if none can run."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("needs an OpenSSH server and client (sudo apt install openssh-server)")
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc, through which this server is watched")
    if os.geteuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    server = Server(folder)
    try:
        for _ in range(200):
            done = subprocess.run(
                ["ssh", "-F", server.config, "-oBatchMode=yes", "board", "true"],
                capture_output=True,
                check=False,
            )
            if done.returncode == 0 or server.process.poll() is not None:
                break
            time.sleep(0.05)
        log = server.log.read_text()
        if "account is locked" in log or "Missing privilege separation directory" in log:
            pytest.skip(f"sshd refuses every login: {log.strip().splitlines()[-1]}")
        assert done.returncode == 0, log + done.stderr.decode()
        yield server
    finally:
        server.stop()


def plan(
    ops: tuple[Op, ...] = OPS, runtime: str = "litert", rounds: int = 1, **settings: Any
) -> dict[str, Any]:
    """A plan that times blocks on the last core of this computer, the board."""
    items = [
        {
            "id": op.key,
            "path": str(timing_file((op,), runtime, "fp32")),
            "round": number,
            "ops": [op.key],
        }
        for number in range(rounds)
        for op in ops
    ]
    core = max(os.sched_getaffinity(0))
    return {
        "runtime": runtime,
        "threads": 1,
        "cores": [core],
        "min_ms": 0.5,
        "min_runs": 3,
        "items": items,
        **settings,
    }


def endless() -> dict[str, Any]:
    """A plan that takes minutes."""
    return plan(OPS[1:2], rounds=1000, min_ms=250.0, max_runs=10**6)
