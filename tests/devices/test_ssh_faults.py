"""Faults of boards and of the connection to them: each gives one clear sentence,
nothing measured is lost, and nothing injected is executed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import DeviceConfig, ProfileConfig
from hwnas.core.ops import MBConv
from hwnas.devices import ssh
from hwnas.devices.device import Device, connect
from hwnas.devices.session import Bench
from hwnas.devices.ssh import Ssh
from hwnas.errors import ConfigError, DeviceError
from hwnas.export.timing import timing_file
from hwnas.profile.stage import profile
from hwnas.runs import JsonLines
from tests.conftest import digits_space
from tests.devices.sshd import OPS, Server, endless, plan


def complaint(connection: Ssh) -> str:
    """The one line of error that comes instead of the board's runtimes."""
    with pytest.raises(DeviceError) as caught:
        connection.runtimes()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def environment(folder: Path, *packages: str) -> str:
    """Create a Python with some of the packages that are installed here, and nothing
    else. Returns its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    source, target = (
        root / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        for root in (Path(sys.prefix), folder)
    )
    for package in packages:
        for path in source.glob(f"{package}*"):
            (target / path.name).symlink_to(path)
    return str(folder / "bin/python")


ATTACKS = (
    "x; touch executed",
    "$(touch executed) `touch executed`",
    "x' ; touch executed '",
    'x" ; touch executed "',
)


def test_predict_with_a_broken_model_or_images_of_the_wrong_size(
    board: Ssh, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    with pytest.raises(DeviceError, match=r"board: Cannot run broken\.tflite"):
        board.predict(broken, np.zeros((1000, 64, 64, 3), np.float32), tmp_path)
    with pytest.raises(DeviceError, match="Cannot set tensor") as caught:
        board.predict(
            timing_file(OPS, "litert", "fp32"), np.zeros((1, 9, 9, 3), np.float32), tmp_path
        )
    assert os.environ["HWNAS_CACHE"] not in str(caught.value), "a path of this computer"


@pytest.mark.slow
def test_a_lost_connection_loses_no_row(board: Ssh, server: Server, tmp_path: Path) -> None:
    """The server's side dies in the middle of a profile; run again, it measures only
    what is missing.
    """
    space, config = (
        digits_space(),
        ProfileConfig(
            rounds=1, max_rounds=1, fit_networks=2, test_networks=2, min_ms=0.1, min_runs=2
        ),
    )
    lost = Losing(server.device(), server, after=5)
    arguments = (DeviceConfig(runtime="litert"), timing_file, tmp_path)
    with pytest.raises(
        DeviceError,
        match=(
            r"the connection to board was lost .*: check it, and run the command again to resume\.$"
        ),
    ):
        profile(Bench(server.device(), lost, *arguments), space, config)
    samples = JsonLines(tmp_path / "samples.jsonl")
    assert len([row for row in samples.read() if "id" in row]) >= 5
    table = profile(Bench(server.device(), board, *arguments), space, config)
    assert set(table.entries) == {op.key for op in space.ops}
    measured = [row["id"] for row in samples.read() if "id" in row]
    assert len(measured) == len(set(measured)) == len(space.ops) + 4


class Losing(Ssh):
    """A board whose ssh sessions are killed after some rows."""

    def __init__(self, device: Device, server: Server, after: int) -> None:
        super().__init__(device)
        self.server, self.after = server, after

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        for row in super().measure(plan, folder):
            self.after -= "id" in row
            if self.after == 0:
                for pid in self.server.sessions():
                    os.kill(pid, signal.SIGKILL)
            yield row


@pytest.mark.slow
def test_a_board_that_falls_silent(
    board: Ssh, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost power or its network: no connection is closed, and nothing answers."""
    monkeypatch.setattr(ssh, "ALIVE_SECONDS", 1)
    rows = Ssh(server.device()).measure(endless(), tmp_path)
    next(row for row in rows if "id" in row)
    stopped = [*server.sessions(), *server.runners()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeviceError, match="the connection to board was lost"):
        list(rows)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)


