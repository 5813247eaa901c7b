"""Our own files compared with the converter's: the same operators, the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from hwnas import __version__
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.spaces import published
from hwnas.errors import ExportError
from hwnas.export.convert import to_tflite
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_file import graph_ops
from hwnas.export.tflite_writer import write_op, write_tflite
from hwnas.nn.blocks import build, initialise
from hwnas.nn.classifier import ClassificationNetwork

pytestmark = pytest.mark.slow

M = TypeVar("M", bound=nn.Module)

OPS = (
    "conv-h32-i3-o16-k3-s2-relu6",  # stem: an even image at stride 2, so PAD
    "conv-h7-i32-o64-relu",  # head
    "conv-h8-i1-o8-k3-relu",  # one input channel: a depthwise convolution to TFLite
    "conv-h8-i16-o32-k3-g4-hswish",
    "dsconv-h7-i16-o8-k5-s2-relu6",  # an odd image at stride 2: SAME pads as PyTorch does
    "mbconv-h14-i16-o16-m48-k3-relu6-id",
    "mbconv-h28-i16-o24-m48-k7-s2-q8-relu",
    "mbconv-h7-i16-o16-m32-k5-q8-hswish-id",
    "mbconv-h1-i8-o8-m16-k3-q4-hswish",  # nothing to pool
    "mbconv-h14-i16-o24-m48-k5-s2-q16-hsig-hswish",  # a gate without an operator of its own
    "mbconv-h8-i8-o8-m24-k3-g2-relu-id",  # a channel shuffle
    "dsconv-h7-i12-o24-k3-g4-relu",
    "conv-h8-i6-o8-k3-silu",
    "conv-h8-i8-o8-k3-relu-id",
    "fused-h8-i8-o16-m32-k3-s2-q8-qact-silu",
    "uib-h8-i8-o8-m16-b3-k5-relu-id",
    "uib-h8-i8-o16-m16-b3-s2-relu",
)
OPS_OF_CELLS = (
    "preconv-h8-i6-o8-k3-s2-relu",
    "sepconv-h8-i6-o6-k5-s2-relu",
    "dilconv-h8-i6-o6-k3-relu",
    "dilconv-h8-i6-o6-k5-s2-relu",
    "resreduce-h8-i6-o8-k3-s2-relu",
)
LEANER = {
    # our operators, where the converter uses more, or slower ones
    # two STABLEHLO_REDUCE_WINDOW and DIV
    "avgpool-h8-i6-o6-k3-s2": ["PAD", "AVERAGE_POOL_2D", "MUL"],
    # PADV2, which XNNPACK leaves
    "maxpool-h8-i6-o6-k3-s2": ["SLICE", "CONCATENATION", "SLICE", "CONCATENATION", "MAX_POOL_2D"],
    "maxpool-h8-i6-o6-k3-bn": ["MAX_POOL_2D", "MUL", "ADD"],  # SUB instead of ADD
    # two SLICE, and four for the BN
    "facreduce-h8-i6-o8-s2-relu": ["RELU", "CONV_2D", "SLICE", "CONV_2D", "CONCATENATION"],
    "mbconv-h8-i8-o8-m16-k3-c3-relu": [
        # two TRANSPOSE more
        *(
            "CONV_2D",
            "DEPTHWISE_CONV_2D",
            "CONV_2D",
            "MEAN",
            "RESHAPE",
            "CONV_2D",
            "RESHAPE",
            "LOGISTIC",
            "MUL",
        ),
    ],
    "head-h7-i32-o48-bn-relu": ["MEAN", "CONV_2D"],
}
NETWORKS = {
    "network": (
        "conv-h28-i3-o8-k3-s2-hswish",
        "dsconv-h14-i8-o8-k3-relu-id",
        "mbconv-h14-i8-o16-m24-k5-s2-q8-hswish",
        "conv-h7-i16-o32-relu6",
        "classifier-h7-i32-o10",
    ),
    "network with a pooled head": (
        "conv-h28-i3-o8-k3-s2-relu",
        "mbconv-h14-i8-o16-m24-k3-s2-g2-q8-hsig-relu",
        "head-h7-i16-o32-hswish",
        "classifier-h1-i32-o10",
    ),
    "network that ends at 1 px": ("conv-h2-i3-o16-k3-s2-relu6", "classifier-h1-i16-o10"),
}


@dataclass(frozen=True)
class Case:
    module: nn.Module
    written: bytes
    converted: bytes
    images: np.ndarray[Any, np.dtype[np.float32]]


def randomised(module: M) -> M:
    """As after training: with the initial statistics and biases, errors in half of what
    is folded would go unnoticed.
    """
    generator = torch.Generator().manual_seed(0)
    initialise(module, generator)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5, generator=generator)
            if isinstance(part, nn.Linear):
                part.weight.normal_(0, 0.3, generator=generator)
            if getattr(part, "bias", None) is not None:
                part.bias.normal_(0, 0.3, generator=generator)
    return module.eval()


def random_images(
    size: int, channels: int, count: int = 3
) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (
        np.random.default_rng(0).standard_normal((count, size, size, channels)).astype(np.float32)
    )


def network_of(keys: tuple[str, ...]) -> ClassificationNetwork:
    return randomised(
        ClassificationNetwork(
            Architecture(name="small", blocks=tuple(Op.parse(key) for key in keys))
        )
    )


@pytest.fixture(scope="module", params=[*OPS, *OPS_OF_CELLS, *NETWORKS])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param in NETWORKS:
        network = network_of(NETWORKS[request.param])
        size = network.arch.resolution
        return Case(
            network,
            write_tflite(network),
            to_tflite(network, (1, 3, size, size)),
            random_images(size, 3),
        )
    op = Op.parse(request.param)
    module = randomised(build(op))
    converted = to_tflite(module, (1, op.in_ch, op.size, op.size))
    return Case(module, write_op(op, module), converted, random_images(op.size, op.in_ch))


def run_torch(module: nn.Module, images_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        output = module(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2))
    return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()


def interpreter_of(model: bytes) -> Interpreter:
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def run_litert(model: bytes, images_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    interpreter = interpreter_of(model)
    outputs = []
    for image in images_NHWC:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return np.concatenate(outputs)


def relative_error(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    assert got.shape == wanted.shape
    assert wanted.std() > 0.1, "with smaller outputs there is nothing to compare"
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def test_the_operators_are_those_of_the_converter(case: Case) -> None:
    assert graph_ops(case.written) == graph_ops(case.converted)


def test_the_operators_have_the_options_and_versions_of_the_converter(case: Case) -> None:
    assert operators(case.written) == operators(case.converted)


def test_the_outputs_are_those_of_the_converter_and_of_pytorch(case: Case) -> None:
    written = run_litert(case.written, case.images)
    assert relative_error(written, run_litert(case.converted, case.images)) < 1e-6
    assert relative_error(written, run_torch(case.module, case.images)) < 1e-6


def test_xnnpack_takes_the_whole_graph(case: Case) -> None:
    interpreter = interpreter_of(case.written)
    delegates = [node for node in interpreter._get_ops_details() if node["op_name"] == "DELEGATE"]
    assert len(delegates) == 1
    assert interpreter.get_input_details()[0]["index"] in delegates[0]["inputs"]
    assert interpreter.get_output_details()[0]["index"] in delegates[0]["outputs"]


def test_the_quantizer_gives_the_same_for_both_files(case: Case) -> None:
    written, converted = (
        quantize_int8(model, [case.images]) for model in (case.written, case.converted)
    )
    assert graph_ops(written) == graph_ops(converted)
    images_int8 = quantised_images(written, case.images)
    difference = run_litert(written, images_int8).astype(int) - run_litert(
        converted, images_int8
    ).astype(int)
    assert np.abs(difference).max() <= 1, (
        "the folding differs in the last bit, which may change a rounding"
    )


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("classifier-h7-i32-o10", ["MEAN", "FULLY_CONNECTED"]),
        ("head-h7-i32-o48-hswish", ["MEAN", "CONV_2D", "HARD_SWISH"]),
    ],
)
def test_a_standalone_op_with_pooling_is_written_as_at_the_end_of_a_network(
    key: str, names: list[str]
) -> None:
    op = Op.parse(key)
    module = randomised(build(op))
    written = write_op(op, module)
    assert [node.name for node in graph_ops(written)] == names
    converted = to_tflite(module, (1, 32, 7, 7))
    assert "TRANSPOSE" in [node.name for node in graph_ops(converted)], (
        "the converter got better: add this op to OPS"
    )
    images_NHWC = random_images(7, 32)
    assert (
        relative_error(run_litert(written, images_NHWC), run_litert(converted, images_NHWC)) < 1e-6
    )


@pytest.mark.parametrize("key", LEANER)
def test_leaner_files_than_the_converters_give_the_same_numbers(key: str) -> None:
    op = Op.parse(key)
    module = randomised(build(op))
    written, converted = write_op(op, module), to_tflite(module, (1, op.in_ch, op.size, op.size))
    assert [node.name for node in graph_ops(written)] == LEANER[key]
    assert graph_ops(written) != graph_ops(converted), (
        "the converter got better: add this op to OPS"
    )
    images_NHWC = random_images(op.size, op.in_ch)
    assert (
        relative_error(run_litert(written, images_NHWC), run_litert(converted, images_NHWC)) < 1e-6
    )
    assert [node["op_name"] for node in interpreter_of(written)._get_ops_details()].count(
        "DELEGATE"
    ) == 1


def test_files_name_their_maker_their_inputs_and_their_outputs() -> None:
    op = Op.parse("conv-h8-i4-o4-k3-relu")
    for model, names in (
        (write_op(op, build(op)), ("input", "output")),
        (write_tflite(network_of(NETWORKS["network"])), ("image", "logits")),
    ):
        assert schema.Model.GetRootAs(model).Description().decode() == f"hwnas {__version__}"
        interpreter = interpreter_of(model)
        assert interpreter.get_signature_list() == {
            "serving_default": {"inputs": [names[0]], "outputs": [names[1]]}
        }
        assert (
            interpreter.get_input_details()[0]["name"],
            interpreter.get_output_details()[0]["name"],
        ) == names


def test_weights_are_aligned_to_16_bytes() -> None:
    content = write_tflite(network_of(NETWORKS["network"]))
    model = schema.Model.GetRootAs(content)
    start = np.frombuffer(content, np.uint8).ctypes.data
    arrays = [model.Buffers(index).DataAsNumpy() for index in range(1, model.BuffersLength())]
    assert len(arrays) > 10
    assert {(array.ctypes.data - start) % 16 for array in arrays} == {0}


def test_tensor_names_are_unique() -> None:
    graph = schema.Model.GetRootAs(
        write_tflite(ClassificationNetwork(published("mobilenet_v2", resolution=32)))
    ).Subgraphs(0)
    names = [graph.Tensors(index).Name() for index in range(graph.TensorsLength())]
    assert len(set(names)) == len(names) > 150


def test_the_same_weights_give_the_same_bytes_whatever_the_mode() -> None:
    network = network_of(NETWORKS["network"])
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    content = write_tflite(network)
    assert write_tflite(network.train()) == content
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        (
            "conv-h8-i8-o8-k3-relu",
            "conv-h8-i8-o8-k5-relu",
            r"\[8, 8, 5, 5\] in the module, but \[8, 8, 3, 3\] in the op",
        ),
        ("mbconv-h8-i8-o8-m16-k3-relu", "dsconv-h8-i8-o8-k3-relu", "Block has no layers.expand"),
        (
            "mbconv-h8-i8-o8-m16-k3-q4-relu",
            "mbconv-h8-i8-o8-m16-k3-relu",
            "Block has no layers.se",
        ),
        (
            "classifier-h8-i8-o8",
            "classifier-h8-i8-o9",
            r"\[9, 8\] in the module, but \[8, 8\] in the op",
        ),
        ("classifier-h8-i8-o8", "conv-h8-i8-o8", "Block has no linear"),
    ],
)
def test_a_module_of_another_op_is_refused(key: str, other: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        write_op(Op.parse(key), build(Op.parse(other)))


def quantised_images(
    model: bytes, images_NHWC: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.int8]]:
    scale, zero_point = interpreter_of(model).get_input_details()[0]["quantization"]
    return np.clip(np.round(images_NHWC / scale) + zero_point, -128, 127).astype(np.int8)


def operators(content: bytes) -> list[tuple[Any, ...]]:
    """Each operator's code, version, options, and shapes of inputs and outputs."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
    graph = model.subgraphs[0]
    rows = []
    for node in graph.operators:
        code = model.operatorCodes[node.opcodeIndex]
        options = dict(vars(node.builtinOptions)) if node.builtinOptions else {}
        shapes = [
            tuple(int(size) for size in graph.tensors[index].shape)
            for index in (*node.inputs, *node.outputs)
        ]
        rows.append((code.builtinCode, code.deprecatedBuiltinCode, code.version, options, shapes))
    return rows
