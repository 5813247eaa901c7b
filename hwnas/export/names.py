"""Names of the inputs and outputs of exported files, in TFLite and ONNX alike: apps
address tensors by them.
"""

from __future__ import annotations

from typing import Final

IMAGE: Final = "image"
"""What every file takes."""
LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
"""What a classifier's file gives."""
DETECTIONS: Final = "detections"
"""A row per anchor of a detector."""
CHOSEN: Final = "chosen"
"""What NMS in an ONNX file has left."""
TASK_OUTPUTS: Final = ("boxes", "classes", "scores", "count")
"""In the order of the outputs of ``TFLite_Detection_PostProcess``."""
