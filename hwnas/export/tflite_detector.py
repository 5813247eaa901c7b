"""The part after the predictions in a detector's TFLite files, in float32 after any
kind of network.

``tflite_writer.write_heads`` writes the network's part, which may be quantised. Its
outputs are concatenated and continue as

- ``decoded``: scores and boxes, one row per anchor. Anchors and exponentials stay
  float, because int8 would snap boxes to a grid of 1/256 of the image.
- ``tasks``: the custom operator ``TFLite_Detection_PostProcess``, which selects the
  detections. It is part of TFLite's standard resolver, and Android's task libraries
  expect it. NMS is done per class (``use_regular_nms``).

*Differences* of this operator from our post-processing: boxes are not clipped to the
image, neither for NMS nor in the output; the codes of sizes are not limited; and there
is no limit on candidates before NMS.

Source of the operator's options and of the order of its values:
tensorflow/lite/kernels/detection_postprocess.cc.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from hwnas.core.detection import detector_of
from hwnas.core.detector import CODE_SIZE, Detector, PostProcessing
from hwnas.export.detector import LARGEST_GROWTH, centres
from hwnas.export.names import DETECTIONS, TASK_OUTPUTS
from hwnas.export.tflite_file import TFLiteGraph
from hwnas.export.tflite_interface import network_alone
from hwnas.nn.detector import DetectionNetwork

_SCOPE = "decode."
"""Prefix of the names of everything after the network."""
_CODE = "TFLite_Detection_PostProcess"


def add_decoding(heads: bytes, network: DetectionNetwork) -> bytes:
    """Append decoding to the file of a network's predictions. The new file has one
    output, ``detections`` float32 [1, anchors, 4 + classes], as ``detector.Decoded``
    defines it.

    ``heads`` is not quantised, or quantised with float outputs.
    """
    tail = _Tail(heads, network)
    boxes = tail.boxes()
    scores = tail.scores()
    # outputs have plain names, which apps look up; only what is inside has the prefix
    tail.graph.scope = ""
    rows = tail.graph.concatenate(DETECTIONS, [boxes, scores], axis=2)
    return tail.graph.pack(tail.entry, rows)


def tasks(heads: bytes, network: DetectionNetwork, config: PostProcessing) -> bytes:
    """Append ``TFLite_Detection_PostProcess`` to the file of a network's predictions.
    Its four outputs, for D = ``config.detections``, are

    ``boxes`` [1, D, 4] as ymin, xmin, ymax, xmax in fractions of the input size,
    ``classes`` [1, D], ``scores`` [1, D], ``count`` [1].
    """
    tail = _Tail(heads, network)
    shapes = ((1, config.detections, 4), (1, config.detections), (1, config.detections), (1,))
    inputs = [tail.task_codes(), tail.scores(), tail.task_anchors()]
    tail.graph.scope = ""
    named_shapes = zip(TASK_OUTPUTS, shapes, strict=True)
    outputs = [tail.graph.tensor(name, shape) for name, shape in named_shapes]
    tail.graph.custom(_CODE, inputs, outputs, task_options(config, tail.detector))
    return tail.graph.pack(tail.entry, *outputs)


def without_decoding(model: bytes) -> bytes:
    """Undo ``add_decoding``, and remove the normalisation, for timing.

    A latency table predicts the latency of the network. Its calibration includes the
    small cost of concatenating the maps, which this file does not have.
    """
    graph, entry, _ = TFLiteGraph.open(model)
    return network_alone(graph.pack(entry, *graph.cut(_SCOPE)))


def tasks_at(model: bytes, min_score: float) -> bytes:
    """Change the score threshold of a ``tasks`` file, for timing."""
    graph, entry, exits = TFLiteGraph.open(model)
    graph.change_custom(_CODE, lambda options: _with_min_score(options, min_score))
    return graph.pack(entry, *exits)


def _with_min_score(options: bytes, min_score: float) -> bytes:
    values = {**flexbuffers.Loads(options), "nms_score_threshold": min_score}
    return bytes(flexbuffers.Dumps(values))


def task_options(config: PostProcessing, detector: Detector) -> bytes:
    """The operator's options as flexbuffers."""
    x_scale, y_scale, w_scale, h_scale = detector.code_scales
    options: bytes = flexbuffers.Dumps(
        {
            "max_detections": config.detections,
            "max_classes_per_detection": 1,
            "detections_per_class": config.detections,
            "use_regular_nms": True,
            "nms_score_threshold": config.min_score,
            "nms_iou_threshold": config.nms_iou,
            "num_classes": detector.classes,
            "y_scale": y_scale,
            "x_scale": x_scale,
            "h_scale": h_scale,
            "w_scale": w_scale,
        }
    )
    return bytes(options)


