"""Files with their data behind the flatbuffer, as ai-edge-quantizer writes them from
256 KiB on: they are read, and written with the data inside.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.detector import PostProcessing
from hwnas.core.ops import Op
from hwnas.errors import ExportError
from hwnas.export import quantization, tflite_file
from hwnas.export.convert import to_tflite
from hwnas.export.quantization import quantize_int8, quantize_int8_uncalibrated
from hwnas.export.tflite_detector import add_decoding, tasks, without_decoding
from hwnas.export.tflite_file import TFLiteGraph, graph_ops, inline_data, read_model, write_model
from hwnas.export.tflite_writer import write_heads, write_tflite
from hwnas.nn.blocks import build
from hwnas.nn.detector import DetectionNetwork
from tests.export.detectors import lively_network, run_tflite

torch.set_num_threads(1)

BLOCKS = (
    "conv-h64-i3-o16-k3-s2-relu6",
    "mbconv-h32-i16-o96-m96-k3-s2-relu6",
    "mbconv-h16-i96-o96-m576-k3-s2-relu6",
    "mbconv-h8-i96-o192-m576-k3-s2-relu6",
    "conv-h4-i192-o256-relu6",
    "classifier-h4-i256-o10",
)
SETTINGS = PostProcessing(min_score=0.05, detections=20)
X_NCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def calibration() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)


def large_network(classes: int = 3) -> DetectionNetwork:
    """A detector with the default extras and over 256 KiB of weights in int8."""
    arch = Architecture(name="large", blocks=tuple(Op.parse(key) for key in BLOCKS))
    detector = DetectionNetwork(with_detector(arch, classes, resolution=64)).eval()
    assert detector.arch.params > 256 * 1024
    return detector


@pytest.fixture(scope="module")
def network() -> DetectionNetwork:
    return large_network()


@pytest.fixture(scope="module")
def raw(network: DetectionNetwork) -> bytes:
    """The file as the quantizer returns it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "inline_data", lambda content: content)
        return quantize_int8(write_heads(network), [calibration()], float_io=True)


def outside(model: Any) -> bytes:
    """The file of a model whose large buffers and custom options lie behind the flatbuffer."""
    parts = [
        (buffer, "offset", "size", buffer.data)
        for buffer in model.buffers
        if buffer.data is not None and len(buffer.data) >= 64
    ]
    for buffer, *_ in parts:
        buffer.data = None
    for operator in model.subgraphs[0].operators:
        if operator.customOptions is not None:
            parts.append(
                (
                    operator,
                    "largeCustomOptionsOffset",
                    "largeCustomOptionsSize",
                    operator.customOptions,
                )
            )
            operator.customOptions = None
    for owner, offset, size, data in parts:
        setattr(owner, offset, 2)  # not the default, so that the field is stored
        setattr(owner, size, len(data))
    at = (len(repacked(model)) + 15) // 16 * 16
    tail = b""
    for owner, offset, _, data in parts:
        setattr(owner, offset, at + len(tail))
        tail += bytes(data) + bytes(-len(data) % 16)
    return repacked(model).ljust(at, b"\0") + tail


def repacked(model: Any) -> bytes:
    """The file as written by tools that do not know of data behind the flatbuffer, such
    as TFLite's metadata writers.
    """
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def buffers(content: bytes) -> list[Any]:
    return list(schema.ModelT.InitFromPackedBuf(content).buffers)


def same(first: bytes, second: bytes) -> bool:
    """Whether two files give the same numbers."""
    pairs = zip(run_tflite(first, X_NCHW), run_tflite(second, X_NCHW), strict=True)
    return all(
        list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs
    )


def test_a_detector_of_ordinary_size_has_int8_files(network: DetectionNetwork) -> None:
    """This used to fail with "Input tensor 13 lacks data"."""
    heads = quantize_int8(write_heads(network), [calibration()], float_io=True)
    assert len(heads) > 256 * 1024
    for file in (add_decoding(heads, network), tasks(heads, network, SETTINGS)):
        assert {op.dtype for op in graph_ops(file)} >= {"INT8", "FLOAT32"}
        assert all(
            np.isfinite(output).all()
            for outputs in run_tflite(file, X_NCHW)
            for output in outputs.values()
        )
    assert graph_ops(without_decoding(add_decoding(heads, network))) == graph_ops(heads)


