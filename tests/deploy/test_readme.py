"""The snippets of deploy/README.md on real bundles and a real JPEG: they print what
hwnas predicts.

C++ is compiled if the environment variable HWNAS_LITERT_HEADERS names a checkout of
LiteRT, or its C++ SDK, and linked with the library from the installed wheel. Kotlin is
not compiled.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import tv_tensors

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.ops import Classifier, Conv, MBConv, Op
from hwnas.data.geometry import Geometry
from hwnas.data.images import evaluation_order, load_images
from hwnas.devices.device import HOST
from hwnas.devices.host import Host
from hwnas.export.bundle import Bundle
from hwnas.export.post_processing import read_decoded
from hwnas.nn.checkpoint import save_network
from hwnas.nn.network import network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from tests.train.rectangles import settings

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
README = (ROOT / "deploy" / "README.md").read_text()
NETWORK = Architecture(
    name="photographs",
    blocks=(
        Conv(40, 3, 8, kernel=3, stride=2, act="relu6"),
        MBConv(20, 8, 16, 24, 3, act="relu6"),
        Classifier(20, 16, 4),
    ),
)
INTERFACES = {
    "floats": {"data": {"resize": "squash"}, "export": {}},
    "pixels": {"data": {"resize": "pad"}, "export": {"input": "uint8"}},
    "app": {
        "data": {"resize": "crop", "crop_fraction": 0.8, "interpolation": "bicubic"},
        "export": {"input": "uint8", "softmax": True},
    },
}


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(snippet: str, folder: Path) -> list[str]:
    """The lines that a script prints in a bundle's folder."""
    (folder / "app.py").write_text(snippet)
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of pieces of two photographs, none of them square, most of
    different sizes.
    """
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number, photograph in enumerate(load_sample_images().images):
        for part in ("train", "val"):
            for label in range(2):
                target = folder / part / f"label {2 * number + label}"
                target.mkdir(parents=True)
                for index in range(3):
                    height, width = (int(side) for side in rng.integers(60, 300, 2))
                    # the photographs are 427 pixels high and 640 wide
                    y, x = int(rng.integers(0, 427 - height)), int(rng.integers(0, 640 - width))
                    Image.fromarray(photograph[y : y + height, x : x + width]).save(
                        target / f"{index}.jpg", quality=90
                    )
    return folder


def lively(arch: Architecture, scale: float) -> Any:
    """A network whose outputs differ from image to image."""
    network = network_of(arch, generator=torch.Generator().manual_seed(0))
    for name, weight in network.named_parameters():
        if name.endswith(("linear.weight", "predict.conv.weight")):
            weight.data *= scale
    return network


@pytest.fixture(scope="module", params=list(INTERFACES))
def run(
    request: pytest.FixtureRequest, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, Path]:
    """An experiment and the folder of its bundle."""
    chosen = INTERFACES[request.param]
    data = {
        "name": "folder",
        "path": str(photographs),
        "resolution": 40,
        "classes": 4,
        "augment": "none",
        **chosen["data"],
    }
    experiment = Experiment.model_validate(
        {"data": data, "export": {"formats": ["tflite-int8"], **chosen["export"]}}
    )
    root = tmp_path_factory.mktemp(request.param) / "run"
    network, test = lively(NETWORK, 30.0).eval(), load_images(experiment.data, "test")
    x_NCHW, _ = test.__getitems__([(index, 0) for index in range(len(test))])
    with torch.no_grad():  # so that not every image gets the same label
        network.blocks[-1].linear.bias -= network(x_NCHW).mean(0)
    save_network(network, root / "train" / "model.safetensors", {})
    Pipeline(experiment, root, Progress()).run_stage("export")
    return experiment, root / "export"


@pytest.mark.slow
def test_python_predicts_the_class_that_hwnas_predicts(
    run: tuple[Experiment, Path], photographs: Path
) -> None:
    experiment, folder = run
    bundle, classify = Bundle.load(folder / "bundle.json"), "".join(snippets("python")[:2])
    test = load_images(experiment.data, "test")
    paths = sorted((photographs / "val").glob("*/*.jpg"))
    x_NCHW, _ = test.__getitems__([(index, 0) for index in range(len(paths))])
    images = bundle.interface.fed(x_NCHW.permute(0, 2, 3, 1).contiguous().numpy())
    outputs = Host(HOST).predict(folder / "model-int8.tflite", images, folder)
    expected = [
        " ".join((bundle.labels[row.argmax()], bundle.interface.output, str(row.max())))
        for row in outputs
    ]
    assert len({line.partition(" logits")[0].partition(" prob")[0] for line in expected}) > 1, (
        "otherwise a constant would pass"
    )
    for path, line in list(zip(paths, expected, strict=True))[::2]:
        shutil.copy(path, folder / "photograph.jpg")
        assert python(classify, folder) == [line]


@pytest.mark.slow
def test_python_predicts_the_boxes_that_hwnas_predicts(photographs: Path, tmp_path: Path) -> None:
    content = settings(tmp_path)
    backbone = Architecture(
        name="boxes",
        blocks=tuple(
            Op.parse(key)
            for key in (
                "conv-h48-i3-o16-k3-s2-relu6",
                "mbconv-h24-i16-o24-m48-k3-s2-relu6",
                "mbconv-h12-i24-o32-m72-k3-s2-relu6",
            )
        ),
    )
    arch = with_detector(backbone, 2, resolution=48)
    content["detector"]["post_processing"] = {"min_score": 0.4, "detections": 5}
    content["export"] = {
        "formats": ["tflite-int8"],
        "input": "uint8",
        "calibration_images": 8,
        "parity_images": 2,
    }
    experiment = Experiment.model_validate(content)
    root = tmp_path / "run"
    save_network(lively(arch, 20.0), root / "train" / "model.safetensors", {})
    Pipeline(experiment, root, Progress()).run_stage("export")
    folder = root / "export"
    shutil.copy(ROOT / "hwnas" / "export" / "post_processing.py", folder)
    path = next((photographs / "val").glob("*/*.jpg"))
    shutil.copy(path, folder / "photograph.jpg")
    load, _, detect = snippets("python")[:3]
    printed = python(load + detect, folder)
    pixels = (
        Geometry.of(experiment.data)
        .fitted(tv_tensors.Image(Image.open(path)))
        .permute(1, 2, 0)
        .numpy()
    )
    row = Host(HOST).predict(folder / "model-int8.tflite", pixels[None], folder)
    bundle = Bundle.load(folder / "bundle.json")
    assert bundle.detector is not None
    boxes, scores, labels = read_decoded(row, bundle.detector.post_processing.model_dump(), 48, 2)
    assert len(boxes) and printed[0].startswith(f"{bundle.labels[labels[0]]} ")
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed[0])]
    assert numbers == pytest.approx([float(scores[0]), *(boxes[0] / 48)], abs=0.06), (
        "Pillow rounds pixels differently from torchvision"
    )


def library() -> Path:
    """LiteRT's shared library, from the installed wheel."""
    spec = find_spec("ai_edge_litert")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "libLiteRt.so"


