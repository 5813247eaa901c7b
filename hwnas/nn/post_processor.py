"""The step from the raw outputs of a detector to boxes with scores: torchvision's, for
all kinds of detectors.

It is the method of one ``SSD`` without backbone and heads, with the anchors and the box
codes of the detector: thresholds and NMS (``SSD.postprocess_detections``) and box codes
(``BoxCoder``). The code here adds what detectors with one sigmoid per class need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from hwnas.core.arch import Architecture
from hwnas.core.detection import detector_of
from hwnas.core.detector import PostProcessing
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detector import Outputs


class Detections(NamedTuple):
    """The detections in one image, best first: boxes [D, 4] as x1, y1, x2, y2 in pixels
    of the network's input, scores [D], classes [D].
    """

    boxes_D4: Tensor
    scores_D: Tensor
    classes_D: Tensor


class PostProcessor(nn.Module):
    """Turns raw outputs into detections: scores, thresholds, NMS per class
    (torchvision's; see ``PostProcessing``).

    Example:
        >>> arch = published("ssdlite320_mobilenet_v3_large")  # doctest: +SKIP
        >>> outputs = DetectionNetwork(arch).eval()(images)  # doctest: +SKIP
        >>> detections = PostProcessor(arch)(outputs)  # doctest: +SKIP
    """

    def __init__(self, arch: Architecture, config: PostProcessing | None = None) -> None:
        super().__init__()
        config = config or PostProcessing()
        detector = detector_of(arch)
        self.size = arch.size_HW
        self.classes = detector.classes
        self.sigmoid = detector.scores == "sigmoid"
        self.background = detector.background
        if self.sigmoid:
            # torchvision sees sigmoid scores divided by the classes; see _as_softmax
            min_score = config.min_score / self.classes
            config = config.model_copy(update={"min_score": min_score})
        self.ssd = torchvision_ssd(arch, config)

    @torch.no_grad()
    def forward(self, outputs: Outputs) -> list[Detections]:
        """One ``Detections`` per image."""
        logits, codes = (output.float() for output in outputs)
        scale = 1
        if not self.background:
            # a column that the scores do not depend on
            logits = F.pad(logits, (1, 0))
        if self.sigmoid:
            logits = _as_softmax(logits)
            scale = self.classes
        head_outputs = {"cls_logits": logits, "bbox_regression": codes}
        images = self.ssd.postprocess_detections(
            head_outputs, [self.ssd.anchors] * len(logits), [self.size] * len(logits)
        )
        # torchvision's label 0 is the background
        return [
            Detections(image["boxes"], image["scores"] * scale, image["labels"] - 1)
            for image in images
        ]


def torchvision_ssd(arch: Architecture, config: PostProcessing) -> SSD:
    """torchvision's SSD, for its loss and its post-processing, with the anchors as a
    buffer. Neither needs the backbone or the heads, so these are identities.
    """
    detector = detector_of(arch)
    ssd = SSD(
        nn.Identity(),
        None,
        arch.size_HW,
        detector.classes + 1,
        head=nn.Identity(),
        score_thresh=config.min_score,
        nms_thresh=config.nms_iou,
        detections_per_img=config.detections,
        topk_candidates=config.candidates,
    )
    ssd.box_coder = BoxCoder(detector.code_scales)
    ssd.register_buffer("anchors", anchors_of(arch), persistent=False)
    return ssd


def _as_softmax(logits: Tensor) -> Tensor:
    """Logits [..., classes + 1] whose softmax is sigmoid(logits) / classes, because
    torchvision's post-processing applies a softmax.

    The background gets the rest, which is the sum of sigmoid(-logits) / classes.
    """
    classes = logits[..., 1:]
    rest = F.logsigmoid(-classes).logsumexp(dim=-1, keepdim=True)
    return torch.cat((rest, F.logsigmoid(classes)), dim=-1)
