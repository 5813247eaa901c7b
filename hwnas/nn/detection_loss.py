"""The losses of detectors.

SSDLite: the loss of MobileDet (arXiv 2004.14525; tensorflow/models:
``ssdlite_mobiledet_cpu_320x320_coco_sync_4x4``) with sigmoid scores, which is RetinaNet's
(arXiv 1708.02002)::

    loss = (sum of focal(logits, classes; alpha = 0.75, gamma = 2) + sum of
    smooth_l1(codes, targets) / 4) / matched anchors

and SSD's (arXiv 1512.02325) with softmax scores. Matching anchors with boxes
(``SSDMatcher``), the loss with hard negatives (``SSD.compute_loss``) and
``sigmoid_focal_loss`` are torchvision's.

*Difference from MobileDet*: the background column is unused here; MobileDet trains it
towards 0 and then drops it.

FCOS: a cell has to find a box if it lies within it, within 1.5 strides of its centre,
and if the box fits the map's range of sizes: the longest distance from the cell to a side
of the box is 4 to 8 strides, less on the finest map and more on the coarsest one.
torchvision's ``FCOS.compute_loss`` matches them (arXiv 1904.01355). What matched cells learn is Generalized Focal Loss (Li et al.,
arXiv 2006.04388): for each class, the score s of a cell learns the IoU y of the predicted
box with the matched one, and 0 elsewhere (quality focal loss, its equation 4), and
boxes learn by GIoU (arXiv 1902.09630), weighted by the scores::

    loss = sum of |y - s|^2 BCE(s, y) / matched cells
           + 2 sum of w (1 - GIoU) / sum of w,    w = max over classes of s

*Differences*: FCOS has a centre-ness beside the class scores, which the quality in the
score replaces; GFL matches by ATSS and predicts distributions of distances (see
``core.fcos``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fcos
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from hwnas.core.arch import Architecture
from hwnas.core.detection import detector_of
from hwnas.core.detector import CODE_SIZE, Detector, PostProcessing
from hwnas.core.fcos import FCOS
from hwnas.core.size import area
from hwnas.core.ssdlite import SSDLite
from hwnas.nn.anchors import anchors_of, squares
from hwnas.nn.detector import Outputs
from hwnas.nn.post_processor import torchvision_ssd

FOCAL_ALPHA, FOCAL_GAMMA = 0.75, 2.0
QUALITY_BETA = 2.0
"""Exponent of the quality focal loss, GFL's."""
BOX_WEIGHT = 2.0
"""Weight of the loss of boxes, GFL's."""
CENTRE_RADIUS = 1.5
"""Distance from a box's centre, in strides, within which cells have to find it: FCOS's."""


class DetectionLoss(nn.Module, ABC):
    """The loss of a detector's raw outputs.

    Targets are [N, M, 5]: x1, y1, x2, y2 in pixels of the network's input, and the
    class, counted from 0; rows with class -1 are padding. Boxes without area are
    skipped, because they have no code.
    """

    def forward(self, outputs: Outputs, y_NM5: Tensor) -> Tensor:
        """The sum of the two parts, a scalar."""
        parts = self.parts(outputs, y_NM5)
        return parts["classification"] + parts["bbox_regression"]

    @abstractmethod
    def parts(self, outputs: Outputs, y_NM5: Tensor) -> dict[str, Tensor]:
        """``classification`` and ``bbox_regression``, two scalars."""


def detection_loss(arch: Architecture) -> DetectionLoss:
    """The loss of an architecture's detector."""
    return LOSSES[type(detector_of(arch))](arch)


