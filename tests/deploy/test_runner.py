"""The device runner, run the way a device runs it: as a script in its own process."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwnas.export.convert import to_onnx, to_tflite
from hwnas.export.interface import Interface
from hwnas.export.quantization import quantize_int8

pytestmark = pytest.mark.slow

RUNNER = Path(__file__).parents[2] / "deploy" / "runner.py"
SHAPE = (1, 3, 16, 16)
TAKES_PIXELS = Interface("uint8", False, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(0, 3, (6, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def files(
    net: nn.Module, images: np.ndarray[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    float32 = to_tflite(net, SHAPE)
    models = {
        "fp32.tflite": float32,
        "int8.tflite": quantize_int8(float32, [images]),
        "float_io.tflite": quantize_int8(float32, [images], float_io=True),
        # XNNPACK has no GATHER_ND, so two delegates surround one reference kernel.
        "split.tflite": to_tflite(
            nn.Sequential(nn.Conv2d(3, 8, 1), Flip(), nn.Conv2d(8, 4, 1)), SHAPE
        ),
        "broken.tflite": b"not a flatbuffer",
    }
    for name, content in models.items():
        (folder / name).write_bytes(content)
    to_onnx(net, SHAPE, metadata={}, path=folder / "net.onnx")
    return {path.name: path for path in folder.iterdir()}


class Flip(nn.Module):
    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return x_NCHW[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=60
    )


def stream(*arguments: object, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the runner with ``content`` on its stdin, as a connection sends it."""
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, input=content, capture_output=True, check=False, timeout=60)


def measure(tmp_path: Path, **plan: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({"runtime": "litert", "threads": 1, "warmup_ms": 0, "min_ms": 1, **plan})
    )
    done = run("measure", path)
    assert done.returncode == 0, done.stderr
    header, *lines = (json.loads(line) for line in done.stdout.splitlines())
    return header, lines


def test_measure_keeps_the_order_and_survives_a_bad_file(
    files: dict[str, Path], tmp_path: Path
) -> None:
    names = ["int8.tflite", "broken.tflite", "fp32.tflite", "missing.tflite", "int8.tflite"]
    items = [
        {"id": name, "round": index, "path": str(files.get(name, tmp_path / name))}
        for index, name in enumerate(names)
    ]
    core = min(os.sched_getaffinity(0))
    header, lines = measure(tmp_path, cores=[core], min_runs=7, min_ms=0, items=items)
    assert header["runner"] == 1
    assert header["cores"] == [core]
    assert header["runtime_package"] == "ai-edge-litert"
    assert set(header) == {
        *("runner", "runtime", "runtime_package", "runtime_version", "python", "machine"),
        *("cpu", "cores", "governor", "threads", "pinned"),
    }
    assert all(value != "" for value in header.values())
    assert [(line["id"], line["round"]) for line in lines] == list(
        zip(names, range(5), strict=True)
    )
    assert ["error" in line for line in lines] == [False, True, False, True, False]
    for line in lines[::2]:
        assert len(line["ms"]) == 7
        assert all(0 < time_ms < 1000 for time_ms in line["ms"])


def test_measure_stops_by_time_or_by_count(files: dict[str, Path], tmp_path: Path) -> None:
    items = [{"id": "a", "path": str(files["fp32.tflite"])}]
    _, [by_time] = measure(tmp_path, min_ms=2, max_runs=10**6, items=items)
    _, [by_count] = measure(tmp_path, min_ms=10**6, max_runs=9, items=items)
    assert sum(by_time["ms"]) >= 2 > sum(by_time["ms"][:-1])
    assert by_time["round"] == 0
    assert len(by_count["ms"]) == 9


def test_measure_tells_whether_xnnpack_took_the_graph(
    files: dict[str, Path], tmp_path: Path
) -> None:
    names = ["fp32.tflite", "int8.tflite", "float_io.tflite", "split.tflite"]
    _, lines = measure(tmp_path, items=[{"id": name, "path": str(files[name])} for name in names])
    assert [line["delegated"] for line in lines] == [True, True, True, False]


@pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)
def test_cores_are_kept_awake_for_several_threads_and_no_longer(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """By idle-priority loops, one per core, that end with the runner."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    plan = {
        "runtime": "litert",
        "threads": 2,
        "cores": cores,
        "min_ms": 2000,
        "items": [{"id": "a", "path": str(files["fp32.tflite"])}],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan, "max_runs": 10**6}))
    with subprocess.Popen(
        [sys.executable, str(RUNNER), "measure", str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        header, conditions = (
            json.loads(process.stdout.readline()),
            json.loads(process.stdout.readline()),
        )
        assert header["cores"] == cores and conditions == {"conditions": {"cores": "kept awake"}}
        loops = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        expected = [({core}, os.SCHED_IDLE) for core in cores]
        deadline = time.monotonic() + 10
        while [
            (os.sched_getaffinity(pid), os.sched_getscheduler(pid)) for pid in loops
        ] != expected and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [
            (os.sched_getaffinity(pid), os.sched_getscheduler(pid)) for pid in loops
        ] == expected
        assert json.loads(process.stdout.readline())["ms"]
    # to end, idle-priority processes need a moment of their core, which may be busy
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in loops) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in loops if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("runtime", "name"),
    [("litert", "fp32.tflite"), ("litert", "int8.tflite"), ("onnxruntime", "net.onnx")],
)
def test_measure_feeds_an_image_if_the_plan_names_one(
    runtime: str, name: str, files: dict[str, Path], images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", images[:1])
    np.save(tmp_path / "other.npy", images[:1, :5])
    items = [
        {"id": name, "path": str(files[name]), **({"input": str(tmp_path / i)} if i else {})}
        for i in ("", "image.npy", "other.npy")
    ]
    _, [noise, fed, wrong] = measure(tmp_path, runtime=runtime, items=items)
    assert "input" not in noise and noise["ms"]
    assert fed["input"] == "image" and fed["ms"]
    assert "error" in wrong, "an image of another shape fails, so the named image is what is fed"


def test_measure_runs_onnx_files(files: dict[str, Path], tmp_path: Path) -> None:
    items = [{"id": "net", "path": str(files["net.onnx"])}]
    header, [line] = measure(tmp_path, runtime="onnxruntime", items=items)
    assert header["runtime_package"] == "onnxruntime"
    assert len(line["ms"]) >= 5
    assert "delegated" not in line


def test_predict_agrees_with_pytorch(
    net: nn.Module, images: np.ndarray[Any, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = net(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert expected.std() > 0.1, "smaller outputs would make the comparison meaningless"
    np.save(tmp_path / "in.npy", images)
    limits = {"fp32.tflite": 1e-5, "net.onnx": 1e-5, "int8.tflite": 0.05, "float_io.tflite": 0.05}
    for name, limit in limits.items():
        done = run(
            "predict", files[name], tmp_path / "in.npy", tmp_path / "out.npy", "--threads", 2
        )
        assert done.returncode == 0, done.stderr
        outputs = np.load(tmp_path / "out.npy")
        assert outputs.dtype == np.float32
        assert outputs.shape == expected.shape
        assert np.abs(outputs - expected).max() / np.abs(expected).max() < limit, name
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.npy",
        "out.npy",
    }, "no temporary file is left"


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("{", "not JSON"),
        ('{"runtime": "litert", "threads": 1}', "lacks the key 'items'"),
        ('{"runtime": "litert", "threads": 1, "items": [{"id": 1}]}', "lacks the key 'path'"),
        ('{"runtime": "tensorrt", "threads": 1, "items": []}', "choose one of litert, onnxruntime"),
        ('{"runtime": "litert", "threads": 0, "items": []}', "threads is 0"),
        ('{"runtime": "litert", "threads": 1, "cores": [9999], "items": []}', "this machine has ["),
    ],
)
def test_a_bad_plan_gives_one_sentence(plan: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan)
    done = run("measure", tmp_path / "plan.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr


def test_predict_refuses_what_does_not_fit(files: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.zeros((2, 8, 8, 3), np.float32))
    done = run("predict", files["fp32.tflite"], tmp_path / "in.npy", tmp_path / "out.npy")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Cannot run")
    assert not (tmp_path / "out.npy").exists()


EMPTY = '{"runtime": "litert", "threads": 1, "items": []}'


def hide(folder: Path, *modules: str) -> None:
    """Make these modules fail to import if ``folder`` is on PYTHONPATH."""
    for module in modules:
        (folder / f"{module}.py").write_text("raise ImportError('hidden')")


def test_inspect_describes_the_machine() -> None:
    [line] = run("inspect").stdout.splitlines()
    report = json.loads(line)
    assert report["cores"] == sorted(os.sched_getaffinity(0))
    assert report["numpy"] == np.__version__
    assert report["runtimes"].keys() == {"litert", "onnxruntime"}
    assert report["runtimes"]["litert"] == f"ai-edge-litert {version('ai-edge-litert')}"
    assert report["missing"] == {}


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (
            ("ai_edge_litert", "tflite_runtime"),
            "ai-edge-litert .* does not import \\(ImportError: hidden\\)",
        ),
        (("numpy",), "This Python has no numpy"),
    ],
)
def test_what_is_missing_comes_with_the_command_that_installs_it(
    hidden: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    hide(tmp_path, *hidden)
    (tmp_path / "plan.json").write_text(EMPTY)
    done = run("measure", tmp_path / "plan.json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(
        f"{message}: {sys.executable} -m pip install ai-edge-litert numpy\n", done.stderr
    )
    report = json.loads(run("inspect", PYTHONPATH=str(tmp_path)).stdout)
    assert report["missing"]["litert"] == done.stderr.strip()
    assert "litert" not in report["runtimes"]


def test_tflite_runtime_beside_numpy_2(tmp_path: Path) -> None:
    """It imports there, but would not load any model."""
    if np.__version__ < "2":
        pytest.skip("needs numpy 2")
    hide(tmp_path, "ai_edge_litert")
    (tmp_path / "tflite_runtime").mkdir()
    (tmp_path / "tflite_runtime/interpreter.py").touch()
    (tmp_path / "tflite_runtime-2.14.0.dist-info").mkdir()
    (tmp_path / "tflite_runtime-2.14.0.dist-info/METADATA").write_text(
        "Name: tflite-runtime\nVersion: 2.14.0\n"
    )
    report = json.loads(run("inspect", PYTHONPATH=str(tmp_path)).stdout)
    command = f"{sys.executable} -m pip install tflite-runtime 'numpy<2'"
    assert (
        report["missing"]["litert"]
        == f"tflite-runtime 2.14.0 does not work with numpy {np.__version__}: {command}"
    )


def test_an_externally_managed_python() -> None:
    """Debian 12 and Raspberry Pi OS refuse pip: the command creates an environment."""
    system = Path("/usr/bin/python3")
    if not list(Path("/usr/lib").glob("python3.*/EXTERNALLY-MANAGED")) or not system.exists():
        pytest.skip("needs a system whose Python refuses pip")
    report = json.loads(
        subprocess.run([system, RUNNER, "inspect"], capture_output=True, check=True).stdout
    )
    if not report["missing"]:
        pytest.skip("the system's Python lacks nothing")
    sentence = next(iter(report["missing"].values()))
    assert "create an environment and use its ~/hwnas/bin/python: " in sentence
    assert f"{system} -m venv ~/hwnas && ~/hwnas/bin/python -m pip install " in sentence


def test_a_plan_from_stdin_stops_when_stdin_closes(files: dict[str, Path], tmp_path: Path) -> None:
    """All of it is run while stdin stays open; once it closes, nothing more is, and
    even the run in progress ends.
    """
    path = str(files["fp32.tflite"])
    plan = {"runtime": "litert", "threads": 1, "min_ms": 1, "items": [{"id": "a", "path": path}]}
    command = [sys.executable, str(RUNNER), "measure", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(plan).encode() + b"\n")
        process.stdin.flush()
        header, row = process.stdout.readlines()
        assert json.loads(header)["runner"] == 1
        assert len(json.loads(row)["ms"]) >= 5
        assert process.wait() == 0
    started = time.monotonic()
    long = {**plan, "min_ms": 60_000, "max_runs": 10**9}
    done = stream("measure", "-", content=json.dumps(long).encode() + b"\n")
    assert done.returncode == 1
    assert b"ms" not in done.stdout
    assert time.monotonic() - started < 30


def test_predict_from_stdin_to_stdout(
    images: np.ndarray[Any, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "in.npy", images)
    assert (
        run("predict", files["net.onnx"], tmp_path / "in.npy", tmp_path / "out.npy").returncode == 0
    )
    sent = json.dumps(images.shape).encode() + b"\n" + images.tobytes()
    done = stream("predict", files["net.onnx"], "-", "-", content=sent)
    assert done.returncode == 0, done.stderr
    shape, _, values = done.stdout.partition(b"\n")
    assert np.array_equal(
        np.frombuffer(values, np.float32).reshape(json.loads(shape)), np.load(tmp_path / "out.npy")
    )
    done = stream("predict", files["net.onnx"], "-", "-", content=sent[:-1000])
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"the images ended after 5 of 6" in done.stderr


@pytest.fixture(scope="module")
def pixels(images: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return TAKES_PIXELS.fed(images)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["fp32.tflite", "float_io.tflite", "net.onnx"])
def test_predict_from_pixels(
    name: str, pixels: np.ndarray[Any, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    """A file that takes pixels gets them unchanged, from an array and from a stream;
    one that does not refuses them in one sentence.
    """
    runtime = "onnxruntime" if name.endswith("onnx") else "litert"
    model = tmp_path / name
    model.write_bytes(TAKES_PIXELS.around(files[name].read_bytes(), runtime))
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "floats.npy", TAKES_PIXELS.seen(pixels))
    for entry, images in ((files[name], "floats.npy"), (model, "pixels.npy")):
        done = run("predict", entry, tmp_path / images, tmp_path / f"{entry.parent.name}.npy")
        assert done.returncode == 0, done.stderr
    expected, outputs = (
        np.load(tmp_path / f"{files[name].parent.name}.npy"),
        np.load(tmp_path / f"{tmp_path.name}.npy"),
    )
    limit = 0.02 if name == "float_io.tflite" else 1e-5
    assert np.abs(outputs - expected).max() <= limit * np.abs(expected).max()
    done = stream(
        "predict",
        model,
        "-",
        "-",
        content=json.dumps([*pixels.shape, "uint8"]).encode() + b"\n" + pixels.tobytes(),
    )
    assert done.returncode == 0, done.stderr
    shape, _, values = done.stdout.partition(b"\n")
    assert np.array_equal(np.frombuffer(values, np.float32).reshape(json.loads(shape)), outputs)
    refused = run("predict", files[name], tmp_path / "pixels.npy", tmp_path / "out.npy")
    assert (
        refused.returncode == 2
        and "This model takes float32 images, but these are uint8: normalise them first"
        in refused.stderr
    )


@pytest.mark.parametrize("name", ["fp32.tflite", "float_io.tflite", "net.onnx"])
def test_floats_are_not_pixels(
    name: str, files: dict[str, Path], images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    """The input of a TFLite file has a scale, but for pixels, not normalised images."""
    runtime = "onnxruntime" if name.endswith("onnx") else "litert"
    model = tmp_path / name
    model.write_bytes(TAKES_PIXELS.around(files[name].read_bytes(), runtime))
    np.save(tmp_path / "in.npy", images)
    refused = run("predict", model, tmp_path / "in.npy", tmp_path / "out.npy")
    sentence = (
        "This model takes raw uint8 pixels, but these images are float32: do not normalise them"
    )
    assert refused.returncode == 2 and sentence in refused.stderr
    assert not (tmp_path / "out.npy").exists()
    fed = [
        {"id": "fed", "path": str(model), "input": str(tmp_path / "in.npy")},
        {"id": "noise", "path": str(model)},
    ]
    _, [bad, line] = measure(tmp_path, runtime=runtime, items=fed)
    assert sentence in bad["error"] and len(line["ms"]) >= 5


def announced(contents: dict[str, bytes]) -> bytes:
    """The line that announces files: their sizes and hashes."""
    files = {}
    for name, content in contents.items():
        files[name] = (len(content), hashlib.sha256(content).hexdigest())
    return json.dumps(files).encode() + b"\n"


def test_receives_what_is_missing(files: dict[str, Path], tmp_path: Path) -> None:
    """Of three announced files one is there whole, one in another size, and one in the
    same size with another content.
    """
    contents = {
        "whole": b"0" * 10,
        "a.tflite": files["fp32.tflite"].read_bytes(),
        "b c;d": b"2" * 30,
    }
    (tmp_path / "whole").write_bytes(b"0" * 10)
    (tmp_path / "a.tflite").write_bytes(b"cut off")
    (tmp_path / "b c;d").write_bytes(b"2" * 29 + b"3")
    plan = json.dumps({"runtime": "litert", "threads": 1, "items": []}).encode() + b"\n"
    done = stream(
        "measure",
        "-",
        "--receive",
        tmp_path,
        content=announced(contents) + contents["a.tflite"] + contents["b c;d"] + plan,
    )
    assert json.loads(done.stdout.splitlines()[0]) == ["a.tflite", "b c;d"]
    received = {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".hwnas-lock"
    }
    assert received == contents
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".hidden", ".", "..", "", ".hwnas-lock"])
def test_receives_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    done = stream(
        "measure",
        "-",
        "--receive",
        tmp_path / "inner",
        content=announced({name: b"xyz"}) + b"xyz",
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"{name!r} is not a valid name for a file in {tmp_path}/inner" in done.stderr.decode()
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", ".hwnas-lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]\n", "not JSON in the documented format"),
        (b"{\n", "not JSON in the documented format"),
        (b'{"a": "b"}\n', "not JSON in the documented format"),
        (b'{"a": 10}\n', "not JSON in the documented format"),
        (b"", "not JSON in the documented format"),
        (b'{"a": [10, "0"]}\nabcde', "The connection ended in the middle of a"),
        (b'{"a": [5, "0"]}\nabcde', "a was damaged on its way to"),
    ],
)
def test_a_broken_stream_leaves_nothing(content: bytes, message: str, tmp_path: Path) -> None:
    done = stream("measure", "-", "--receive", tmp_path, content=content)
    assert done.returncode == (4 if "damaged" in message else 2)
    assert message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".hwnas-lock"]


def test_a_long_error_keeps_its_beginning_and_its_end() -> None:
    """A C++ message of onnxruntime: the cause comes after kilobytes of template names."""
    specification = importlib.util.spec_from_file_location("runner", RUNNER)
    assert specification is not None and specification.loader is not None
    runner = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(runner)
    names = "onnxruntime::common::Status, std::vector<std::pair<T, U>>\n" * 100
    cause = "ONNX Runtime only guarantees support for models stamped with opset version 17"
    said = runner.one_sentence(RuntimeError(f"Load model from x.onnx failed: {names}{cause}"))
    assert said.startswith("RuntimeError: Load model from x.onnx failed: onnxruntime::")
    assert said.endswith(cause)
    assert len(said) < 700 and "\n" not in said
    assert runner.one_sentence(RuntimeError("short")) == "RuntimeError: short"


@pytest.mark.parametrize(
    ("found", "works"),
    [("1.12.1", False), ("1.13.0", False), ("1.9.0", False), ("1.14.1", True), ("2.0.0", True)],
)
def test_the_versions_of_onnxruntime_that_work(found: str, works: bool, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").touch()
    metadata = tmp_path / f"onnxruntime-{found}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Name: onnxruntime\nVersion: {found}\n")
    inspected = json.loads(run("inspect", PYTHONPATH=str(tmp_path)).stdout)
    assert ("onnxruntime" in inspected["runtimes"]) == works
    if not works:
        assert inspected["missing"]["onnxruntime"] == (
            f"onnxruntime {found} is too old for the files of hwnas; 1.14 or later works:"
            f" {sys.executable} -m pip install 'onnxruntime>=1.14' numpy"
        )


def test_not_pinned_and_then_no_core_is_kept_awake(files: dict[str, Path], tmp_path: Path) -> None:
    header, [line] = measure(
        tmp_path, threads=2, items=[{"id": "a", "path": str(files["fp32.tflite"])}]
    )
    assert header["pinned"] is False
    assert header["cores"] == sorted(os.sched_getaffinity(0))
    assert line["ms"]


def test_the_script_stands_alone_and_speaks_python_3_8() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 8))
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    } | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith(("hwnas", "torch"))}