def test_a_runner_that_is_killed(board: Ssh, server: Server, tmp_path: Path) -> None:
    rows = board.measure(endless(), tmp_path)
    next(row for row in rows if "id" in row)
    os.kill(server.runners()[0], signal.SIGKILL)
    with pytest.raises(
        DeviceError,
        match=(
            r"the runner on board was killed \(SIGKILL\): the board may have run out of memory; end"
            r" other programs on it"
        ),
    ):
        list(rows)


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("print('Segmentation fault')", r"printed an unexpected line: 'Segmentation fault'"),
        ("print([1, 2])", r"printed an unexpected line: '\[1, 2\]'"),
        ("print('{\"id\": \"x', end='')", r"left out 3 of 3 items"),
        (
            "sys.stderr.write('loading\\nout of memory\\n'); sys.exit(7)",
            r"stopped with exit status 7: out of memory",
        ),
        ("raise KeyError('x')", r"stopped with exit status 1: KeyError: 'x'"),
    ],
)
def test_a_runner_that_prints_rubbish(fake: str, message: str, board: Ssh, tmp_path: Path) -> None:
    """After a header, and with a kilobyte of warnings: a real process with the faults
    of real runners.
    """
    board.runner = tmp_path / "runner.py"
    board.runner.write_text(
        "import sys\nsys.stdin.buffer.readline()\nprint('[]',"
        " flush=True)\nsys.stdin.buffer.readline()\nsys.stderr.write('INFO: created a delegate ' *"
        f" 40 + chr(10))\nprint('{{\"runner\": 1}}', flush=True)\n{fake}\n"
    )
    rows = board.measure(plan(), tmp_path)
    assert next(rows) == {"runner": 1}
    with pytest.raises(DeviceError, match=message):
        next(rows)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'This account is closed.'; exit 1",
            r"board does not start the runner \(This account is closed\.\)",
        ),
        ("exit 0", r"board does not start the runner \(it gave no reason\)"),
        (
            "sleep 30",
            (
                r"board did not start the runner within 1 s: run `ssh -F .* board` to see what its"
                r" login scripts are waiting for\.$"
            ),
        ),
    ],
)
def test_login_scripts_that_block_the_runner(
    script: str, message: str, board: Ssh, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "START_SECONDS", 1.0)
    (server.home / ".bashrc").write_text(script)
    with pytest.raises(DeviceError, match=message):
        board.runtimes()


def test_a_board_without_that_python(server: Server) -> None:
    message = complaint(Ssh(server.device(python="python3.99")))
    assert (
        message
        == "board has no program 'python3.99': install it there (sudo apt install python3), or"
        " set the device option python to its interpreter (now 'python3.99')."
    )


