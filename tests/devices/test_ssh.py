"""Boards over ssh: the real client and a real server, on loopback."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from hwnas.core.ops import Op
from hwnas.devices import ssh
from hwnas.devices.device import HOST, Device, connect, find_device
from hwnas.devices.host import Host
from hwnas.devices.ssh import Ssh
from hwnas.errors import DeviceError
from hwnas.export.timing import timing_file
from hwnas.resources import resource_path
from tests.devices import sshd
from tests.devices.sshd import OPS, Server, endless, plan
from tests.export.test_tflite_writer import NETWORKS
from tests.export.test_tflite_writer import OPS as WRITTEN


def board_files(server: Server) -> dict[str, int]:
    """Models on the board and their inodes: a file that is written again gets a new
    one.
    """
    return {
        path.name: path.stat().st_ino
        for path in (server.home / "models").iterdir()
        if path.name != ".hwnas-lock"
    }


def test_what_the_board_reports(board: Ssh) -> None:
    assert board.runtimes().keys() == {"litert", "onnxruntime"}
    assert board.runtimes()["litert"].startswith("ai-edge-litert 2")
    assert board.cores(1) == (max(os.sched_getaffinity(0)),)
    with pytest.raises(DeviceError, match=r"lower device\.threads"):
        board.cores(1000)


def test_cores_from_the_document(server: Server) -> None:
    assert Ssh(server.device().model_copy(update={"cores": (4, 5)})).cores(2) == (4, 5)


@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
def test_models_are_sent_once(runtime: str, board: Ssh, server: Server, tmp_path: Path) -> None:
    wanted = plan(runtime=runtime, rounds=2)
    note, header, *rows = board.measure(wanted, tmp_path)
    assert note["note"].startswith("sending 3 models (0.0 MB) to board")
    assert header["runtime"] == runtime
    assert header["cores"] == wanted["cores"]
    assert [(row["id"], row["round"]) for row in rows] == [
        (item["id"], item["round"]) for item in wanted["items"]
    ]
    assert all(min(row["ms"]) > 0 and len(row["ms"]) >= 3 for row in rows)
    sent = board_files(server)
    assert len(sent) == len(OPS)
    assert len(list(board.measure(wanted, tmp_path))) == 1 + 2 * len(OPS)
    assert board_files(server) == sent
    assert list(tmp_path.iterdir()) == []


def test_an_input_image_is_sent_with_its_model(board: Ssh, server: Server, tmp_path: Path) -> None:
    wanted = plan(OPS[:1])
    [item] = wanted["items"]
    op = OPS[0]
    np.save(tmp_path / "image.npy", np.zeros((1, op.size, op.size, op.in_ch), np.float32))
    fed = {
        **wanted,
        "items": [{**item, "input": str(tmp_path / "image.npy")}, {**item, "round": 1}],
    }
    _, _, first, second = board.measure(fed, tmp_path)
    assert first["input"] == "image" and first["ms"] and "input" not in second and second["ms"]
    assert {Path(name).suffix for name in board_files(server)} == {".tflite", ".npy"}


def test_models_may_be_deleted_or_truncated_on_the_board(
    board: Ssh, server: Server, tmp_path: Path
) -> None:
    list(board.measure(plan(), tmp_path))
    whole = {path.name: path.read_bytes() for path in (server.home / "models").glob("*.tflite")}
    deleted, truncated, kept = whole
    (server.home / "models" / deleted).unlink()
    (server.home / "models" / truncated).write_bytes(whole[truncated][:100])
    (server.home / "models" / f"{kept}.hwnas-part").write_bytes(b"left by a power cut")
    note, *rows = board.measure(plan(), tmp_path)
    assert note["note"].startswith("sending 2 models")
    assert len(rows) == 1 + len(OPS)
    assert {
        path.name: path.read_bytes()
        for path in (server.home / "models").iterdir()
        if path.name != ".hwnas-lock"
    } == whole


def test_damaged_models_are_sent_again(board: Ssh, server: Server, tmp_path: Path) -> None:
    """A flipped bit, and the model of another op: neither changes a file's size or name."""
    list(board.measure(plan(), tmp_path))
    whole = {path: path.read_bytes() for path in (server.home / "models").glob("*.tflite")}
    flipped, swapped, _ = whole
    flipped.write_bytes(whole[flipped][:-1] + bytes([whole[flipped][-1] ^ 1]))
    swapped.write_bytes(whole[flipped])
    note, *rows = board.measure(plan(), tmp_path)
    assert note["note"].startswith("sending 2 models")
    assert len(rows) == 1 + len(OPS)
    assert {path: path.read_bytes() for path in whole} == whole