class SSDLoss(DetectionLoss):
    """The loss of SSDLite. The detector's ``scores`` decide between SSD's loss with hard
    negatives (softmax) and MobileDet's focal loss (sigmoid).

    An image without boxes adds nothing to SSD's loss, which takes three negatives for
    each positive of the same image; the focal loss does learn from it.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.ssd = torchvision_ssd(arch, PostProcessing())
        self.focal = detector_of(arch).scores == "sigmoid"

    def parts(self, outputs: Outputs, y_NM5: Tensor) -> dict[str, Tensor]:
        """``classification`` and ``bbox_regression``, per matched anchor."""
        logits, codes = (output.float() for output in outputs)
        targets: list[dict[str, Tensor]] = []
        matches: list[Tensor] = []
        for y_M5 in y_NM5:
            target = target_of(y_M5)
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


class FCOSLoss(DetectionLoss):
    """The loss of an anchor-free detector. It learns from images without boxes."""

    points_A4: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        detector = detector_of(arch)
        assert isinstance(detector, FCOS), f"{arch.name} has no FCOS"
        self.cells = [area(head.size) for head in detector.heads]
        quality = _QualityLoss(anchors_of(arch), BoxCoder(detector.code_scales))
        backbone = nn.Identity()
        backbone.out_channels = 1  # type: ignore[assignment]  # torchvision asks for it
        # only its matching is used
        self.fcos = fcos.FCOS(
            backbone,
            detector.classes,
            head=quality,
            center_sampling_radius=CENTRE_RADIUS,
        )
        # torchvision reads the strides from the sides of these squares
        points_A4 = squares(detector, arch.size, 1.0)
        self.register_buffer("points_A4", points_A4, persistent=False)

    def parts(self, outputs: Outputs, y_NM5: Tensor) -> dict[str, Tensor]:
        """``classification`` per matched cell, and ``bbox_regression``, the mean over
        matched cells.
        """
        logits, codes = (output.float() for output in outputs)
        targets = [target_of(y_M5) for y_M5 in y_NM5]
        head_outputs = {"cls_logits": logits, "bbox_regression": codes}
        parts: dict[str, Tensor] = self.fcos.compute_loss(
            targets, head_outputs, [self.points_A4] * len(targets), self.cells
        )
        return parts


class _QualityLoss(nn.Module):
    """Generalized focal loss of matched cells, as the head of torchvision's FCOS.

    ``anchors_A4`` are the boxes that the codes of ``coder`` are offsets from.
    """

    anchors_A4: Tensor

    def __init__(self, anchors_A4: Tensor, coder: BoxCoder) -> None:
        super().__init__()
        self.coder = coder
        self.register_buffer("anchors_A4", anchors_A4, persistent=False)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two parts. ``matched_idxs`` has the index of the box that each cell has to
        find, int64 [A] per image; -1 for none.
        """
        del anchors
        logits_NAC = head_outputs["cls_logits"]
        matches_NA = torch.stack(matched_idxs)
        image, cell = (matches_NA >= 0).nonzero(as_tuple=True)
        count = max(1, len(image))

        boxes = []
        labels = []
        for target, match_A in zip(targets, matches_NA, strict=True):
            found = match_A[match_A >= 0]
            boxes.append(target["boxes"][found])
            labels.append(target["labels"][found] - 1)
        expected_P4 = torch.cat(boxes)
        label_P = torch.cat(labels)

        codes_P4 = head_outputs["bbox_regression"][image, cell]
        predicted_P4 = self.coder.decode_single(codes_P4, self.anchors_A4[cell])
        quality_NAC = torch.zeros_like(logits_NAC)
        quality_NAC[image, cell, label_P] = _paired_iou(predicted_P4.detach(), expected_P4)

        scores_NAC = logits_NAC.sigmoid()
        focus_NAC = (quality_NAC - scores_NAC).abs() ** QUALITY_BETA
        entropy_NAC = F.binary_cross_entropy_with_logits(logits_NAC, quality_NAC, reduction="none")
        weight_P = scores_NAC.detach()[image, cell].amax(dim=-1)
        giou_P = generalized_box_iou_loss(predicted_P4, expected_P4)
        total_weight = weight_P.sum().clamp(min=torch.finfo(weight_P.dtype).tiny)
        return {
            "classification": (focus_NAC * entropy_NAC).sum() / count,
            "bbox_regression": BOX_WEIGHT * (weight_P * giou_P).sum() / total_weight,
        }


def _paired_iou(boxes_P4: Tensor, others_P4: Tensor) -> Tensor:
    """The IoU of each box with the other of the same row, [P]."""
    low_P2 = torch.maximum(boxes_P4[:, :2], others_P4[:, :2])
    high_P2 = torch.minimum(boxes_P4[:, 2:], others_P4[:, 2:])
    shared_P = (high_P2 - low_P2).clamp(min=0).prod(dim=1)
    area_P = (boxes_P4[:, 2:] - boxes_P4[:, :2]).prod(dim=1)
    other_area_P = (others_P4[:, 2:] - others_P4[:, :2]).prod(dim=1)
    return shared_P / (area_P + other_area_P - shared_P)


LOSSES: Mapping[type[Detector], type[SSDLoss] | type[FCOSLoss]] = {
    SSDLite: SSDLoss,
    FCOS: FCOSLoss,
}
"""Kind of a detector -> its loss."""


def target_of(y_M5: Tensor) -> dict[str, Tensor]:
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