def test_a_python_for_another_machine(server: Server) -> None:
    """An executable whose header says that it is for a machine which does not exist."""
    # bytes 18 and 19 of an ELF header name the machine
    header = Path("/bin/true").read_bytes()[:18] + b"\xfe\xca" + Path("/bin/true").read_bytes()[20:]
    path = server.folder / "foreign"
    path.write_bytes(header)
    path.chmod(0o755)
    message = complaint(Ssh(server.device(python=str(path))))
    assert "board does not start the runner" in message
    assert "Exec format error" in message


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_a_python_that_is_too_old(version: str, server: Server) -> None:
    candidates = [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    old = [
        path
        for path in candidates
        if path
        and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    ]
    if not old:
        pytest.skip(f"needs a Python {version}")
    message = complaint(Ssh(server.device(python=old[0])))
    assert (
        f"board does not start the runner (its Python {version} is too old, 3.8 is needed)"
        in message
    )


def test_a_python_without_numpy(server: Server, tmp_path: Path) -> None:
    python = environment(server.folder / "bare")
    board = Ssh(server.device(python=python))
    command = rf"{python} -m ensurepip && {python} -m pip install ai-edge-litert numpy"
    assert complaint(board) == f"board: This Python has no numpy: {command}"
    with pytest.raises(DeviceError) as caught:
        list(board.measure(plan(), tmp_path))
    assert str(caught.value) == f"board: This Python has no numpy: {command}"


@pytest.mark.slow
def test_a_python_without_a_runtime(server: Server, tmp_path: Path) -> None:
    """The error is only about the runtime that is requested; the other one works."""
    python = environment(
        server.folder / "onnx",
        "numpy",
        "onnxruntime",
        "pip",
        "flatbuffers",
        "packaging",
        "google",
        "protobuf",
    )
    board = Ssh(server.device(python=python))
    assert board.runtimes().keys() == {"onnxruntime"}
    with pytest.raises(DeviceError) as caught:
        list(board.measure(plan(), tmp_path))
    command = f"{python} -m pip install ai-edge-litert numpy"
    assert (
        str(caught.value)
        == f"board: This Python has no ai-edge-litert and no tflite-runtime: {command}"
    )
    assert len(
        [row for row in board.measure(plan(runtime="onnxruntime"), tmp_path) if "ms" in row]
    ) == len(OPS)


def test_an_onnxruntime_that_is_too_old_is_named_with_the_version_that_works(
    server: Server, tmp_path: Path
) -> None:
    """Before anything is built; and not hidden behind the other runtime, which is missing."""
    python = environment(server.folder / "old-onnx", "numpy", "pip")
    [packages] = (server.folder / "old-onnx/lib").glob("python3*/site-packages")
    (packages / "onnxruntime.py").touch()
    metadata = packages / "onnxruntime-1.12.1.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: onnxruntime\nVersion: 1.12.1\n")

    device = server.device(python=python)
    settings = DeviceConfig(runtime="onnxruntime")
    with pytest.raises(DeviceError) as caught:
        profile(
            Bench(device, Ssh(device), settings, timing_file, tmp_path),
            digits_space(),
            ProfileConfig(),
        )
    assert str(caught.value) == (
        "board: onnxruntime 1.12.1 is too old for the files of hwnas; 1.14 or later works:"
        f" {python} -m pip install 'onnxruntime>=1.14' numpy"
    )


def test_a_folder_of_another_user_or_of_all_is_refused(
    board: Ssh, server: Server, tmp_path: Path
) -> None:
    models = server.home / "models"
    models.mkdir()
    models.chmod(0o1777)
    with pytest.raises(
        DeviceError, match=r"models is shared by all users: set the device option folder to one of"
    ):
        list(board.measure(plan(), tmp_path))
    assert models.stat().st_mode & 0o7777 == 0o1777
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    models.chmod(0o777)
    os.chown(models, 4242, 4242)
    with pytest.raises(DeviceError, match=r"models belongs to another user: set the device option"):
        list(board.measure(plan(), tmp_path))
    assert list(models.iterdir()) == []


def test_a_core_that_is_not_there_comes_with_the_way_out(board: Ssh, tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError,
        match=r"^board: Cannot run on cores \[4000\]; this machine has \[.*device\.cores = \[\] to",
    ):
        list(board.measure(plan(cores=[4000]), tmp_path))


def test_the_hosts_keys(server: Server) -> None:
    """Unknown, changed, and a key of ours that the board does not take."""
    (server.folder / "known_hosts").write_text("")
    assert "this computer does not know its host key; run `ssh -F" in complaint(
        Ssh(server.device())
    )
    server.trust("other_key")
    assert "its host key has changed" in complaint(Ssh(server.device()))
    server.trust("host_key")
    assert "it accepts none of your keys; install one with `ssh-copy-id`" in complaint(
        Ssh(
            server.device(
                identity=str(server.folder / "other_key"), host="127.0.0.1", port=str(server.port)
            )
        )
    )
    assert Ssh(
        server.device(identity=str(server.folder / "key"), host="127.0.0.1", port=str(server.port))
    ).runtimes()


def test_nobody_answers(server: Server) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        message = complaint(Ssh(server.device(host="127.0.0.1", port=str(taken.getsockname()[1]))))
    assert "cannot reach board over ssh: ssh: connect to host 127.0.0.1 port" in message
    assert "Connection refused; check that `ssh -p" in message
    assert "its host name is unknown" in complaint(Ssh(server.device(host="no-such-board.invalid")))