def test_only_the_user_of_the_board_can_enter_the_folder(
    board: Ssh, server: Server, tmp_path: Path
) -> None:
    """A new one, and one of an earlier version that was open to all."""
    models = server.home / "models"
    (server.home / ".bashrc").write_text("umask 0\n")
    list(board.measure(plan(OPS[:1]), tmp_path))
    assert models.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in models.iterdir()} == {0}
    models.chmod(0o777)
    list(board.measure(plan(OPS[:1]), tmp_path))
    assert models.stat().st_mode & 0o777 == 0o700


def test_a_home_folder_stays_as_open_as_it_is(server: Server, tmp_path: Path) -> None:
    server.home.chmod(0o755)
    list(Ssh(server.device(folder=".")).measure(plan(OPS[:1]), tmp_path))
    assert server.home.stat().st_mode & 0o777 == 0o755
    [model] = server.home.glob("*.tflite")
    assert model.stat().st_mode & 0o077 == 0


def test_not_pinned(board: Ssh, server: Server, tmp_path: Path) -> None:
    assert Ssh(server.device().model_copy(update={"cores": ()})).cores(2) == ()
    header, *_ = (row for row in board.measure(plan(cores=None), tmp_path) if "runner" in row)
    assert header["cores"] == sorted(os.sched_getaffinity(0)) and header["pinned"] is False
    header, *_ = (row for row in board.measure(plan(), tmp_path) if "runner" in row)
    assert header["pinned"] is True


