"""The loss of a detector, and the step from its raw outputs to boxes with scores.

Most of it is torchvision's, on one ``SSD`` without backbone and heads: the anchors
(``DefaultBoxGenerator``), matching them with boxes (``SSDMatcher``), box codes
(``BoxCoder``), the loss with hard negatives (``SSD.compute_loss``), thresholds and NMS
(``SSD.postprocess_detections``); and ``sigmoid_focal_loss``. The code here adds what
detectors with one sigmoid per class need (RetinaNet, arXiv 1708.02002). Their recipe is
MobileDet's (arXiv 2004.14525; tensorflow/models:
``ssdlite_mobiledet_cpu_320x320_coco_sync_4x4``)::

    loss = (sum of focal(logits, classes; alpha = 0.75, gamma = 2) + sum of
    smooth_l1(codes, targets) / 4) / matched anchors

*Difference from MobileDet*: the background column is unused here; MobileDet trains it
towards 0 and then drops it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, sigmoid_focal_loss

from hwnas.core.arch import Architecture
from hwnas.core.detector import CODE_SIZE, PostProcessing
from hwnas.core.ssdlite import detector_of
from hwnas.nn.detector import Outputs

FOCAL_ALPHA, FOCAL_GAMMA = 0.75, 2.0


class Detections(NamedTuple):
    """The detections in one image, best first: boxes [D, 4] as x1, y1, x2, y2 in pixels
    of the network's input, scores [D], classes [D].
    """

    boxes_D4: Tensor
    scores_D: Tensor
    classes_D: Tensor


class DetectionLoss(nn.Module):
    """The loss of raw outputs. The detector's ``scores`` decide between SSD's loss with
    hard negatives (softmax) and MobileDet's focal loss (sigmoid).

    Targets are [N, M, 5]: x1, y1, x2, y2 in pixels of the network's input, and the
    class, counted from 0; rows with class -1 are padding. Boxes without area are
    skipped, because they have no code. An image without boxes adds nothing to SSD's
    loss, which takes three negatives for each positive of the same image; the focal
    loss does learn from it.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.ssd = _ssd(arch, PostProcessing())
        self.focal = detector_of(arch).scores == "sigmoid"

    def forward(self, outputs: Outputs, y_NM5: Tensor) -> Tensor:
        """The sum of the two parts, a scalar."""
        parts = self.parts(outputs, y_NM5)
        return parts["classification"] + parts["bbox_regression"]

    def parts(self, outputs: Outputs, y_NM5: Tensor) -> dict[str, Tensor]:
        """``classification`` and ``bbox_regression``, per matched anchor."""
        logits, codes = (output.float() for output in outputs)
        targets: list[dict[str, Tensor]] = []
        matches: list[Tensor] = []
        for y_M5 in y_NM5:
            target = _target(y_M5)
            targets.append(target)
            matches.append(self._matches(target["boxes"]))
        head_outputs = {"cls_logits": logits, "bbox_regression": codes}
        parts: dict[str, Tensor] = self.ssd.compute_loss(
            targets, head_outputs, [self.ssd.anchors] * len(targets), matches
        )
        if self.focal:
            labels = [target["labels"] for target in targets]
            parts = {
                "classification": _focal_loss(logits, labels, matches),
                "bbox_regression": parts["bbox_regression"] / CODE_SIZE,
            }
        return parts

    def _matches(self, boxes_M4: Tensor) -> Tensor:
        """The index of the box that each anchor has to find, int64 [anchors]; -1 for
        the background.
        """
        # torchvision's matcher refuses images without boxes
        if not len(boxes_M4):
            return torch.full(
                (len(self.ssd.anchors),), -1, dtype=torch.int64, device=boxes_M4.device
            )
        matches: Tensor = self.ssd.proposal_matcher(box_iou(boxes_M4, self.ssd.anchors))
        return matches


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
        self.size = (arch.resolution, arch.resolution)
        self.classes = detector.classes
        self.sigmoid = detector.scores == "sigmoid"
        if self.sigmoid:
            # torchvision sees sigmoid scores divided by the classes; see _as_softmax
            min_score = config.min_score / self.classes
            config = config.model_copy(update={"min_score": min_score})
        self.ssd = _ssd(arch, config)

    @torch.no_grad()
    def forward(self, outputs: Outputs) -> list[Detections]:
        """One ``Detections`` per image."""
        logits, codes = (output.float() for output in outputs)
        scale = 1
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


def default_boxes(arch: Architecture) -> Tensor:
    """The anchors of an architecture, float32 [anchors, 4]: x1, y1, x2, y2 in pixels of
    the network's input. As in SSD, they are not clipped at its edges.
    """
    detector = detector_of(arch)
    generator = DefaultBoxGenerator(
        [list(ratios) for ratios in detector.aspect_ratios],
        min_ratio=detector.min_ratio,
        max_ratio=detector.max_ratio,
    )
    size = (arch.resolution, arch.resolution)
    # the generator reads only the shapes of the maps
    maps = [torch.empty(1, 0, head.size, head.size) for head in detector.heads]
    boxes_A4: Tensor = generator(ImageList(torch.empty(1, 0, *size), [size]), maps)[0]
    return boxes_A4


def _ssd(arch: Architecture, config: PostProcessing) -> SSD:
    """torchvision's SSD, for its loss and its post-processing, with the anchors as a
    buffer. Neither needs the backbone or the heads, so these are identities.
    """
    ssd = SSD(
        nn.Identity(),
        None,
        (arch.resolution, arch.resolution),
        detector_of(arch).classes + 1,
        head=nn.Identity(),
        score_thresh=config.min_score,
        nms_thresh=config.nms_iou,
        detections_per_img=config.detections,
        topk_candidates=config.candidates,
    )
    ssd.register_buffer("anchors", default_boxes(arch), persistent=False)
    return ssd


def _target(y_M5: Tensor) -> dict[str, Tensor]:
    """torchvision's target of one image, without padding and boxes without area;
    classes count from 1.
    """
    real = y_M5[(y_M5[:, 4] >= 0) & (y_M5[:, 2:4] > y_M5[:, :2]).all(dim=1)]
    return {"boxes": real[:, :4], "labels": real[:, 4].long() + 1}


def _focal_loss(logits_NAC: Tensor, labels: list[Tensor], matches: list[Tensor]) -> Tensor:
    """The focal loss, summed over all anchors and classes, per matched anchor. The
    ``labels`` of each image's boxes count from 1.
    """
    anchor_labels = []
    for labels_M, match_A in zip(labels, matches, strict=True):
        # label 0, the background, goes first, where the match -1 finds it
        anchor_labels.append(F.pad(labels_M, (1, 0))[match_A + 1])
    labels_NA = torch.stack(anchor_labels)

    targets_NAC = F.one_hot(labels_NA, logits_NAC.shape[-1])[..., 1:].to(logits_NAC)
    total: Tensor = sigmoid_focal_loss(
        logits_NAC[..., 1:], targets_NAC, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA, reduction="sum"
    )
    return total / (labels_NA > 0).sum().clamp(min=1)


def _as_softmax(logits: Tensor) -> Tensor:
    """Logits [..., classes + 1] whose softmax is sigmoid(logits) / classes, because
    torchvision's post-processing applies a softmax.

    The background gets the rest, which is the sum of sigmoid(-logits) / classes.
    """
    classes = logits[..., 1:]
    rest = F.logsigmoid(-classes).logsumexp(dim=-1, keepdim=True)
    return torch.cat((rest, F.logsigmoid(classes)), dim=-1)