class _Tail:
    """The float32 part at the end of a detector's graph."""

    def __init__(self, heads: bytes, network: DetectionNetwork) -> None:
        self.graph, self.entry, exits = TFLiteGraph.open(heads)
        self.graph.scope = _SCOPE
        self.network = network
        self.detector = detector_of(network.arch)
        self.centres_A4: npt.NDArray[np.float64] = centres(network).double().numpy()
        self.logits = self._rows("logits", exits[0::2], self.detector.logits)
        self.codes = self._rows("codes", exits[1::2], CODE_SIZE)

    def _rows(self, name: str, maps: list[int], width: int) -> int:
        """The concatenated rows of all maps, [1, anchors, width]."""
        rows = [self.graph.rows(f"{name}.map{i}", x, width) for i, x in enumerate(maps)]
        return self.graph.concatenate(name, rows)

    def _sliced(self, name: str, x: int, first: int, width: int) -> int:
        """The columns ``first`` to ``first + width`` of rows."""
        shape = (1, self.detector.anchors, width)
        begin = self.graph.constant(f"{name}.begin", np.array([0, 0, first], np.int32))
        size = self.graph.constant(f"{name}.size", np.array(shape, np.int32))
        return self.graph.operator("SLICE", name, [x, begin, size], shape, schema.SliceOptionsT())

    def _with(self, code: str, name: str, x: int, values: npt.NDArray[np.float64]) -> int:
        """An elementwise operator on ``x`` and a constant."""
        options = {
            "MUL": schema.MulOptionsT,
            "ADD": schema.AddOptionsT,
            "MINIMUM": schema.MaximumMinimumOptionsT,
            "MAXIMUM": schema.MaximumMinimumOptionsT,
        }
        inputs = [x, self.graph.constant(f"{name}.value", values)]
        return self.graph.operator(code, name, inputs, self.graph.shape(x), options[code]())

    def scores(self) -> int:
        """Scores [1, anchors, classes], without the background."""
        classes = self.detector.classes
        if self.detector.scores == "sigmoid":
            logits = self.logits
            if self.detector.background:
                logits = self._sliced("classes", logits, self.detector.background, classes)
            return self.graph.operator("LOGISTIC", "scores", [logits], self.graph.shape(logits))
        # The softmax of two values is a logistic function, which takes a sixth of the time.
        if classes == 1:
            background = self._sliced("background", self.logits, 0, 1)
            object_ = self._sliced("object", self.logits, 1, 1)
            shape = self.graph.shape(object_)
            context = self.graph.operator(
                "SUB", "evidence", [object_, background], shape, schema.SubOptionsT()
            )
            return self.graph.operator("LOGISTIC", "scores", [context], shape)
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        shares = self.graph.operator(
            "SOFTMAX", "softmax", [self.logits], self.graph.shape(self.logits), options
        )
        return self._sliced("scores", shares, 1, classes)

    def boxes(self) -> int:
        """Boxes [1, anchors, 4]: x1, y1, x2, y2 in pixels, clipped to the image."""
        graph = self.graph
        scales = self.detector.code_scales
        anchors = self.centres_A4[:, :2]
        sides = self.centres_A4[:, 2:]
        centre_codes = self._sliced("centre.codes", self.codes, 0, 2)
        centre = self._with("MUL", "shift", centre_codes, sides[None] / scales[:2])
        centre = self._with("ADD", "centre", centre, anchors[None])

        size_codes = self._sliced("size.codes", self.codes, 2, 2)
        growth = self._with("MUL", "growth", size_codes, 1 / np.array(scales[2:]))
        growth = self._with("MINIMUM", "growth.limited", growth, np.array(LARGEST_GROWTH))
        half = graph.operator(
            "EXP", "growth.factor", [growth], graph.shape(growth), schema.ExpOptionsT()
        )
        half = self._with("MUL", "half", half, sides[None] / 2)

        low = graph.operator("SUB", "low", [centre, half], graph.shape(half), schema.SubOptionsT())
        high = graph.operator(
            "ADD", "high", [centre, half], graph.shape(half), schema.AddOptionsT()
        )
        boxes = graph.concatenate("boxes", [low, high], axis=2)
        boxes = self._with("MAXIMUM", "boxes.low", boxes, np.array(0.0))
        height, width = self.network.arch.size_HW
        edges = np.array([width, height, width, height], float)
        if height == width:
            edges = np.array(float(height))
        return self._with("MINIMUM", "boxes.inside", boxes, edges)

    def task_codes(self) -> int:
        """The codes [1, anchors, 4] in the operator's order: ty, tx, th, tw."""
        options = schema.GatherOptionsT()
        options.axis = 2
        order = self.graph.constant("order", np.array([1, 0, 3, 2], np.int32))
        return self.graph.operator(
            "GATHER", "task.codes", [self.codes, order], self.graph.shape(self.codes), options
        )

    def task_anchors(self) -> int:
        """The anchors [anchors, 4] in the operator's order: centre y, centre x, height,
        width, as fractions of the input's height and width.
        """
        height, width = self.network.arch.size_HW
        anchors = self.centres_A4[:, [1, 0, 3, 2]] / np.array([height, width, height, width])
        return self.graph.constant("anchors", anchors)
