"""The device runner, run as a device runs it: a script in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwnas.export.onnx import to_onnx
from hwnas.export.tflite import quantize_int8, to_tflite

RUNNER = Path(__file__).parents[2] / "deploy" / "runner.py"
SHAPE = (1, 3, 16, 16)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(0, 3, (6, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def files(net: nn.Module, images: np.ndarray[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    float32 = to_tflite(net, SHAPE)
    models = {
        "fp32.tflite": float32,
        "int8.tflite": quantize_int8(float32, [images]),
        "float_io.tflite": quantize_int8(float32, [images], float_io=True),
        # XNNPACK has no GATHER_ND, so two delegates surround one reference kernel.
        "split.tflite": to_tflite(nn.Sequential(nn.Conv2d(3, 8, 1), Flip(), nn.Conv2d(8, 4, 1)), SHAPE),
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
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def measure(tmp_path: Path, **plan: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"runtime": "litert", "threads": 1, "warmup_ms": 0, "min_ms": 1, **plan}))
    done = run("measure", path)
    assert done.returncode == 0, done.stderr
    header, *lines = (json.loads(line) for line in done.stdout.splitlines())
    return header, lines


def test_measure_keeps_the_order_and_survives_a_bad_file(files: dict[str, Path], tmp_path: Path) -> None:
    names = ["int8.tflite", "broken.tflite", "fp32.tflite", "missing.tflite", "int8.tflite"]
    items = [{"id": name, "round": index, "path": str(files.get(name, tmp_path / name))} for index, name in enumerate(names)]
    core = min(os.sched_getaffinity(0))
    header, lines = measure(tmp_path, cores=[core], min_runs=7, min_ms=0, items=items)
    assert header["runner"] == 1
    assert header["cores"] == [core]
    assert header["runtime_package"] == "ai-edge-litert"
    assert set(header) == {
        *("runner", "runtime", "runtime_package", "runtime_version", "python", "machine"),
        *("cpu", "cores", "governor", "threads"),
    }
    assert all(value != "" for value in header.values())
    assert [(line["id"], line["round"]) for line in lines] == list(zip(names, range(5), strict=True))
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


def test_measure_tells_whether_xnnpack_took_the_graph(files: dict[str, Path], tmp_path: Path) -> None:
    names = ["fp32.tflite", "int8.tflite", "float_io.tflite", "split.tflite"]
    _, lines = measure(tmp_path, items=[{"id": name, "path": str(files[name])} for name in names])
    assert [line["delegated"] for line in lines] == [True, True, True, False]


def test_measure_runs_onnx_files(files: dict[str, Path], tmp_path: Path) -> None:
    items = [{"id": "net", "path": str(files["net.onnx"])}]
    header, [line] = measure(tmp_path, runtime="onnxruntime", items=items)
    assert header["runtime_package"] == "onnxruntime"
    assert len(line["ms"]) >= 5
    assert "delegated" not in line


def test_predict_agrees_with_pytorch(net: nn.Module, images: np.ndarray[Any, Any], files: dict[str, Path], tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = net(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert wanted.std() > 0.1, "outputs this small would compare silence"
    np.save(tmp_path / "in.npy", images)
    limits = {"fp32.tflite": 1e-5, "net.onnx": 1e-5, "int8.tflite": 0.05, "float_io.tflite": 0.05}
    for name, limit in limits.items():
        done = run("predict", files[name], tmp_path / "in.npy", tmp_path / "out.npy", "--threads", 2)
        assert done.returncode == 0, done.stderr
        got = np.load(tmp_path / "out.npy")
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() / np.abs(wanted).max() < limit, name
    assert {path.name for path in tmp_path.iterdir()} == {"in.npy", "out.npy"}, "no temporary file stays"


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("{", "not JSON"),
        ('{"runtime": "litert", "threads": 1}', "lacks the key 'items'"),
        ('{"runtime": "litert", "threads": 1, "items": [{"id": 1}]}', "lacks the key 'path'"),
        ('{"runtime": "tensorrt", "threads": 1, "items": []}', "choose one of litert, onnxruntime"),
        ('{"runtime": "litert", "threads": 0, "items": []}', "threads is 0"),
        ('{"runtime": "litert", "threads": 1, "cores": [9999], "items": []}', "available here: ["),
    ],
)
def test_a_bad_plan_is_one_sentence(plan: str, complaint: str, tmp_path: Path) -> None:
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


def test_a_missing_runtime_names_its_package(tmp_path: Path) -> None:
    for package in ("ai_edge_litert", "tflite_runtime"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('hidden')")
    (tmp_path / "plan.json").write_text('{"runtime": "litert", "threads": 1, "items": []}')
    done = run("measure", tmp_path / "plan.json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install ai-edge-litert" in done.stderr


def test_the_script_stands_alone_and_speaks_python_3_8() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names} | {
        str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert not {name for name in imported if name.startswith(("hwnas", "torch"))}
