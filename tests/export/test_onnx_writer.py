"""Our own files compared with the exporter's: the same operators, before and after
onnxruntime's optimisation, and the same numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hwnas import __version__
from hwnas.core.ops import Op
from hwnas.core.spaces import MACRO_SPACES, published
from hwnas.errors import ExportError
from hwnas.export.convert import onnx_file, to_onnx
from hwnas.export.onnx_writer import IR_VERSION, OPSET, write_onnx, write_op
from hwnas.nn.blocks import build
from hwnas.nn.classifier import ClassificationNetwork
from tests.export import test_spaces as spaces
from tests.export.detectors import images as detector_images
from tests.export.detectors import lively_network
from tests.export.test_tflite_writer import (
    NETWORKS,
    OPS,
    network_of,
    random_images,
    randomised,
    relative_error,
    run_torch,
)
from tests.nn.detectors import KINDS, Kind

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

POOLED = (
    "classifier-h7-i32-o10",
    "classifier-h1-i16-o10",
    "head-h7-i32-o48-hswish",
    "head-h1-i32-o48-relu",
)


@dataclass(frozen=True)
class Case:
    module: nn.Module
    written: bytes
    exported: bytes
    images_NHWC: np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module", params=[*OPS, *POOLED, *NETWORKS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    network = network_of(NETWORKS[request.param]) if request.param in NETWORKS else None
    op = network.arch.ops()[0] if network else Op.parse(request.param)
    module = network or randomised(build(op))
    path = tmp_path_factory.mktemp("onnx") / "exported.onnx"
    to_onnx(module, (1, op.in_ch, op.size, op.size), metadata={}, path=path)
    written = write_onnx(network) if network else write_op(op, module)
    return Case(module, written, path.read_bytes(), random_images(op.size, op.in_ch))


def run(model: bytes, images_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Outputs [N, ...], with the channels last if they are feature maps."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    output = np.concatenate(
        [session.run(None, {entry.name: image[None]})[0] for image in images_NCHW]
    )
    return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output


def nodes(model: bytes) -> list[tuple[Any, ...]]:
    """Each operator's domain, type, attributes and number of inputs, in order."""
    return [
        (
            node.domain,
            node.op_type,
            sorted((a.name, repr(onnx.helper.get_attribute_value(a))) for a in node.attribute),
            len(node.input),
        )
        for node in onnx.load_from_string(model).graph.node
    ]


def optimised(model: bytes, folder: Path) -> bytes:
    """The file after all optimisations of onnxruntime, even those for this CPU."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # no warning that the file is only for this CPU
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return (folder / "optimised.onnx").read_bytes()


def test_the_operators_are_those_of_the_exporter(case: Case) -> None:
    assert nodes(case.written) == nodes(case.exported)


def test_onnxruntime_optimises_both_files_to_the_same_operators(case: Case, tmp_path: Path) -> None:
    assert nodes(optimised(case.written, tmp_path)) == nodes(optimised(case.exported, tmp_path))


def test_the_outputs_are_those_of_the_exporter_and_of_pytorch(case: Case) -> None:
    written = run(case.written, case.images_NHWC)
    assert relative_error(written, run(case.exported, case.images_NHWC)) < 1e-6
    assert relative_error(written, run_torch(case.module, case.images_NHWC)) < 1e-6


def test_the_file_declares_what_the_exporters_does(case: Case) -> None:
    """Versions, names and shapes of inputs and outputs, and the number of values in
    between, whose shapes the checker compares with its own.
    """
    written, exported = (onnx.load_from_string(model) for model in (case.written, case.exported))
    onnx.checker.check_model(written, full_check=True)
    assert (written.ir_version, written.opset_import[0].version) == (IR_VERSION, OPSET)
    assert (written.producer_name, written.producer_version) == ("hwnas", __version__)
    assert list(written.graph.input) == list(exported.graph.input)
    assert list(written.graph.output) == list(exported.graph.output)
    assert len(written.graph.value_info) == len(written.graph.node) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_have_the_operators_and_outputs_of_the_exporters(
    kind: Kind, tmp_path: Path
) -> None:
    network = lively_network(kind)
    names = ("logits", "codes")
    exported = onnx_file(network, (1, 3, 64, 64), metadata={}, output_names=names)
    written = write_onnx(network)
    assert operators(optimised(written, tmp_path)) == operators(optimised(exported, tmp_path))
    with torch.no_grad():
        torch_outputs = network(detector_images())
    for name, by_torch in zip(names, torch_outputs, strict=True):
        ours = run_output(written, name)
        assert relative_error(ours, run_output(exported, name)) < 2e-6
        assert relative_error(ours, by_torch.numpy()) < 2e-6


def operators(model: bytes) -> Counter[str]:
    """How often each operator occurs. Their order differs, as the exporter visits the
    maps of a detector in another one.
    """
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


def run_output(model: bytes, name: str) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = [session.run([name], {"image": x[None].numpy()})[0] for x in detector_images()]
    return np.concatenate(rows)


@pytest.mark.parametrize("name", MACRO_SPACES)
def test_networks_of_every_space_compute_what_pytorch_does(name: str) -> None:
    network = spaces.network_of(name, "random")
    outputs_NC = run(write_onnx(network), spaces.images(network).permute(0, 2, 3, 1).numpy())
    spaces.assert_same(outputs_NC, network)


def test_names_are_unique() -> None:
    graph = onnx.load_from_string(
        write_onnx(ClassificationNetwork(published("mobilenet_v2", resolution=32)))
    ).graph
    names = [
        *(output for node in graph.node for output in node.output),
        *(tensor.name for tensor in graph.initializer),
    ]
    assert len(set(names)) == len(names) > 150


def test_the_same_weights_give_the_same_bytes_whatever_the_mode() -> None:
    network = network_of(NETWORKS["network"])
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    content = write_onnx(network)
    assert write_onnx(network.train()) == content
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_module_of_another_op_is_refused() -> None:
    with pytest.raises(ExportError, match=r"\[9, 8\] in the module, but \[8, 8\] in the op"):
        write_op(Op.parse("classifier-h8-i8-o8"), build(Op.parse("classifier-h8-i8-o9")))
    with pytest.raises(ExportError, match=r"Block has no layers\.se"):
        write_op(
            Op.parse("mbconv-h8-i8-o8-m16-k3-q4-relu"),
            build(Op.parse("mbconv-h8-i8-o8-m16-k3-relu")),
        )
