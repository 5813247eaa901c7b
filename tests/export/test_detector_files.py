"""A detector's files against PyTorch and its PostProcessor: what they compute, and what
their graphs contain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from hwnas.core.detection import with_detector
from hwnas.core.detector import PostProcessing
from hwnas.devices.device import HOST
from hwnas.devices.host import Host
from hwnas.export.convert import onnx_file
from hwnas.export.detector import Decoded
from hwnas.export.onnx_detector import with_nms
from hwnas.export.post_processing import DetectionArrays, read_decoded, read_nms, read_tasks
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_detector import add_decoding, tasks, without_decoding
from hwnas.export.tflite_file import TFLiteGraph, graph_ops
from hwnas.export.tflite_writer import write_heads
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.post_processor import PostProcessor
from tests.export.detectors import CLASSES, images, lively_network, run_onnx, run_tflite
from tests.export.test_post_processing import assert_same
from tests.nn.detectors import KINDS, Kind, small_arch

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

CONFIG = PostProcessing(min_score=0.03, detections=40)
X_NCHW = images()
PLAN: dict[str, Any] = {
    "runtime": "litert",
    "threads": 1,
    "cores": None,
    "min_ms": 0.1,
    "min_runs": 1,
}


def torch_rows(network: DetectionNetwork) -> np.ndarray:
    with torch.no_grad():
        rows: np.ndarray = Decoded(network)(X_NCHW).numpy()
    assert rows[..., 4:].std() > 5e-3 and rows[..., :4].std() > 10, (
        "otherwise there is nothing to compare"
    )
    return rows


def calibration() -> np.ndarray:
    return np.ascontiguousarray(images(8).permute(0, 2, 3, 1).numpy())


def tasks_detections(model: bytes) -> list[DetectionArrays]:
    rows = [
        np.concatenate([value.reshape(-1) for value in outputs.values()])
        for outputs in run_tflite(model, X_NCHW)
    ]
    return [read_tasks(row, {}, 64, CLASSES) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_float_tflite_file_are_pytorchs(kind: Kind) -> None:
    network = lively_network(kind)
    rows = torch_rows(network)
    model = add_decoding(write_heads(network), network)
    for outputs, row in zip(run_tflite(model, X_NCHW), rows, strict=True):
        assert list(outputs) == ["detections"] and outputs["detections"].shape == (1, *row.shape)
        np.testing.assert_allclose(outputs["detections"][0], row, atol=2e-4)
        np.testing.assert_allclose(outputs["detections"][0, :, 4:], row[:, 4:], atol=1e-5)
    assert add_decoding(write_heads(network), network) == model, (
        "the same weights give the same bytes"
    )


def test_one_map_needs_no_joining() -> None:
    network = lively_network(classes=1)
    arch = network.arch
    assert arch.detector is not None
    last = {
        "taps": arch.detector.taps[-1:],
        "extras": (),
        "heads": arch.detector.heads[1:2],
        "aspect_ratios": arch.detector.aspect_ratios[:1],
    }
    single = DetectionNetwork(
        arch.model_copy(update={"detector": arch.detector.model_copy(update=last)})
    ).eval()
    single.load_state_dict(
        {
            **network.state_dict(),
            **{f"heads.0.{k}": v for k, v in network.heads[1].state_dict().items()},
        },
        strict=False,
    )
    with torch.no_grad():
        rows = Decoded(single)(X_NCHW).numpy()
    outputs = run_tflite(add_decoding(write_heads(single), single), X_NCHW)
    np.testing.assert_allclose(
        np.concatenate([by_name["detections"] for by_name in outputs]), rows, atol=2e-4
    )


def test_size_codes_are_clipped_as_in_torchvision() -> None:
    """exp of a code of 100 would be infinite."""
    network = lively_network()
    for head in network.heads:
        head.get_submodule("boxes.predict.conv").get_parameter("bias").data += 100.0
    rows = torch_rows_of(network)
    assert np.isfinite(rows).all()
    outputs = run_tflite(add_decoding(write_heads(network), network), X_NCHW)
    np.testing.assert_allclose(
        np.concatenate([by_name["detections"] for by_name in outputs]), rows, atol=1e-3
    )


def torch_rows_of(network: DetectionNetwork) -> np.ndarray:
    with torch.no_grad():
        rows: np.ndarray = Decoded(network)(X_NCHW).numpy()
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_network_is_int8(kind: Kind) -> None:
    network = lively_network(kind)
    rows = torch_rows(network)
    model = add_decoding(
        quantize_int8(write_heads(network), [calibration()], float_io=True), network
    )
    ops = graph_ops(model)
    start = [op.name for op in ops].index("RESHAPE")
    assert {op.name for op in ops[:start] if op.dtype == "FLOAT32"} == {"DEQUANTIZE"}
    assert {op.dtype for op in ops[start:]} == {"FLOAT32"}
    int8_rows = np.concatenate([by_name["detections"] for by_name in run_tflite(model, X_NCHW)])
    # the boxes of a random anchor-free detector are as large as the image, and int8 is relative
    largest_px = 7 if kind == "fcos" else 2
    assert (
        np.abs(int8_rows - rows)[..., :4].max() < largest_px
        and np.abs(int8_rows - rows)[..., 4:].max() < 0.08
    )
    assert np.abs(int8_rows - rows)[..., :4].max() > 0
    assert len(model) < 0.8 * len(add_decoding(write_heads(network), network))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_detections_of_the_tasks_operator(kind: Kind, dtype: str) -> None:
    """They are those of the rows that it gets, which the decoded file returns. At the
    edges it may choose other boxes, as it does not clip them.
    """
    network = lively_network(kind)
    # most boxes of an untrained anchor-free detector reach beyond so small an image
    nms_iou = 1.0 if kind == "fcos" else CONFIG.nms_iou
    config = CONFIG.model_copy(update={"nms_iou": nms_iou})
    heads = write_heads(network)
    if dtype == "int8":
        heads = quantize_int8(heads, [calibration()], float_io=True)
    outputs = run_tflite(tasks(heads, network, config), X_NCHW)
    shapes = {"boxes": (1, 40, 4), "classes": (1, 40), "scores": (1, 40), "count": (1,)}
    assert [{name: value.shape for name, value in by_name.items()} for by_name in outputs] == [
        shapes
    ] * len(X_NCHW)
    rows = [by_name["detections"] for by_name in run_tflite(add_decoding(heads, network), X_NCHW)]
    same = total = 0
    for detections, row in zip(tasks_detections(tasks(heads, network, config)), rows, strict=True):
        wanted = read_decoded(row, config.model_dump(), 64, CLASSES)
        assert (np.diff(detections[1]) <= 0).all()
        for box, score, label in zip(*wanted, strict=True):
            near = (
                (np.abs(detections[0] - box).max(axis=1) < 0.01)
                & (np.abs(detections[1] - score) < 1e-4)
                & (detections[2] == label)
            )
            same += near.any()
            total += 1
    assert total > 5 and same > 0.8 * total


def test_the_options_of_the_tasks_operator() -> None:
    network = lively_network()
    model = schema.ModelT.InitFromPackedBuf(tasks(write_heads(network), network, CONFIG))
    [custom] = [code for code in model.operatorCodes if code.customCode]
    assert (custom.customCode, custom.builtinCode) == (
        b"TFLite_Detection_PostProcess",
        schema.BuiltinOperator.CUSTOM,
    )
    operator = model.subgraphs[0].operators[-1]
    assert flexbuffers.Loads(bytes(operator.customOptions)) == {
        "max_detections": 40, "max_classes_per_detection": 1, "detections_per_class": 40, "use_regular_nms": True,
        "nms_score_threshold": pytest.approx(0.03), "nms_iou_threshold": pytest.approx(0.55), "num_classes": 3,
        "y_scale": 10.0, "x_scale": 10.0, "h_scale": 5.0, "w_scale": 5.0,
    }  # fmt: skip
    anchors = model.subgraphs[0].tensors[operator.inputs[2]]
    values = np.frombuffer(bytes(model.buffers[anchors.buffer].data), "<f4").reshape(-1, 4)
    assert values.shape == (2040, 4) and np.allclose(
        values[0], [1 / 32, 1 / 32, 0.2, 0.2], atol=0.1
    )


@pytest.fixture(scope="module")
def onnx_models() -> dict[Kind, tuple[DetectionNetwork, bytes]]:
    """Exported once, as the exporter takes five seconds per network."""
    models: dict[Kind, tuple[DetectionNetwork, bytes]] = {}
    for kind in KINDS:
        network = lively_network(kind)
        model = onnx_file(
            Decoded(network),
            (1, 3, 64, 64),
            metadata={"architecture": "here"},
            output_names=("detections",),
        )
        models[kind] = (network, model)
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_onnx_file_are_pytorchs(
    kind: Kind, onnx_models: dict[Kind, tuple[DetectionNetwork, bytes]]
) -> None:
    network, model = onnx_models[kind]
    np.testing.assert_allclose(
        np.concatenate(run_onnx(model, X_NCHW)), torch_rows(network), atol=2e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        PostProcessing(min_score=0.2, candidates=7, detections=9),
        PostProcessing(min_score=0.02, candidates=5000, detections=300),
        PostProcessing(min_score=0.99),
    ],
)
def test_onnx_with_nms_finds_what_pytorch_finds(
    kind: Kind,
    config: PostProcessing,
    onnx_models: dict[Kind, tuple[DetectionNetwork, bytes]],
) -> None:
    network, model = onnx_models[kind]
    with torch.no_grad():
        expected = PostProcessor(network.arch, config)(network(X_NCHW))
    for row, wanted in zip(run_onnx(with_nms(model, config), X_NCHW), expected, strict=True):
        assert row.shape == (1, config.detections, 6)
        assert (row[0, len(wanted.scores_D) :] == 0).all()
        assert_same(read_nms(row, {}, 64, CLASSES), wanted)


def test_the_file_with_nms_has_only_standard_operators(
    onnx_models: dict[Kind, tuple[DetectionNetwork, bytes]],
) -> None:
    parsed = onnx.load_model_from_string(with_nms(onnx_models["softmax"][1], CONFIG))
    assert {node.domain for node in parsed.graph.node} == {""}
    assert [node.op_type for node in parsed.graph.node].count("NonMaxSuppression") == 1
    assert {entry.key: entry.value for entry in parsed.metadata_props} == {"architecture": "here"}
    [output] = parsed.graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [1, 40, 6]


def test_a_file_that_is_opened_and_packed_again_computes_the_same() -> None:
    network = lively_network()
    for heads in (
        write_heads(network),
        quantize_int8(write_heads(network), [calibration()], float_io=True),
    ):
        graph, entry, exits = TFLiteGraph.open(heads)
        again = graph.pack(entry, *exits)
        assert graph_ops(again) == graph_ops(heads)
        for before, after in zip(run_tflite(heads, X_NCHW), run_tflite(again, X_NCHW), strict=True):
            assert list(before) == list(after) and len(before) == 8
            assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("int8", [False, True])
def test_removing_the_decoding_restores_the_network(int8: bool) -> None:
    network = lively_network()
    heads = (
        quantize_int8(write_heads(network), [calibration()], float_io=True)
        if int8
        else write_heads(network)
    )
    again = without_decoding(add_decoding(heads, network))
    assert graph_ops(again) == graph_ops(heads)
    for before, after in zip(run_tflite(heads, X_NCHW), run_tflite(again, X_NCHW), strict=True):
        assert before.keys() == after.keys() and all(
            np.array_equal(before[name], after[name]) for name in before
        )


def test_xnnpack_takes_the_whole_graph(tmp_path: Path) -> None:
    """Even with six maps, more than it concatenates at once."""
    for classes in (1, 3):
        network = DetectionNetwork(
            with_detector(
                small_arch().model_copy(update={"detector": None}), classes, resolution=64
            )
        ).eval()
        assert network.arch.detector is not None and len(network.arch.detector.heads) == 6
        path = tmp_path / "model.tflite"
        path.write_bytes(add_decoding(write_heads(network), network))
        [_, row] = Host(HOST).measure(
            PLAN | {"items": [{"id": "x", "path": str(path), "round": 0}]}, tmp_path
        )
        assert row["delegated"] is True
