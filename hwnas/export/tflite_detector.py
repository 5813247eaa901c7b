"""What follows a detector's predictions in its TFLite files, in float32 after any kind of network.

The network's part is ``tflite_writer.write_heads``, as it is or quantised; here its
outputs are joined and go on as

- ``decoded``: scores and boxes, one row per anchor. Anchors and exponentials stay
  float: in int8 a box would snap to a grid of 1/256 of the image.
- ``tasks``: the custom operator ``TFLite_Detection_PostProcess``, which chooses the
  detections. It is part of TFLite's standard resolver, and what Android's task
  libraries expect of a detector. Its NMS is the one per class (``use_regular_nms``).

*Differences* of the operator from our post-processing: boxes are not cut off at the
image's edges, neither for NMS nor in the output; codes of sizes are not cut off; and
there is no limit on candidates before NMS.

Source of the operator's options and of the order of its numbers:
tensorflow/lite/kernels/detection_postprocess.cc.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from hwnas.core.detector import PostProcessing
from hwnas.export.detector import CODE_SCALES, LARGEST_GROWTH, centres
from hwnas.export.names import DETECTIONS, TASK_OUTPUTS
from hwnas.export.tflite_file import Graph
from hwnas.export.tflite_interface import network_alone
from hwnas.nn.detector import CODE_SIZE, DetectionNetwork, detector_of

_SCOPE = "decode."
"""How the names begin of all that follows the network."""
_CODE = "TFLite_Detection_PostProcess"


def decoded(heads: bytes, network: DetectionNetwork) -> bytes:
    """The file with one output, ``detections`` float32 [1, anchors, 4 + classes], as
    ``detector.Decoded`` has it.

    ``heads`` is the file of the network's predictions, quantised with float outputs or
    not quantised.
    """
    tail = _Tail(heads, network)
    boxes, scores = tail.boxes(), tail.scores()
    tail.graph.scope = ""
    return tail.graph.pack(tail.entry, tail.graph.concatenated(DETECTIONS, [boxes, scores], axis=2))


def tasks(heads: bytes, network: DetectionNetwork, config: PostProcessing) -> bytes:
    """The file with the four outputs of ``TFLite_Detection_PostProcess``, for
    ``config.detections`` detections D:

    ``boxes`` [1, D, 4] as ymin, xmin, ymax, xmax in parts of the input, ``classes`` [1,
    D], ``scores`` [1, D], ``count`` [1].
    """
    tail = _Tail(heads, network)
    shapes = ((1, config.detections, 4), (1, config.detections), (1, config.detections), (1,))
    inputs = [tail.task_codes(), tail.scores(), tail.task_anchors()]
    tail.graph.scope = ""
    outputs = [
        tail.graph.tensor(name, shape) for name, shape in zip(TASK_OUTPUTS, shapes, strict=True)
    ]
    tail.graph.custom(_CODE, inputs, outputs, task_options(config, network.arch.classes))
    return tail.graph.pack(tail.entry, *outputs)


def without_decoding(model: bytes) -> bytes:
    """Of a ``decoded`` file the network alone, as ``heads`` was, and without
    normalisation: for timing.

    A latency table prices the network; its calibration also what little joins the maps,
    which is not in here.
    """
    graph, entry, _ = Graph.opened(model)
    return network_alone(graph.pack(entry, *graph.cut(_SCOPE)))


def tasks_at(model: bytes, min_score: float) -> bytes:
    """A ``tasks`` file with another threshold of scores: for timing."""
    graph, entry, exits = Graph.opened(model)
    graph.change_custom(_CODE, lambda options: _with_min_score(options, min_score))
    return graph.pack(entry, *exits)


def _with_min_score(options: bytes, min_score: float) -> bytes:
    changed: bytes = flexbuffers.Dumps(
        {**flexbuffers.Loads(options), "nms_score_threshold": min_score}
    )
    return bytes(changed)


def task_options(config: PostProcessing, classes: int) -> bytes:
    """The operator's options as flexbuffers."""
    y_scale, x_scale, h_scale, w_scale = (CODE_SCALES[i] for i in (1, 0, 3, 2))
    options: bytes = flexbuffers.Dumps(
        {
            "max_detections": config.detections,
            "max_classes_per_detection": 1,
            "detections_per_class": config.detections,
            "use_regular_nms": True,
            "nms_score_threshold": config.min_score,
            "nms_iou_threshold": config.nms_iou,
            "num_classes": classes,
            "y_scale": y_scale,
            "x_scale": x_scale,
            "h_scale": h_scale,
            "w_scale": w_scale,
        }
    )
    return bytes(options)


