"""Files that are only timed: they have trained networks' graphs, and are cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from hwnas.core.ops import Op
from hwnas.errors import ConfigError
from hwnas.export.quantization import quantize_int8, quantize_int8_uncalibrated
from hwnas.export.tflite_file import graph_ops
from hwnas.export.tflite_writer import write_op, write_tflite
from hwnas.export.timing import timing_file
from hwnas.nn.blocks import build
from tests.export.test_tflite_writer import (
    NETWORKS,
    OPS,
    interpreter_of,
    network_of,
    random_images,
    randomised,
)

KINDS = (("litert", "fp32"), ("litert", "int8"), ("onnxruntime", "fp32"))
BLOCK, CLASSIFIER = (
    Op.parse("mbconv-h8-i8-o8-m24-k3-q8-hswish-id"),
    Op.parse("classifier-h8-i8-o10"),
)


@dataclass(frozen=True)
class Case:
    assumed: bytes
    calibrated: bytes


@pytest.fixture(
    scope="module", params=[*OPS, "classifier-h7-i32-o10", "head-h7-i32-o48-hswish", *NETWORKS]
)
def case(request: pytest.FixtureRequest) -> Case:
    if request.param in NETWORKS:
        network = network_of(NETWORKS[request.param])
        model, images_NHWC = write_tflite(network), random_images(network.arch.resolution, 3)
    else:
        op = Op.parse(request.param)
        model, images_NHWC = write_op(op, randomised(build(op))), random_images(op.size, op.in_ch)
    return Case(quantize_int8_uncalibrated(model), quantize_int8(model, [images_NHWC]))


def graph_of(model: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(bytearray(model), 0)


def test_assumed_ranges_change_no_operator_no_shape_and_no_weight(case: Case) -> None:
    assumed, calibrated = graph_of(case.assumed), graph_of(case.calibrated)
    assert graph_ops(case.assumed) == graph_ops(case.calibrated)
    tensors = list(zip(assumed.subgraphs[0].tensors, calibrated.subgraphs[0].tensors, strict=True))
    assert all(
        (a.name, list(a.shape), a.type) == (c.name, list(c.shape), c.type) for a, c in tensors
    )
    weights = [(a, c) for a, c in tensors if a.name.endswith(b".weight")]
    assert weights and all(
        np.array_equal(a.quantization.scale, c.quantization.scale) for a, c in weights
    )
    assert all(
        np.array_equal(assumed.buffers[a.buffer].data, calibrated.buffers[c.buffer].data)
        for a, c in weights
    )


def test_activations_are_assumed_between_minus_one_and_one(case: Case) -> None:
    scale, _ = interpreter_of(case.assumed).get_input_details()[0]["quantization"]
    assert scale == pytest.approx(2 / 255)


def test_xnnpack_takes_the_same_part_of_both(case: Case) -> None:
    """It takes all of most blocks, but leaves int8 HARD_SWISH to other kernels."""

    def nodes(model: bytes) -> list[tuple[str, int]]:
        return [
            (node["op_name"], len(node["inputs"]))
            for node in interpreter_of(model)._get_ops_details()
        ]

    assert nodes(case.assumed) == nodes(case.calibrated)


@pytest.mark.parametrize(("runtime", "dtype"), KINDS)
@pytest.mark.parametrize(
    "ops", [(BLOCK,), (CLASSIFIER,), (BLOCK, CLASSIFIER)], ids=["block", "classifier", "network"]
)
def test_a_file_is_written_once_and_has_its_ops(
    runtime: str, dtype: str, ops: tuple[Op, ...]
) -> None:
    path = timing_file(ops, runtime, dtype)
    before = path.stat()
    assert timing_file(ops, runtime, dtype) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.name.startswith(ops[0].key if len(ops) == 1 else "net-")
    outputs = (1, 10) if ops[-1] is CLASSIFIER else (1, 8, 8, 8)
    assert ends(path) == ((1, 8, 8, 8), outputs, "int8" if dtype == "int8" else "float32")


def swapped(path: Path, with_digest: bool) -> None:
    other = timing_file((CLASSIFIER,), "litert", "fp32", path.parents[1])
    path.write_bytes(other.read_bytes())
    if with_digest:
        digest = other.with_name(f"{other.name}.sha256")
        path.with_name(f"{path.name}.sha256").write_bytes(digest.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
        lambda path: swapped(path, with_digest=False),
        lambda path: swapped(path, with_digest=True),
        lambda path: path.with_name(f"{path.name}.sha256").unlink(),
    ],
    ids=["empty", "cut off", "flipped", "of another op", "of another op, with its digest", "old"],
)
def test_a_damaged_file_is_made_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = timing_file((BLOCK,), "litert", "fp32", tmp_path)
    content = path.read_bytes()
    damage(path)
    assert timing_file((BLOCK,), "litert", "fp32", tmp_path).read_bytes() == content


def test_the_folders_of_the_cache_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    path = timing_file((CLASSIFIER,), "litert", "fp32")
    for folder in (path.parent, tmp_path / "cache"):
        assert folder.stat().st_mode & 0o777 == 0o700


def ends(path: Path) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The input's shape, the output's shape, and the type of both."""
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        shapes = (
            tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
            for value in (graph.input[0], graph.output[0])
        )
        assert {
            value.type.tensor_type.elem_type for value in (graph.input[0], graph.output[0])
        } == {onnx.TensorProto.FLOAT}
        return (*shapes, "float32")  # type: ignore[return-value]
    interpreter = Interpreter(str(path))
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    assert entry["dtype"] == exit_["dtype"]
    return (
        tuple(entry["shape"].tolist()),
        tuple(exit_["shape"].tolist()),
        np.dtype(entry["dtype"]).name,
    )


def test_chains_in_another_order_have_another_file() -> None:
    other = Op.parse("conv-h8-i8-o8-k3-relu")
    assert timing_file((BLOCK, other), "litert", "fp32") != timing_file(
        (other, BLOCK), "litert", "fp32"
    )


def test_onnxruntime_in_int8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device\.dtype = 'int8' is not supported"):
        timing_file((BLOCK,), "onnxruntime", "int8")
