"""Cells and their ops in the runtimes: files compute what PyTorch computes, with no
more operators than other people's converters write.
"""

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
from hwnas.export.convert import to_onnx, to_tflite
from hwnas.export.onnx_writer import write_onnx, write_op
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_file import graph_ops
from hwnas.export.tflite_writer import write_tflite
from hwnas.export.timing import timing_file
from hwnas.nn.blocks import build
from hwnas.nn.network import network_of
from tests.export.test_onnx_writer import nodes, optimised, run
from tests.export.test_tflite_writer import (
    OPS_OF_CELLS,
    random_images,
    randomised,
    relative_error,
    run_litert,
)

KEYS = (
    "preconv-h8-i4-o6-k3-relu", "sepconv-h8-i4-o6-k5-s2-relu", "dilconv-h8-i4-o6-k3-relu", "avgpool-h8-i4-o4-k3-bn",
    "maxpool-h8-i4-o4-k3-s2", "facreduce-h8-i4-o6-s2-relu", "resreduce-h8-i4-o8-k3-s2-relu", "norm-h8-i4-o4-relu",
)  # fmt: skip
CELL = nasbench201(width=0.25, resolution=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path))


def network_and_input(timed: Op | Architecture) -> tuple[torch.nn.Module, torch.Tensor]:
    """A timing file's network, with weights from a generator seeded with 0, and an
    input for it.
    """
    arch = (
        timed
        if isinstance(timed, Architecture)
        else Architecture(name="timing", in_channels=timed.in_ch, blocks=(timed,))
    )
    x_NCHW = torch.randn(
        1,
        arch.in_channels,
        arch.resolution,
        arch.resolution,
        generator=torch.Generator().manual_seed(1),
    )
    return network_of(arch, generator=torch.Generator().manual_seed(0)).eval(), x_NCHW


def onnx_outputs(path: Path, x_NCHW: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {session.get_inputs()[0].name: x_NCHW.numpy()})[0]
    return outputs


LEANER_ONNX = {"facreduce-h8-i6-o8-s2-relu": 2, "mbconv-h8-i8-o8-m16-k3-c3-relu": 1, "darts": 6}
"""How many operators fewer than the exporter's, at least: the larger of the differences
before and after onnxruntime's optimisation, which depends on the CPU.
"""
NETWORKS = {
    "nasbench201": lambda: CELL.decode(
        CELL.read("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|none~2|")
    ),
    "darts": lambda: sampled(darts(layers=3, resolution=16)),
    "nasbench101": lambda: sampled(nasbench101()),
}


def sampled(space: SearchSpace) -> Architecture:
    return space.decode(space.sample(np.random.default_rng(3)))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
@pytest.mark.parametrize("name", [*KEYS, *NETWORKS])
def test_files_compute_what_pytorch_does(name: str, runtime: str) -> None:
    timed = NETWORKS[name]() if name in NETWORKS else Op.parse(name)
    network, x_NCHW = network_and_input(timed)
    expected = network(x_NCHW).detach().numpy()
    assert expected.std() > 0.005
    path = timing_file(timed if isinstance(timed, Architecture) else (timed,), runtime, "fp32")
    outputs = (
        onnx_outputs(path, x_NCHW) if runtime == "onnxruntime" else litert_outputs(path, x_NCHW)
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def litert_outputs(path: Path, x_NCHW: torch.Tensor) -> np.ndarray:
    """The file's output, channels first."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], x_NCHW.permute(0, 2, 3, 1).numpy()
    )
    interpreter.invoke()
    output: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return output.transpose(0, 3, 1, 2) if output.ndim == 4 else output


def types(model: bytes) -> list[str]:
    return [node[1] for node in nodes(model)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *OPS_OF_CELLS,
        "avgpool-h8-i6-o6-k3-s2",
        "maxpool-h8-i6-o6-k3-bn",
        "nasbench201",
        "nasbench101",
        *LEANER_ONNX,
    ],
)
def test_onnx_files_have_no_more_operators_than_the_exporters(name: str, tmp_path: Path) -> None:
    """Only the types of operators count: the exporter writes default attributes."""
    if name in NETWORKS:
        network = randomised(network_of(NETWORKS[name]()))
        module, channels, size, written = (
            network,
            network.arch.in_channels,
            network.arch.resolution,
            write_onnx(network),
        )
    else:
        op = Op.parse(name)
        module = randomised(build(op))
        channels, size, written = op.in_ch, op.size, write_op(op, module)
    path = tmp_path / "exported.onnx"
    to_onnx(module, (1, channels, size, size), metadata={}, path=path)
    exported = path.read_bytes()
    optimised_types = types(optimised(written, tmp_path)), types(optimised(exported, tmp_path))
    if name in LEANER_ONNX:
        lengths = (
            len(types(exported)) - len(types(written)),
            len(optimised_types[1]) - len(optimised_types[0]),
        )
        assert max(lengths) >= LEANER_ONNX[name]
        assert min(lengths) >= 0
    else:
        assert types(written) == types(exported)
        assert optimised_types[0] == optimised_types[1]
    images_NHWC = random_images(size, channels)
    assert relative_error(run(written, images_NHWC), run(exported, images_NHWC)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_tflite_files_have_no_more_operators_than_the_converters(name: str) -> None:
    network = randomised(network_of(NETWORKS[name]()))
    size, channels = network.arch.resolution, network.arch.in_channels
    written, converted = write_tflite(network), to_tflite(network, (1, channels, size, size))
    assert len(graph_ops(written)) <= len(graph_ops(converted))
    images_NHWC = random_images(size, channels)
    assert (
        relative_error(run_litert(written, images_NHWC), run_litert(converted, images_NHWC)) < 1e-6
    )


UNUSED = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|nor_conv_3x3~0|none~1|none~2|"
"""Only node 2 reads node 1, and nothing reads node 2: two convolutions and a pooling
that do not affect the output.
"""


def test_files_leave_out_what_does_not_affect_the_output() -> None:
    arch = CELL.decode(CELL.read(UNUSED))
    network = randomised(network_of(arch))
    needed = CELL.decode(CELL.read("|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"))
    assert len(arch.ops()) > len(needed.ops())
    written = write_tflite(network)
    wanted = write_tflite(randomised(network_of(needed)))
    assert graph_ops(written) == graph_ops(wanted)
    assert types(write_onnx(network)) == types(write_onnx(network_of(needed)))
    images_NHWC = random_images(arch.resolution, arch.in_channels)
    with torch.no_grad():
        expected = network(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).numpy()
    assert relative_error(run_litert(written, images_NHWC), expected) < 1e-6
    quantised = graph_ops(quantize_int8(written, [images_NHWC]))
    assert {op.dtype for op in quantised} == {"INT8"}
