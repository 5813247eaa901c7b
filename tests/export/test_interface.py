"""Files that take pixels and return probabilities, against files that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from hwnas.core.arch import Architecture
from hwnas.core.ops import Classifier, Conv, MBConv
from hwnas.core.spaces import nasbench201
from hwnas.devices.device import HOST
from hwnas.devices.host import Host
from hwnas.export.convert import onnx_file, to_tflite
from hwnas.export.interface import Interface, softmax
from hwnas.export.quantization import quantize_int8
from hwnas.export.target import target
from hwnas.export.tflite_detector import add_decoding, tasks, without_decoding
from hwnas.export.tflite_file import graph_ops
from hwnas.export.tflite_writer import write_heads
from hwnas.nn.network import Network, network_of
from tests.export.detectors import lively_network, run_tflite
from tests.export.test_detector_files import CONFIG, PLAN, calibration

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOTH = Interface("uint8", True, MEAN, STD)
PIXELS = Interface("uint8", False, MEAN, STD)
BLOCKS = Architecture(
    name="blocks",
    blocks=(
        Conv(16, 3, 8, kernel=3, stride=2, act="relu6"),
        MBConv(8, 8, 8, 24, 3, act="relu6", residual=True),
        Classifier(8, 8, 5),
    ),
)
CELL = nasbench201(width=0.25, resolution=16)
CELLS = CELL.decode(
    CELL.read("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|none~2|")
)


def photographs(count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3], drawn from all values."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def network(arch: Architecture) -> Network:
    built = network_of(arch, generator=torch.Generator().manual_seed(0)).eval()
    for name, weight in built.named_parameters():
        if name.endswith("linear.weight"):
            weight.data *= 20
    return built


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, str], bytes]:
    """Files of just the networks, by architecture and kind."""
    files = {}
    for name, arch in (("blocks", BLOCKS), ("cells", CELLS)):
        built, shape = network(arch), (1, 3, arch.resolution, arch.resolution)
        files[name, "fp32"] = to_tflite(built, shape)
        files[name, "onnx"] = onnx_file(built, shape, metadata={"architecture": "here"})
    seen = PIXELS.seen(photographs(8, BLOCKS.resolution))
    files["blocks", "int8"] = quantize_int8(files["blocks", "fp32"], [seen], float_io=True)
    return files


KINDS = [
    ("blocks", "fp32"),
    ("blocks", "int8"),
    ("blocks", "onnx"),
    ("cells", "fp32"),
    ("cells", "onnx"),
]


def runtime(kind: str) -> str:
    return "onnxruntime" if kind == "onnx" else "litert"


def run(model: bytes, kind: str, images_NHWC: np.ndarray) -> np.ndarray:
    """The only output, for each image: [N, ...]."""
    if kind == "onnx":
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return np.concatenate(
            [
                session.run(None, {"image": image[None]})[0]
                for image in images_NHWC.transpose(0, 3, 1, 2)
            ]
        )
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    [entry], [exit_] = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = []
    for image in images_NHWC:
        interpreter.set_tensor(entry["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(exit_["index"]).copy())
    return np.concatenate(outputs)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_pixels_give_the_same_outputs_as_normalised_images(
    name: str, kind: str, plain: dict[tuple[str, str], bytes]
) -> None:
    """In the int8 file too: after the normalisation, the numbers are the same but for
    rounding near the edge of a quantization step.
    """
    images = photographs(6, 16)
    wanted = run(plain[name, kind], kind, ((images / 255 - MEAN) / STD).astype(np.float32))
    assert wanted.std() > 0.1, "with smaller outputs there is nothing to compare"
    outputs = run(PIXELS.around(plain[name, kind], runtime(kind)), kind, images)
    limit = 0.02 if kind == "int8" else 1e-5
    assert np.abs(outputs - wanted).max() / np.abs(wanted).max() < limit
    changed = run(PIXELS.around(plain[name, kind], runtime(kind)), kind, images[..., ::-1].copy())
    assert np.abs(changed - wanted).max() / np.abs(wanted).max() > 0.02, (
        "each channel has its own mean"
    )


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_probabilities_are_the_softmax_of_the_logits(
    name: str, kind: str, plain: dict[tuple[str, str], bytes]
) -> None:
    images = photographs(6, 16)
    logits = run(PIXELS.around(plain[name, kind], runtime(kind)), kind, images)
    probabilities = run(BOTH.around(plain[name, kind], runtime(kind)), kind, images)
    wanted = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
    np.testing.assert_allclose(softmax(logits), wanted, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert probabilities.std() > 0.05


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_interface_of_a_tflite_file(
    kind: str, plain: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    """Its names, types and scale suffice without other documents, and XNNPACK takes all
    of the graph.
    """
    model = BOTH.around(plain["blocks", kind], "litert")
    names = [op.name for op in graph_ops(model)]
    network_names = [op.name for op in graph_ops(plain["blocks", kind])]
    assert names == ["DEQUANTIZE", "MUL", "ADD", *network_names, "SOFTMAX"]
    interpreter = Interpreter(model_content=model)
    interpreter.allocate_tensors()
    [entry], [exit_] = interpreter.get_input_details(), interpreter.get_output_details()
    assert (entry["name"], entry["dtype"], entry["shape"].tolist()) == (
        "image",
        np.uint8,
        [1, 16, 16, 3],
    )
    assert entry["quantization"] == (pytest.approx(1 / 255), 0)
    assert (exit_["name"], exit_["dtype"], exit_["shape"].tolist()) == (
        "probabilities",
        np.float32,
        [1, 5],
    )
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["probabilities"]}
    }
    path = tmp_path / "model.tflite"
    path.write_bytes(model)
    [_, row] = Host(HOST).measure(
        PLAN | {"items": [{"id": "x", "path": str(path), "round": 0}]}, tmp_path
    )
    assert row["delegated"] is True


def test_the_interface_of_an_onnx_file(plain: dict[tuple[str, str], bytes]) -> None:
    parsed = onnx.load_model_from_string(BOTH.around(plain["blocks", "onnx"], "onnxruntime"))
    [entry], [exit_] = parsed.graph.input, parsed.graph.output
    assert (entry.name, entry.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert [dim.dim_value for dim in entry.type.tensor_type.shape.dim] == [1, 3, 16, 16]
    assert (exit_.name, [dim.dim_value for dim in exit_.type.tensor_type.shape.dim]) == (
        "probabilities",
        [1, 5],
    )
    assert {entry.key: entry.value for entry in parsed.metadata_props} == {"architecture": "here"}
    assert {node.domain for node in parsed.graph.node} == {""}


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize(
    "interface",
    [BOTH, PIXELS, Interface("float32", True, MEAN, STD)],
    ids=["both", "pixels", "softmax"],
)
def test_removing_the_interface_restores_the_network(
    interface: Interface, name: str, kind: str, plain: dict[tuple[str, str], bytes]
) -> None:
    before = plain[name, kind]
    around = interface.around(before, runtime(kind))
    alone = target("onnx" if kind == "onnx" else f"tflite-{kind}").network_alone(
        around, detector=False
    )
    assert alone is not None
    if kind == "onnx":
        before_graph, after_graph = (
            onnx.load_model_from_string(model).graph for model in (before, alone)
        )
        assert [node.op_type for node in before_graph.node] == [
            node.op_type for node in after_graph.node
        ]
        assert len(before_graph.initializer) == len(after_graph.initializer)
    else:
        assert graph_ops(alone) == graph_ops(before)
    seen = PIXELS.seen(photographs(3, 16))
    assert np.array_equal(run(alone, kind, seen), run(before, kind, seen))


def test_an_interface_that_changes_nothing_leaves_the_file_alone(
    plain: dict[tuple[str, str], bytes],
) -> None:
    unchanged = Interface("float32", False, MEAN, STD)
    assert unchanged.around(plain["blocks", "fp32"], "litert") is plain["blocks", "fp32"]
    images = PIXELS.seen(photographs(1, 8))
    assert unchanged.fed(images) is images and np.array_equal(unchanged.seen(images), images)


def test_pixels_come_back_exactly() -> None:
    """All 256 values in each channel come back from the float32 that a data set gives;
    values of no pixel become the nearest one.
    """
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None, None], 3, axis=3)
    loaded = (
        (torch.from_numpy(pixels).float() / 255.0 - torch.tensor(MEAN)) / torch.tensor(STD)
    ).numpy()
    assert np.array_equal(PIXELS.fed(loaded), pixels)
    assert PIXELS.fed(loaded).dtype == np.uint8
    np.testing.assert_allclose(PIXELS.seen(pixels), loaded, atol=1e-6)
    assert PIXELS.fed(np.array([[[[-9.0, 0.0, 9.0]]]], np.float32)).tolist() == [[[[0, 116, 255]]]]


def test_the_range_of_an_input() -> None:
    assert PIXELS.range == (0, 255)
    assert Interface("float32", False, MEAN, STD).range == (
        pytest.approx(-2.1179, abs=1e-4),
        pytest.approx(2.64, abs=1e-4),
    )


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_detectors_take_pixels(dtype: str) -> None:
    """Rows, detections and the timed network are those for normalised images."""
    network = lively_network()
    heads = write_heads(network)
    if dtype == "int8":
        heads = quantize_int8(heads, [calibration()], float_io=True)
    images = torch.from_numpy(photographs(3, 64)).permute(0, 3, 1, 2)
    seen = torch.from_numpy(PIXELS.seen(photographs(3, 64))).permute(0, 3, 1, 2)
    with_pixels = PIXELS.around(heads, "litert")
    step = {"fp32": 2e-4, "int8": 1.0}[dtype]

    def assert_near(
        actual: list[dict[str, Any]], wanted: list[dict[str, Any]], atol: float
    ) -> None:
        for outputs, expected in zip(actual, wanted, strict=True):
            assert list(outputs) == list(expected)
            for name in outputs:
                np.testing.assert_allclose(outputs[name], expected[name], atol=atol)

    assert_near(
        run_tflite(add_decoding(with_pixels, network), images),
        run_tflite(add_decoding(heads, network), seen),
        step,
    )
    if dtype == "fp32":
        assert_near(
            run_tflite(tasks(with_pixels, network, CONFIG), images),
            run_tflite(tasks(heads, network, CONFIG), seen),
            1e-3,
        )
    alone = without_decoding(add_decoding(with_pixels, network))
    assert graph_ops(alone) == graph_ops(heads)
    for before, after in zip(run_tflite(heads, seen), run_tflite(alone, seen), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in after)