def test_a_quantised_file_has_its_data_inside_and_is_no_larger(
    raw: bytes, network: DetectionNetwork
) -> None:
    assert sum(buffer.offset > 1 for buffer in buffers(raw)) > 10, (
        "the quantizer writes everything inline now: is the rewriting still needed?"
    )
    quantised = quantize_int8(write_heads(network), [calibration()], float_io=True)
    assert quantised == inline_data(raw)
    assert all(buffer.offset == buffer.size == 0 for buffer in buffers(quantised))
    assert len(quantised) <= len(raw)
    assert same(quantised, raw)


def test_data_are_aligned_to_16_bytes(raw: bytes) -> None:
    content = inline_data(raw)
    model = schema.Model.GetRootAs(content)
    starts = [
        model.Buffers(i)._tab.Vector(model.Buffers(i)._tab.Offset(4))
        for i in range(model.BuffersLength())
        if model.Buffers(i).DataLength()
    ]
    assert len(starts) > 10 and all(start % 16 == 0 for start in starts)


def test_tools_that_repack_a_file_keep_its_numbers(raw: bytes) -> None:
    """They lose the weights of the quantizer's own file."""
    content = inline_data(raw)
    assert same(repacked(schema.ModelT.InitFromPackedBuf(content)), content)
    with pytest.raises((ValueError, RuntimeError)):
        run_tflite(repacked(schema.ModelT.InitFromPackedBuf(raw)), X_NCHW)


def test_both_forms_are_read_alike() -> None:
    network = lively_network()
    file = tasks(write_heads(network), network, SETTINGS)
    behind = outside(schema.ModelT.InitFromPackedBuf(file))
    options = schema.ModelT.InitFromPackedBuf(behind).subgraphs[0].operators[-1]
    assert options.customOptions is None and options.largeCustomOptionsOffset > 0
    assert same(behind, file), "LiteRT does not read this form: the test is wrong"
    assert inline_data(behind) == inline_data(file)
    graph, entry, exits = TFLiteGraph.open(behind)
    again = graph.pack(entry, *exits)
    assert graph_ops(again) == graph_ops(file)
    assert same(again, file)


def test_other_data_behind_the_flatbuffer_are_left_out() -> None:
    file = write_heads(lively_network())
    assert inline_data(file + b"PK and more") == inline_data(file)


def test_a_file_that_is_cut_off_is_refused(raw: bytes) -> None:
    with pytest.raises(ExportError, match=r"has \d+ bytes, but refers to data up to byte \d+"):
        read_model(raw[: len(raw) - 4096])


def test_a_file_of_2_gib_is_refused(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(raw)
    monkeypatch.setattr(tflite_file, "LIMIT_BYTES", len(raw) // 2)
    with pytest.raises(
        ExportError,
        match=r"would have 0\.0 GiB, but must stay below 2 GiB: export a smaller network",
    ):
        write_model(model)


@pytest.mark.slow
def test_a_converted_network_can_be_timed_in_int8() -> None:
    """The converter gives a tensor of the graph its own empty buffer, which is not a
    constant.
    """
    op = Op.parse("conv-h8-i3-o4-k3-s2-relu6")
    model = to_tflite(nn.Sequential(build(op), nn.Conv2d(4, 4, 1)), (1, 3, 8, 8))
    assert {graph_op.dtype for graph_op in graph_ops(quantize_int8_uncalibrated(model))} == {"INT8"}


def test_a_classifier_of_ordinary_size_is_written_inline() -> None:
    from hwnas.core.spaces import published
    from hwnas.nn.classifier import ClassificationNetwork

    arch = published("mobilenet_v2")
    quantised = quantize_int8_uncalibrated(write_tflite(ClassificationNetwork(arch)))
    assert len(quantised) > 3_000_000
    assert all(buffer.offset == 0 for buffer in buffers(quantised))