def test_the_library_exports_what_c_plus_plus_calls() -> None:
    [source] = snippets("cpp")
    called = set(re.findall(r"\b(LiteRt\w+)\(", source))
    assert len(called) > 15
    exported = ctypes.CDLL(str(library()))
    assert [name for name in sorted(called) if not hasattr(exported, name)] == []


@pytest.mark.parametrize("run", ["app"], indirect=True)
def test_c_plus_plus_predicts_the_class_that_hwnas_predicts(
    run: tuple[Experiment, Path], tmp_path: Path
) -> None:
    headers, compiler = os.environ.get("HWNAS_LITERT_HEADERS"), shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("needs a C++ compiler, and LiteRT's headers in HWNAS_LITERT_HEADERS")
    generated = tmp_path / "litert" / "build_common" / "build_config.h"
    generated.parent.mkdir(parents=True)
    shutil.copy(Path(headers) / "litert/build_common/config/build_config_cpu_only.h", generated)
    (tmp_path / "classify.cc").write_text(snippets("cpp")[0])
    includes = [f"-I{folder}" for folder in (tmp_path, headers)]
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        *includes,
        "classify.cc",
        "-o",
        "classify",
    ]
    linked = [str(library()), f"-Wl,-rpath,{library().parent}"]
    subprocess.run([compiler, *flags, *linked], cwd=tmp_path, check=True)
    experiment, folder = run
    bundle, test = Bundle.load(folder / "bundle.json"), load_images(experiment.data, "test")
    order = evaluation_order(test)[:4]
    x_NCHW, _ = test.__getitems__([(int(index), 0) for index in order])
    pixels = bundle.interface.fed(x_NCHW.permute(0, 2, 3, 1).contiguous().numpy())
    outputs = Host(HOST).predict(folder / "model-int8.tflite", pixels, folder)
    for image, row in zip(pixels, outputs, strict=True):
        image.tofile(tmp_path / "image.rgb")
        command = ["./classify", folder / "model-int8.tflite", "image.rgb"]
        printed = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        best, probability = printed.split()
        assert int(best) == row.argmax() and float(probability) == pytest.approx(
            row.max(), abs=1e-3
        )
