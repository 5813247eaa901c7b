"""Names of the inputs and outputs of exported files, the same in TFLite and ONNX. Apps
address tensors by them.
"""

from __future__ import annotations

from typing import Final

IMAGE: Final = "image"
"""The input of every file."""
LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
"""The output of a classifier's file: this one or ``LOGITS``."""
DETECTIONS: Final = "detections"
"""The output of a detector's file with one row per anchor."""
CHOSEN: Final = "chosen"
"""The output of an ONNX file with NMS: the detections that remain."""
TASK_OUTPUTS: Final = ("boxes", "classes", "scores", "count")
"""The outputs of ``TFLite_Detection_PostProcess``, in its order."""
