"""What follows the network inside a detector's ONNX files, with standard operators:
scores and boxes of all anchors, and NMS.

NMS are thresholds, ``NonMaxSuppression`` per class, the best of all. What is chosen is
what ``post_processing.post_process`` chooses: ``NonMaxSuppression`` itself has no limit
on candidates, so scores below the last candidate's become 0 first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwnas.core.detector import PostProcessing
from hwnas.errors import ExportError
from hwnas.export.detector import CODE_SCALES, LARGEST_GROWTH, centres, columns
from hwnas.export.names import CHOSEN, DETECTIONS, IMAGE
from hwnas.export.onnx_writer import OnnxWriter
from hwnas.export.post_processing import BOX, NMS_COLUMNS
from hwnas.nn.detector import DetectionNetwork, detector_of


def decoded(network: DetectionNetwork, metadata: Mapping[str, str]) -> bytes:
    """The file with one output, ``detections`` float32 [1, anchors, 4 + classes], as
    ``detector.Decoded`` has it.

    ``metadata`` goes into its ``metadata_props``.
    """
    graph = OnnxWriter(network.arch.in_channels, network.arch.resolution)
    logits, codes = graph.detector(IMAGE, network)
    graph.scope = "decode."
    boxes, scores = _boxes(graph, codes, network), _scores(graph, logits, network)
    anchors = graph.shape(codes)[1]
    rows = graph.operator("Concat", "rows", [boxes, scores], (1, anchors, columns(network)), axis=2)
    return graph.pack({DETECTIONS: rows}, metadata)


def _scores(graph: OnnxWriter, logits: str, network: DetectionNetwork) -> str:
    """[1, anchors, classes]."""
    classes, shape = network.arch.classes, graph.shape(logits)
    if detector_of(network.arch).scores == "sigmoid":
        of_classes = _part(graph, "classes", logits, 1, classes)
        return graph.operator("Sigmoid", "scores", [of_classes], graph.shape(of_classes))
    return _part(
        graph, "scores", graph.operator("Softmax", "softmax", [logits], shape, axis=2), 1, classes
    )


def _boxes(graph: OnnxWriter, codes: str, network: DetectionNetwork) -> str:
    """x1, y1, x2, y2 [1, anchors, 4] in pixels, cut off at the image's edges."""
    centres_A4: npt.NDArray[np.float64] = centres(network).double().numpy()
    anchors, sides = centres_A4[None, :, :2], centres_A4[None, :, 2:]

    def apply(code: str, name: str, x: str, values: npt.NDArray[np.float64]) -> str:
        return graph.operator(
            code, name, [x, graph.floats(f"{name}.value", values)], graph.shape(x)
        )

    centre = apply(
        "Mul", "shift", _part(graph, "centre.codes", codes, 0, 2), sides / CODE_SCALES[:2]
    )
    centre = apply("Add", "centre", centre, anchors)
    growth = apply(
        "Mul", "growth", _part(graph, "size.codes", codes, 2, 2), 1 / np.array(CODE_SCALES[2:])
    )
    growth = apply("Min", "growth.limited", growth, np.array(LARGEST_GROWTH))
    half = graph.operator("Exp", "growth.factor", [growth], graph.shape(growth))
    half = apply("Mul", "half", half, sides / 2)
    corners = [
        graph.operator(code, name, [centre, half], graph.shape(half))
        for code, name in (("Sub", "low"), ("Add", "high"))
    ]
    boxes = graph.operator("Concat", "boxes", corners, graph.shape(codes), axis=2)
    edges = [
        graph.floats(f"edge.{name}", np.array(value))
        for name, value in (("low", 0.0), ("high", network.arch.resolution))
    ]
    return graph.operator("Clip", "boxes.inside", [boxes, *edges], graph.shape(boxes))


def _part(graph: OnnxWriter, name: str, x: str, first: int, width: int) -> str:
    """Some columns of rows [1, anchors, columns]."""
    batch, anchors, _ = graph.shape(x)
    return graph.slice(
        name,
        x,
        (batch, anchors, width),
        {"starts": (first,), "ends": (first + width,), "axes": (2,)},
    )