class _Tail:
    """The float part of a detector's graph."""

    def __init__(self, heads: bytes, network: DetectionNetwork) -> None:
        self.graph, self.entry, exits = Graph.opened(heads)
        self.graph.scope = _SCOPE
        self.network, self.detector = network, detector_of(network.arch)
        self.centres_A4: npt.NDArray[np.float64] = centres(network).double().numpy()
        self.logits = self._rows("logits", exits[0::2], self.detector.classes + 1)
        self.codes = self._rows("codes", exits[1::2], CODE_SIZE)

    def _rows(self, name: str, maps: list[int], width: int) -> int:
        """The rows of all maps, [1, anchors, width]."""
        return self.graph.concatenated(
            name, [self.graph.rows(f"{name}.map{i}", x, width) for i, x in enumerate(maps)]
        )

    def _sliced(self, name: str, x: int, first: int, width: int) -> int:
        """Some columns."""
        shape = (1, self.detector.anchors, width)
        begin = self.graph.constant(f"{name}.begin", np.array([0, 0, first], np.int32))
        size = self.graph.constant(f"{name}.size", np.array(shape, np.int32))
        return self.graph.operator("SLICE", name, [x, begin, size], shape, schema.SliceOptionsT())

    def _with(self, code: str, name: str, x: int, values: npt.NDArray[np.float64]) -> int:
        """An elementwise operator of ``x`` and constants."""
        options = {
            "MUL": schema.MulOptionsT,
            "ADD": schema.AddOptionsT,
            "MINIMUM": schema.MaximumMinimumOptionsT,
        }
        options["MAXIMUM"] = options["MINIMUM"]
        inputs = [x, self.graph.constant(f"{name}.value", values)]
        return self.graph.operator(code, name, inputs, self.graph.shape(x), options[code]())

    def scores(self) -> int:
        """[1, anchors, classes]."""
        classes = self.detector.classes
        if self.detector.scores == "sigmoid":
            logits = self._sliced("classes", self.logits, 1, classes)
            return self.graph.operator("LOGISTIC", "scores", [logits], self.graph.shape(logits))
        if classes == 1:  # softmax of two is a logistic function, which takes a sixth of the time
            background, object_ = (
                self._sliced(name, self.logits, at, 1)
                for at, name in enumerate(("background", "object"))
            )
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
        """x1, y1, x2, y2 [1, anchors, 4] in pixels, cut off at the image's edges."""
        graph, anchors, sides = self.graph, self.centres_A4[:, :2], self.centres_A4[:, 2:]
        centre = self._with(
            "MUL",
            "shift",
            self._sliced("centre.codes", self.codes, 0, 2),
            sides[None] / CODE_SCALES[:2],
        )
        centre = self._with("ADD", "centre", centre, anchors[None])
        growth = self._with(
            "MUL",
            "growth",
            self._sliced("size.codes", self.codes, 2, 2),
            1 / np.array(CODE_SCALES[2:]),
        )
        growth = self._with("MINIMUM", "growth.limited", growth, np.array(LARGEST_GROWTH))
        half = graph.operator(
            "EXP", "growth.factor", [growth], graph.shape(growth), schema.ExpOptionsT()
        )
        half = self._with("MUL", "half", half, sides[None] / 2)
        low = graph.operator("SUB", "low", [centre, half], graph.shape(half), schema.SubOptionsT())
        high = graph.operator(
            "ADD", "high", [centre, half], graph.shape(half), schema.AddOptionsT()
        )
        boxes = graph.concatenated("boxes", [low, high], axis=2)
        boxes = self._with("MAXIMUM", "boxes.low", boxes, np.array(0.0))
        return self._with(
            "MINIMUM", "boxes.inside", boxes, np.array(float(self.network.arch.resolution))
        )

    def task_codes(self) -> int:
        """ty, tx, th, tw [1, anchors, 4]."""
        options = schema.GatherOptionsT()
        options.axis = 2
        order = self.graph.constant("order", np.array([1, 0, 3, 2], np.int32))
        return self.graph.operator(
            "GATHER", "task.codes", [self.codes, order], self.graph.shape(self.codes), options
        )

    def task_anchors(self) -> int:
        """Centre y, centre x, height, width [anchors, 4] in parts of the input."""
        return self.graph.constant(
            "anchors", self.centres_A4[:, [1, 0, 3, 2]] / self.network.arch.resolution
        )