def test_a_model_that_changes_while_it_is_sent(board: Ssh, server: Server, tmp_path: Path) -> None:
    """It must not be kept on the board under the hash of its earlier content."""
    model = tmp_path / "model.tflite"
    content = bytearray(timing_file(OPS, "litert", "fp32").read_bytes())
    model.write_bytes(content)
    rows = board.measure(
        {**plan(), "items": [{"id": "model", "path": str(model), "round": 0}]}, tmp_path
    )
    assert "note" in next(rows)
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(DeviceError, match=r"model\.tflite changed while it was sent to board"):
        next(rows)
    deadline = time.monotonic() + 20
    # the runner on the board notices the lost connection a moment later
    while board_files(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert board_files(server) == {}


def test_errors_from_the_board_name_the_local_files(board: Ssh, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    wanted = plan()
    wanted["items"][0]["path"], wanted["items"][1]["path"] = (
        str(broken),
        str(tmp_path / "missing.tflite"),
    )
    _, _, first, second, third = board.measure(wanted, tmp_path)
    assert str(tmp_path / "missing.tflite") in second["error"]
    assert "error" in first and str(tmp_path) not in first["error"]
    assert "ms" in third


@pytest.mark.slow
def test_predicts_what_this_computer_predicts(board: Ssh, server: Server, tmp_path: Path) -> None:
    """With more images than pipes hold, which leave no trace on the board."""
    model = timing_file(OPS, "litert", "fp32")
    images = np.random.default_rng(0).standard_normal((3000, 8, 8, 3)).astype(np.float32)
    outputs = board.predict(model, images, tmp_path)
    assert outputs.dtype == np.float32
    assert np.array_equal(outputs, Host(HOST).predict(model, images, tmp_path))
    assert list(board_files(server)) == [ssh._remote_name(model)]
    assert np.array_equal(board.predict(model, images[5:0:-2], tmp_path), outputs[5:0:-2]), (
        "an array that is not contiguous"
    )


@pytest.mark.slow
def test_leaving_early_ends_the_runner_on_the_board(
    board: Ssh, server: Server, tmp_path: Path
) -> None:
    rows = board.measure(endless(), tmp_path)
    assert next(row for row in rows if "id" in row)["round"] == 0
    runners = server.runners()
    assert len(runners) == 1
    rows.close()
    assert sshd.gone(runners)
    assert [row for row in board.measure(plan(), tmp_path) if "id" in row], (
        "the board is still busy"
    )


@pytest.mark.slow
def test_one_job_at_a_time(board: Ssh, server: Server, tmp_path: Path) -> None:
    rows = board.measure(endless(), tmp_path)
    next(row for row in rows if "id" in row)
    [holder] = server.runners()
    with pytest.raises(
        DeviceError,
        match=rf"Another job is running here \(process {holder}\).*end it with: kill {holder}$",
    ):
        list(Ssh(server.device()).measure(plan(), tmp_path))
    rows.close()


BANNER = """
printf 'Welcome to the board!\\n{"runner": 99}\\n\\0\\377\\nno newline at the end'
echo 'and warnings' >&2
cd "$HOME"
"""


def test_login_scripts_that_print(board: Ssh, server: Server, tmp_path: Path) -> None:
    """They may print before anything of ours, even what looks like a header; and
    modules that lie around in the home folder are not imported.
    """
    (server.home / ".bashrc").write_text(BANNER)
    for module in ("json", "numpy", "argparse"):
        (server.home / f"{module}.py").write_text(
            "open('/'.join((__import__('os').environ['HOME'], 'executed')), 'w')\n"
        )
    banner = subprocess.run(
        ["ssh", "-F", server.config, "board", "true"], capture_output=True, check=True
    ).stdout
    if b"Welcome" not in banner:
        pytest.skip("the login shell here does not read .bashrc")
    _, header, *rows = board.measure(plan(), tmp_path)
    assert header["runner"] == 1
    assert len(rows) == len(OPS)
    model = timing_file(OPS, "litert", "fp32")
    assert board.predict(model, np.zeros((2, 8, 8, 3), np.float32), tmp_path).shape == (2, 10)
    assert not (server.home / "executed").exists()


@pytest.mark.parametrize(
    "host",
    [
        "board",
        "pi@raspberrypi.local",
        "192.168.0.7",
        "fe80::1%eth0",
        "::1",
        "a_b-c.example.org",
        "x.y+z@h",
    ],
)
def test_hosts_as_people_write_them(host: str) -> None:
    assert connect(Device(id="board", soc="none", connection="ssh", options={"host": host}))
    assert find_device(f"ssh:{host}").options == {"host": host}


@pytest.mark.slow
def test_paths_in_the_home_folder_of_the_board(board: Ssh, server: Server) -> None:
    """``~/env/bin/python`` works, although no shell expands the tilde."""
    (server.home / ".bashrc").write_text("cd $HOME\n")
    (server.home / "python").symlink_to(sys.executable)
    assert Ssh(server.device(python="~/python", folder="~/deep/models")).board["python"]
    list(Ssh(server.device(folder="~/deep/models")).measure(plan(), server.folder))
    assert (server.home / "deep/models").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("longest", "logins"), [(ssh.SOCKET_PATH_MAX, 1), (0, 2)])
def test_connections_are_shared_and_closed(
    longest: int, logins: int, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many calls share one login, and nothing of it is left. If no socket can be made,
    each call logs in.
    """
    monkeypatch.setattr(ssh, "SOCKET_PATH_MAX", longest)
    with TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        before = server.log.read_text().count("Accepted publickey")
        board = Ssh(server.device())
        for _ in range(2):
            assert [row for row in board.measure(plan(OPS[:1]), tmp_path) if "ms" in row]
        assert server.log.read_text().count("Accepted publickey") == before + logins
        sessions = server.sessions()
        del board
        gc.collect()
        assert sshd.gone(sessions)
        assert list(Path(folder).iterdir()) == []


def test_the_document_in_the_manual() -> None:
    """It parses, and shows every option."""
    manual = (resource_path("deploy") / "README.md").read_text()
    device = Device.parse(manual.partition("```json\n")[2].partition("```")[0])
    assert device.connection == "ssh"
    assert sorted(device.options) == sorted(ssh.OPTIONS)


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with tflite-runtime 2.14, the last release under that name, and the
    major version of numpy that it was built for.
    """
    folder = tmp_path_factory.mktemp("tflite-runtime")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--disable-pip-version-check",
        "--python",
        folder / "bin/python",
    ]
    done = subprocess.run(
        [*pip, "install", "tflite-runtime==2.14.0", "numpy<2"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(
            "tflite-runtime 2.14.0 cannot be installed here:"
            f" {done.stderr.strip().splitlines()[-1]}"
        )
    return str(folder / "bin/python")


@pytest.mark.slow
def test_every_kind_of_block_runs_in_tflite_runtime(
    old_python: str, server: Server, tmp_path: Path
) -> None:
    """Whole networks too, in float32, where XNNPACK takes the whole graph, and in int8;
    the float32 outputs are those of its successor.
    """
    board = Ssh(server.device(python=old_python))
    assert board.runtimes() == {"litert": "tflite-runtime 2.14.0"}
    chains = [(Op.parse(key),) for key in WRITTEN] + [
        tuple(map(Op.parse, keys)) for keys in NETWORKS.values()
    ]
    items = [
        {
            "id": f"{dtype} {'|'.join(op.key for op in ops)}",
            "path": str(timing_file(ops, "litert", dtype)),
            "round": 0,
        }
        for ops in chains
        for dtype in ("fp32", "int8")
    ]
    wanted = {**plan(), "items": items, "min_ms": 0.0, "min_runs": 1}
    _, header, *rows = board.measure(wanted, tmp_path)
    assert (header["runtime_package"], header["runtime_version"]) == ("tflite-runtime", "2.14.0")
    assert [row for row in rows if "error" in row] == []
    assert [
        row["id"] for row in rows if row["id"].startswith("fp32") and row["delegated"] is not True
    ] == []
    for ops in chains[-len(NETWORKS) :]:
        images = (
            np.random.default_rng(0)
            .standard_normal((3, ops[0].size, ops[0].size, 3))
            .astype(np.float32)
        )
        model = timing_file(ops, "litert", "fp32")
        local, remote = (
            connection.predict(model, images, tmp_path) for connection in (Host(HOST), board)
        )
        assert local.std() > 1e-3
        assert np.abs(local - remote).max() < 1e-5
