"""The part after the network in a detector's ONNX files, made of standard operators:
scores and boxes of all anchors, and NMS.

NMS consists of thresholds, ``NonMaxSuppression`` per class, and a selection of the best
detections of all classes. The result is that of ``post_processing.post_process``.
``NonMaxSuppression`` has no limit on candidates, so scores below that of the last
candidate are set to 0 first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwnas.core.detection import detector_of
from hwnas.core.detector import PostProcessing
from hwnas.errors import ExportError
from hwnas.export.detector import LARGEST_GROWTH, centres, columns
from hwnas.export.names import CHOSEN, DETECTIONS, IMAGE
from hwnas.export.onnx_writer import OnnxWriter
from hwnas.export.post_processing import BOX, NMS_COLUMNS
from hwnas.nn.detector import DetectionNetwork


def add_decoding(network: DetectionNetwork, metadata: Mapping[str, str]) -> bytes:
    """Write a file with one output, ``detections`` float32 [1, anchors, 4 + classes],
    as ``detector.Decoded`` defines it.

    ``metadata`` goes into the file's ``metadata_props``.
    """
    graph = OnnxWriter(network.arch.in_channels, network.arch.size)
    logits, codes = graph.detector(IMAGE, network)
    graph.scope = "decode."
    boxes = _boxes(graph, codes, network)
    scores = _scores(graph, logits, network)
    anchors = graph.shape(codes)[1]
    rows = graph.operator("Concat", "rows", [boxes, scores], (1, anchors, columns(network)), axis=2)
    return graph.pack({DETECTIONS: rows}, metadata)


def _scores(graph: OnnxWriter, logits: str, network: DetectionNetwork) -> str:
    """Scores [1, anchors, classes], without the background."""
    detector = detector_of(network.arch)
    classes = detector.classes
    if detector.scores == "sigmoid":
        of_classes = logits
        if detector.background:
            of_classes = _part(graph, "classes", logits, detector.background, classes)
        return graph.operator("Sigmoid", "scores", [of_classes], graph.shape(of_classes))
    # the softmax needs the background, so it is dropped only afterwards
    shares = graph.operator("Softmax", "softmax", [logits], graph.shape(logits), axis=2)
    return _part(graph, "scores", shares, 1, classes)


def _boxes(graph: OnnxWriter, codes: str, network: DetectionNetwork) -> str:
    """Boxes [1, anchors, 4]: x1, y1, x2, y2 in pixels, clipped to the image."""
    centres_A4: npt.NDArray[np.float64] = centres(network).double().numpy()
    scales = detector_of(network.arch).code_scales
    anchors = centres_A4[None, :, :2]
    sides = centres_A4[None, :, 2:]

    def apply(code: str, name: str, x: str, values: npt.NDArray[np.float64]) -> str:
        constant = graph.floats(f"{name}.value", values)
        return graph.operator(code, name, [x, constant], graph.shape(x))

    centre_codes = _part(graph, "centre.codes", codes, 0, 2)
    centre = apply("Mul", "shift", centre_codes, sides / scales[:2])
    centre = apply("Add", "centre", centre, anchors)

    size_codes = _part(graph, "size.codes", codes, 2, 2)
    growth = apply("Mul", "growth", size_codes, 1 / np.array(scales[2:]))
    growth = apply("Min", "growth.limited", growth, np.array(LARGEST_GROWTH))
    half = graph.operator("Exp", "growth.factor", [growth], graph.shape(growth))
    half = apply("Mul", "half", half, sides / 2)

    low = graph.operator("Sub", "low", [centre, half], graph.shape(half))
    high = graph.operator("Add", "high", [centre, half], graph.shape(half))
    boxes = graph.operator("Concat", "boxes", [low, high], graph.shape(codes), axis=2)
    height, width = network.arch.size_HW
    first_edge = graph.floats("edge.low", np.array(0.0))
    if height != width:
        # Clip takes single numbers only
        boxes = graph.operator("Clip", "boxes.low", [boxes, first_edge], graph.shape(boxes))
        last_edges = graph.floats("edges.high", np.array([width, height, width, height], float))
        inputs = [boxes, last_edges]
        return graph.operator("Min", "boxes.inside", inputs, graph.shape(boxes))
    last_edge = graph.floats("edge.high", np.array(height))
    return graph.operator(
        "Clip", "boxes.inside", [boxes, first_edge, last_edge], graph.shape(boxes)
    )


def _part(graph: OnnxWriter, name: str, x: str, first: int, width: int) -> str:
    """The columns ``first`` to ``first + width`` of rows [1, anchors, columns]."""
    batch, anchors, _ = graph.shape(x)
    bounds: dict[str, tuple[int, ...]] = {
        "starts": (first,),
        "ends": (first + width,),
        "axes": (2,),
    }
    return graph.slice(name, x, (batch, anchors, width), bounds)


def with_nms(model: bytes, config: PostProcessing) -> bytes:
    """Append NMS to a file whose output is ``detections`` [1, anchors, 4 + classes].

    The new output ``chosen`` is float32 [1, D, 6]: x1, y1, x2, y2, score, class, with
    D = ``config.detections``. Rows are sorted by score. Rows after the last detection
    are 0. Raises ExportError if the result is not valid ONNX.
    """
    parsed = onnx.load_model_from_string(model)
    [output] = parsed.graph.output
    _, anchors, columns = (dim.dim_value for dim in output.type.tensor_type.shape.dim)
    tail = _Tail()
    boxes, scores = tail.split(output.name, columns)
    # TopK fails if it is asked for more values than there are anchors
    candidates = tail.candidates(scores, min(config.candidates, anchors))
    chosen = tail.nms(boxes, candidates, config)
    rows = tail.rows(boxes, scores, chosen)
    tail.best(rows, config.detections)
    parsed.graph.node.extend(tail.nodes)
    parsed.graph.initializer.extend(tail.constants)
    # the former output becomes an intermediate value, whose shape the checker compares
    parsed.graph.value_info.append(output)
    shape = [1, config.detections, NMS_COLUMNS]
    parsed.graph.output[0].CopyFrom(helper.make_tensor_value_info(CHOSEN, TensorProto.FLOAT, shape))
    try:
        onnx.checker.check_model(parsed, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The graph with NMS is not valid ONNX: {error}") from error
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content


def nms_at(model: bytes, min_score: float) -> bytes:
    """A file of ``with_nms`` with another score threshold, for timing."""
    parsed = onnx.load_model_from_string(model)
    [threshold] = [
        constant for constant in parsed.graph.initializer if constant.name == "nms.min_score"
    ]
    threshold.CopyFrom(numpy_helper.from_array(np.array([min_score], np.float32), threshold.name))
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content


class _Tail:
    """The operators of NMS under construction. Values are referred to by
    their names.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def _operator(self, code: str, name: str, *inputs: str, **options: int | list[int]) -> str:
        """Add an operator, and return its output."""
        output = f"nms.{name}"
        self.nodes.append(helper.make_node(code, list(inputs), [output], output, **options))
        return output

    def _top(self, name: str, x: str, count: int, axis: int) -> tuple[str, str]:
        """The ``count`` largest values in descending order, and their positions."""
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
        # the types that ONNX requires here: float32 limits, int64 counts and axes
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        self.constants.append(numpy_helper.from_array(array, f"nms.{name}"))
        return f"nms.{name}"

    def _columns(self, name: str, x: str, axis: int, first: int, end: int) -> str:
        """The columns ``first`` to ``end`` along an axis."""
        starts = self._constant(f"{name}.first", [first])
        ends = self._constant(f"{name}.end", [end])
        axes = self._constant(f"{name}.axis", [axis])
        return self._operator("Slice", name, x, starts, ends, axes)

    def split(self, x: str, columns: int) -> tuple[str, str]:
        """Split rows [1, A, 4 + C] into boxes [1, A, 4] and scores [1, C, A]."""
        columns_of_scores = self._columns("columns", x, 2, BOX, columns)
        boxes = self._columns("boxes", x, 2, 0, BOX)
        scores = self._operator("Transpose", "scores", columns_of_scores, perm=[0, 2, 1])
        return boxes, scores

    def candidates(self, scores: str, count: int) -> str:
        """Scores [1, C, A] in which all but the ``count`` best of each class are 0."""
        best, _ = self._top("top", scores, count, 2)
        last_axis = self._constant("last.axis", [2])
        # >= keeps ties with the last candidate; with > the candidate itself would drop out
        last = self._operator("ReduceMin", "last", best, last_axis, keepdims=1)
        among = self._operator("GreaterOrEqual", "among", scores, last)
        return self._operator("Where", "candidates", among, scores, self._constant("zero", 0.0))

    def nms(self, boxes: str, scores: str, config: PostProcessing) -> str:
        """The S detections that remain per class, int64 [S, 3]: image,
        class, anchor.
        """
        limits = [
            self._constant("per_class", [config.detections]),
            self._constant("iou", [config.nms_iou]),
            self._constant("min_score", [config.min_score]),
        ]
        return self._operator("NonMaxSuppression", "chosen", boxes, scores, *limits)

    def rows(self, boxes: str, scores: str, chosen: str) -> str:
        """The chosen detections [S, 6]: x1, y1, x2, y2, score, class."""
        axis = self._constant("image", [0])
        class_anchor = self._columns("class_anchor", chosen, 1, 1, 3)
        anchor_column = self._constant("anchor.column", 2)
        anchor = self._operator("Gather", "anchor", chosen, anchor_column, axis=1)

        image_boxes = self._operator("Squeeze", "image.boxes", boxes, axis)
        corners = self._operator("Gather", "corners", image_boxes, anchor, axis=0)

        image_scores = self._operator("Squeeze", "image.scores", scores, axis)
        score = self._operator("GatherND", "score", image_scores, class_anchor)
        column = self._operator("Unsqueeze", "score.column", score, self._constant("column", [1]))

        label_column = self._columns("label", class_anchor, 1, 0, 1)
        label = self._operator("Cast", "class", label_column, to=TensorProto.FLOAT)
        return self._operator("Concat", "rows", corners, column, label, axis=1)

    def best(self, rows: str, count: int) -> None:
        """The ``count`` best rows, padded with zeros: the output ``chosen`` [1, count,
        6].
        """
        # Padded before the selection, because TopK fails if there are fewer than ``count``.
        zeros = self._constant("fill", np.zeros((count, NMS_COLUMNS)))
        filled = self._operator("Concat", "filled", rows, zeros, axis=0)
        score_number = self._constant("score.number", BOX)
        score = self._operator("Gather", "filled.score", filled, score_number, axis=1)
        _, order = self._top("order", score, count, 0)
        sorted_ = self._operator("Gather", "sorted", filled, order, axis=0)
        self.nodes.append(helper.make_node("Unsqueeze", [sorted_, "nms.image"], [CHOSEN], CHOSEN))