def test_without_an_ssh_client(board: Ssh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        complaint(board)
        == "this computer has no ssh program: install the OpenSSH client (sudo apt install"
        " openssh-client)."
    )


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk(kind: str, board: Ssh, server: Server, tmp_path: Path) -> None:
    """One sentence; with free space again, the same call works."""
    models = server.home / "models"
    models.mkdir()
    wanted = plan((MBConv(32, 48, 48, 288, 5, act="relu", residual=True),))
    if kind == "limit":
        (server.home / ".bashrc").write_text("ulimit -f 8\n")
    elif (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", models],
            capture_output=True,
            check=False,
        ).returncode
        != 0
    ):
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(DeviceError) as caught:
            list(board.measure(wanted, tmp_path))
        left = [path.name for path in models.iterdir()]
    finally:
        (
            subprocess.run(["umount", models], check=True)
            if kind == "tmpfs"
            else (server.home / ".bashrc").unlink()
        )
    reason = {"tmpfs": "No space left on device", "limit": "File too large"}[kind]
    command = f"free some space, for instance by deleting earlier models: rm {models}/*.tflite {models}/*.onnx"
    assert str(caught.value) == f"board: Cannot write to {models} ({reason}): {command}"
    assert left == [".hwnas-lock"]
    assert "ms" in list(board.measure(wanted, tmp_path))[-1]


def test_a_folder_that_cannot_be_created(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError, match=r"^board: Cannot use the folder /dev/null/models: Not a directory$"
    ):
        list(Ssh(server.device(folder="/dev/null/models")).measure(plan(), tmp_path))


@pytest.mark.parametrize(
    "attack",
    [
        *ATTACKS,
        "",
        "x\ntouch executed",
        "-oProxyCommand=touch executed",
        "board\0-oProxyCommand=touch",
        "board\x1b[2J",
        "board\n",
        "me@-oProxyCommand=touch",
        "a b",
        "a@b@c",
        "ssh://board",
    ],
)
def test_hosts_with_shell_characters(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        connect(Device(id="board", soc="none", connection="ssh", options={"host": attack}))
    assert f"host = {attack!r} is not a host name" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_names_with_shell_characters(
    attack: str, board: Ssh, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the names of a folder, a program and a model: neither side executes them."""
    monkeypatch.chdir(tmp_path)
    (server.home / ".bashrc").write_text("cd $HOME\n")
    model = tmp_path / f"{attack}.tflite"
    model.write_bytes(timing_file(OPS, "litert", "fp32").read_bytes())
    strange = model.rename(tmp_path / f"model.{attack.replace('.', '')}")
    connection = Ssh(server.device(folder=attack))
    assert connection.predict(strange, np.zeros((1, 8, 8, 3), np.float32), tmp_path).shape == (
        1,
        10,
    )
    assert (server.home / attack).is_dir()
    assert f"has no program {attack!r}" in complaint(Ssh(server.device(python=attack)))
    assert list(tmp_path.iterdir()) == [strange]
    assert not (server.home / "executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hots": "x"}, "device board has an unknown option 'hots'; did you mean 'host'?"),
        ({"port": "ssh"}, "port = 'ssh' is not a number from 1 to 65535"),
        ({"port": "65536"}, "port = '65536' is not a number"),
        ({"port": "2" * 5000}, "222... is not a number from 1"),
        ({"port": "22\0"}, r"port = '22\x00' is not a number from 1 to 65535"),
        ({"identity": "key\0"}, r"identity = 'key\x00' is not a file; correct the path"),
        ({"identity": "~nobody-of-that-name/key"}, "is not a file; correct the path"),
        ({"config": "x" * 5000}, "is not a file; correct the path"),
        ({"python": "python3\x1b[2J"}, r"python = 'python3\x1b[2J' is not a path"),
        ({"folder": "models\0"}, r"folder = 'models\x00' is not a path"),
        ({"identity": "/no/such/key"}, "identity = '/no/such/key' is not a file; correct the path"),
        ({"config": "/no/such/config"}, "config = '/no/such/config' is not a file"),
        ({"python": ""}, "python = '' is not a path"),
        ({"folder": "a\nb"}, r"folder = 'a\nb' is not a path"),
    ],
)
def test_wrong_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ssh(Device(id="board", soc="none", connection="ssh", options={"host": "board", **options}))
    assert message in str(caught.value)
