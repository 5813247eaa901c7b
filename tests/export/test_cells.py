"""Cells and their ops in the runtimes: the files that are timed compute what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import darts, nasbench101, nasbench201
from hwnas.export.timing import timing_file
from hwnas.nn.network import network_of

KEYS = (
    "preconv-h8-i4-o6-k3-relu", "sepconv-h8-i4-o6-k5-s2-relu", "dilconv-h8-i4-o6-k3-relu", "avgpool-h8-i4-o4-k3-bn",
    "maxpool-h8-i4-o4-k3-s2", "facreduce-h8-i4-o6-s2-relu", "resreduce-h8-i4-o8-k3-s2-relu", "norm-h8-i4-o4-relu",
)  # fmt: skip
CELL = nasbench201(width=0.25, resolution=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path))


def network_and_input(timed: Op | Architecture) -> tuple[torch.nn.Module, torch.Tensor]:
    """What a timing file is made of: weights from a generator seeded with 0."""
    arch = timed if isinstance(timed, Architecture) else Architecture(name="timing", in_channels=timed.in_ch, blocks=(timed,))
    x_NCHW = torch.randn(1, arch.in_channels, arch.resolution, arch.resolution, generator=torch.Generator().manual_seed(1))
    return network_of(arch, generator=torch.Generator().manual_seed(0)).eval(), x_NCHW


def onnx_outputs(path: Path, x_NCHW: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {session.get_inputs()[0].name: x_NCHW.numpy()})[0]
    return outputs


NETWORKS = {
    "nasbench201": lambda: CELL.decode(CELL.read("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|none~2|")),
    "darts": lambda: sampled(darts(layers=3, resolution=16)),
    "nasbench101": lambda: sampled(nasbench101()),
}


def sampled(space: SearchSpace) -> Architecture:
    return space.decode(space.sample(np.random.default_rng(3)))


@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
@pytest.mark.parametrize("name", [*KEYS, *NETWORKS])
def test_files_compute_what_pytorch_does(name: str, runtime: str) -> None:
    timed = NETWORKS[name]() if name in NETWORKS else Op.parse(name)
    network, x_NCHW = network_and_input(timed)
    expected = network(x_NCHW).detach().numpy()
    assert expected.std() > 0.005
    path = timing_file(timed if isinstance(timed, Architecture) else (timed,), runtime, "fp32")
    found = onnx_outputs(path, x_NCHW) if runtime == "onnxruntime" else litert_outputs(path, x_NCHW)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def litert_outputs(path: Path, x_NCHW: torch.Tensor) -> np.ndarray:
    """Channels first."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x_NCHW.permute(0, 2, 3, 1).numpy())
    interpreter.invoke()
    found: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return found.transpose(0, 3, 1, 2) if found.ndim == 4 else found