def with_nms(model: bytes, config: PostProcessing) -> bytes:
    """The file whose output ``chosen`` is float32 [1, D, 6]: x1, y1, x2, y2, score,
    class; D = ``config.detections``.

    ``model`` is the file with the output ``detections`` [1, anchors, 4 + classes]. Rows
    are sorted by score; those after the last detection are 0.
    """
    parsed = onnx.load_model_from_string(model)
    [output] = parsed.graph.output
    _, anchors, columns = (dim.dim_value for dim in output.type.tensor_type.shape.dim)
    tail = _Tail()
    boxes, scores = tail.split(output.name, columns)
    candidates = tail.candidates(scores, min(config.candidates, anchors))
    chosen = tail.nms(boxes, candidates, config)
    rows = tail.rows(boxes, scores, chosen)
    tail.best(rows, config.detections)
    parsed.graph.node.extend(tail.nodes)
    parsed.graph.initializer.extend(tail.constants)
    parsed.graph.value_info.append(output)
    parsed.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(
            CHOSEN, TensorProto.FLOAT, [1, config.detections, NMS_COLUMNS]
        )
    )
    try:
        onnx.checker.check_model(parsed, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The graph with NMS is not valid ONNX: {error}") from error
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content


def nms_at(model: bytes, min_score: float) -> bytes:
    """A file of ``with_nms`` with another threshold of scores: for timing."""
    parsed = onnx.load_model_from_string(model)
    [threshold] = [
        constant for constant in parsed.graph.initializer if constant.name == "nms.min_score"
    ]
    threshold.CopyFrom(numpy_helper.from_array(np.array([min_score], np.float32), threshold.name))
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content


class _Tail:
    """Operators under construction; values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def _operator(self, code: str, name: str, *inputs: str, **options: int | list[int]) -> str:
        """Add an operator, and return its output."""
        output = f"nms.{name}"
        self.nodes.append(helper.make_node(code, list(inputs), [output], output, **options))
        return output

    def _top(self, name: str, x: str, count: int, axis: int) -> tuple[str, str]:
        """The ``count`` largest values, falling, and their positions."""
        outputs = (f"nms.{name}.values", f"nms.{name}.positions")
        inputs = [x, self._constant(f"{name}.count", [count])]
        self.nodes.append(
            helper.make_node("TopK", inputs, outputs, f"nms.{name}", axis=axis, largest=1, sorted=1)
        )
        return outputs

    def _constant(
        self, name: str, values: list[int] | int | list[float] | float | np.ndarray
    ) -> str:
        array = np.array(values)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        self.constants.append(numpy_helper.from_array(array, f"nms.{name}"))
        return f"nms.{name}"

    def _columns(self, name: str, x: str, axis: int, first: int, end: int) -> str:
        bounds = [
            self._constant(f"{name}.{part}", [value])
            for part, value in (("first", first), ("end", end), ("axis", axis))
        ]
        return self._operator("Slice", name, x, *bounds)

    def split(self, x: str, columns: int) -> tuple[str, str]:
        """Boxes [1, A, 4] and scores [1, C, A]."""
        scores = self._columns("columns", x, 2, BOX, columns)
        return self._columns("boxes", x, 2, 0, BOX), self._operator(
            "Transpose", "scores", scores, perm=[0, 2, 1]
        )

    def candidates(self, scores: str, count: int) -> str:
        """Scores [1, C, A], 0 where they are not among the ``count`` best of their class."""
        best, _ = self._top("top", scores, count, 2)
        last = self._operator(
            "ReduceMin", "last", best, self._constant("last.axis", [2]), keepdims=1
        )
        among = self._operator("GreaterOrEqual", "among", scores, last)
        return self._operator("Where", "candidates", among, scores, self._constant("zero", 0.0))

    def nms(self, boxes: str, scores: str, config: PostProcessing) -> str:
        """What is chosen, int64 [S, 3]: image, class, anchor."""
        limits = [
            self._constant("per_class", [config.detections]),
            self._constant("iou", [config.nms_iou]),
            self._constant("min_score", [config.min_score]),
        ]
        return self._operator("NonMaxSuppression", "chosen", boxes, scores, *limits)

    def rows(self, boxes: str, scores: str, chosen: str) -> str:
        """x1, y1, x2, y2, score, class [S, 6]."""
        axis, both = self._constant("image", [0]), self._columns("class_anchor", chosen, 1, 1, 3)
        anchor = self._operator(
            "Gather", "anchor", chosen, self._constant("anchor.column", 2), axis=1
        )
        corners = self._operator(
            "Gather",
            "corners",
            self._operator("Squeeze", "image.boxes", boxes, axis),
            anchor,
            axis=0,
        )
        score = self._operator(
            "GatherND", "score", self._operator("Squeeze", "image.scores", scores, axis), both
        )
        column = self._operator("Unsqueeze", "score.column", score, self._constant("column", [1]))
        label = self._operator(
            "Cast", "class", self._columns("label", both, 1, 0, 1), to=TensorProto.FLOAT
        )
        return self._operator("Concat", "rows", corners, column, label, axis=1)

    def best(self, rows: str, count: int) -> None:
        """The ``count`` best rows, filled up with zeros: ``chosen`` [1, count, 6]."""
        filled = self._operator(
            "Concat", "filled", rows, self._constant("fill", np.zeros((count, NMS_COLUMNS))), axis=0
        )
        score = self._operator(
            "Gather", "filled.score", filled, self._constant("score.number", BOX), axis=1
        )
        _, order = self._top("order", score, count, 0)
        sorted_ = self._operator("Gather", "sorted", filled, order, axis=0)
        self.nodes.append(helper.make_node("Unsqueeze", [sorted_, "nms.image"], [CHOSEN], CHOSEN))
