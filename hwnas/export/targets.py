"""The built-in targets: TFLite in float32 and static int8, ONNX in float32, and
detector files that select the detections themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, Literal

from hwnas.export import onnx_interface, quantization, tflite_file, tflite_interface
from hwnas.export.metadata import with_metadata
from hwnas.export.quantization import quantize_int8, quantize_int8_uncalibrated
from hwnas.export.target import Graph, Target, Trained
from hwnas.lazy import LazyModule

if TYPE_CHECKING:
    from hwnas.export import (
        block_writer,
        onnx_detector,
        onnx_writer,
        tflite_detector,
        tflite_writer,
    )
    from hwnas.nn import detector
    from hwnas.nn.network import Network
else:  # see hwnas/lazy.py: a target's name and file are known without PyTorch
    block_writer = LazyModule("hwnas.export.block_writer")
    onnx_detector = LazyModule("hwnas.export.onnx_detector")
    onnx_writer = LazyModule("hwnas.export.onnx_writer")
    tflite_detector = LazyModule("hwnas.export.tflite_detector")
    tflite_writer = LazyModule("hwnas.export.tflite_writer")
    detector = LazyModule("hwnas.nn.detector")


class _TFLite(Target):
    """A TFLite file with metadata for apps, for LiteRT."""

    runtime = "litert"
    layout: ClassVar[Literal["NHWC", "NCHW"]] = "NHWC"
    parts_detectors = True
    modules: ClassVar[tuple[ModuleType, ...]] = (block_writer, tflite_file, tflite_writer)

    def write(self, trained: Trained) -> bytes:
        """The network with its interface, a detector's post-processing, and
        metadata.
        """
        model = trained.once(
            f"tflite-{self.dtype}",
            # shared by the plain file and the one with NMS, which differ only after it
            lambda: trained.interface.around(self._network(trained), "litert"),
        )
        if isinstance(trained.network, detector.DetectionNetwork):
            return self._detector(model, trained.network, trained)
        return with_metadata(model, trained.card)

    def _network(self, trained: Trained) -> bytes:
        network = trained.network
        if isinstance(network, detector.DetectionNetwork):
            return self.typed(tflite_writer.write_heads(network), trained)
        return self.typed(tflite_writer.write_tflite(network), trained)

    @abstractmethod
    def typed(self, model: bytes, trained: Trained) -> bytes:
        """Convert a float32 file to the number format of this target."""

    def _detector(
        self, heads: bytes, network: detector.DetectionNetwork, trained: Trained
    ) -> bytes:
        if self.graph == "tasks":
            model = tflite_detector.tasks(heads, network, trained.post_processing)
            return with_metadata(model, replace(trained.card, output="tasks"))
        model = tflite_detector.add_decoding(heads, network)
        return with_metadata(model, replace(trained.card, output="decoded"))

    def network_alone(self, model: bytes, *, detector: bool) -> bytes:
        """Remove the decoding and the interface."""
        if detector:
            return tflite_detector.without_decoding(model)
        return tflite_interface.network_alone(model)

    def at_score(self, model: bytes, min_score: float) -> bytes:
        """Change the option of the operator."""
        return tflite_detector.tasks_at(model, min_score)

    def timing_file(self, network: Network) -> bytes:
        """A single op is written by ``write_op``: its outputs need not be a
        network's.
        """
        ops = network.arch.ops()
        if len(ops) == 1:
            return tflite_writer.write_op(ops[0], network.blocks[0])
        return tflite_writer.write_tflite(network)


class TFLiteFloat(_TFLite):
    """Float32."""

    dtype = "fp32"
    file = "model-fp32.tflite"

    def typed(self, model: bytes, trained: Trained) -> bytes:
        """Return the file unchanged."""
        return model


class TFLiteInt8(_TFLite):
    """Static int8 inside, with float32 input and outputs."""

    dtype = "int8"
    file = "model-int8.tflite"
    packages = ("ai-edge-quantizer",)
    modules = (*_TFLite.modules, quantization)

    def typed(self, model: bytes, trained: Trained) -> bytes:
        """Quantise the file with the ranges of the calibration images."""
        return quantize_int8(model, [trained.calibration_NHWC], float_io=True)

    def timing_file(self, network: Network) -> bytes:
        """Inputs and outputs are int8 as well, as inside a network."""
        return quantize_int8_uncalibrated(super().timing_file(network))


class TFLiteFloatTasks(TFLiteFloat):
    """A detector with ``TFLite_Detection_PostProcess``, which Android's task libraries
    read.
    """

    file = "model-fp32-tasks.tflite"
    graph: ClassVar[Graph] = "tasks"
    parts_detectors = False


class TFLiteInt8Tasks(TFLiteInt8):
    """The same in int8."""

    file = "model-int8-tasks.tflite"
    graph: ClassVar[Graph] = "tasks"
    parts_detectors = False


class Onnx(Target):
    """An ONNX file with the architecture in its metadata, for ONNX Runtime."""

    runtime = "onnxruntime"
    dtype = "fp32"
    file = "model.onnx"
    layout: ClassVar[Literal["NHWC", "NCHW"]] = "NCHW"
    packages = ("onnx",)
    modules = (block_writer, onnx_writer)

    def write(self, trained: Trained) -> bytes:
        """The network with its interface; for a detector, with decoded boxes."""
        return trained.once(
            "onnx", lambda: trained.interface.around(self._network(trained.network), "onnxruntime")
        )

    def _network(self, network: Network) -> bytes:
        metadata = {"architecture": network.arch.to_json()}
        if isinstance(network, detector.DetectionNetwork):
            return onnx_detector.add_decoding(network, metadata)
        return onnx_writer.write_onnx(network, metadata)

    def network_alone(self, model: bytes, *, detector: bool) -> bytes | None:
        """Remove the interface. Not possible for detectors."""
        return None if detector else onnx_interface.network_alone(model)

    def timing_file(self, network: Network) -> bytes:
        """A single op is written by ``write_op``: its outputs need not be a
        network's.
        """
        ops = network.arch.ops()
        if len(ops) == 1:
            return onnx_writer.write_op(ops[0], network.blocks[0])
        return onnx_writer.write_onnx(network)


class OnnxNMS(Onnx):
    """A detector with ONNX's NonMaxSuppression."""

    file = "model-nms.onnx"
    graph: ClassVar[Graph] = "nms"

    def write(self, trained: Trained) -> bytes:
        """The decoded file with NMS appended."""
        return onnx_detector.with_nms(super().write(trained), trained.post_processing)

    def at_score(self, model: bytes, min_score: float) -> bytes:
        """Change the constant of the threshold."""
        return onnx_detector.nms_at(model, min_score)
