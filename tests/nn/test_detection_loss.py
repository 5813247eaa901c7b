"""Losses and detections, against torchvision's parts and by hand. The complete detector
is compared in tests/golden/test_ssdlite.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_iou, generalized_box_iou, sigmoid_focal_loss

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.detector import PostProcessing
from hwnas.core.fcos import FCOSSpec
from hwnas.core.published import published
from hwnas.core.size import Rectangle, Size, area
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detection_loss import detection_loss
from hwnas.nn.detector import Outputs
from hwnas.nn.post_processor import PostProcessor
from tests.nn.detectors import KINDS, PADDING, Kind, batch, small_arch, small_network

torch.set_num_threads(1)


def random_outputs(arch: Architecture, count: int = 2) -> Outputs:
    assert arch.detector is not None
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(
        count, arch.detector.anchors, arch.detector.logits, generator=generator
    )
    return logits, torch.randn(count, arch.detector.anchors, 4, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_detector_learns_its_batch(classes: int, kind: Kind) -> None:
    network = small_network(classes, kind).train()
    loss, (x_NCHW, y_NM5) = detection_loss(network.arch), batch(classes)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    values = []
    # an anchor-free detector learns the IoU of boxes that are still wrong
    for _ in range(50 if kind == "fcos" else 25):
        optimizer.zero_grad()
        value = loss(network(x_NCHW), y_NM5)
        value.backward()
        assert all(
            parameter.grad is None or parameter.grad.isfinite().all()
            for parameter in network.parameters()
        )
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_a_box_has_a_loss_and_a_gradient(kind: Kind, rows: int) -> None:
    network = small_network(kind=kind).train()
    x_NCHW, _ = batch()
    outputs = network(x_NCHW)
    value = detection_loss(network.arch)(
        outputs, torch.tensor(PADDING).expand(len(x_NCHW), rows, 5)
    )
    value.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert bool(value > 0) == any(gradient.any() for gradient in gradients) == (kind != "softmax")


@pytest.mark.parametrize("kind", KINDS)
def test_padding_order_and_boxes_without_area_make_no_difference(kind: Kind) -> None:
    arch = small_arch(kind=kind)
    loss, outputs = detection_loss(arch), random_outputs(arch)
    boxes = torch.tensor([[4.0, 8, 40, 30, 0], [20, 20, 60, 64, 2]])
    flat = torch.tensor([[10.0, 10, 10, 40, 1], [30, 30, 20, 35, 1]])
    padding = torch.tensor([[5.0, 5, 40, 50, -1]])
    unpadded = loss(outputs, torch.stack([boxes, boxes]))
    padded = loss(
        outputs,
        torch.stack([torch.cat((padding, boxes, flat)), torch.cat((flat, boxes.flip(0), padding))]),
    )
    torch.testing.assert_close(padded, unpadded)
    assert loss(outputs, torch.stack([boxes, torch.cat((boxes[:1], padding))])) != unpadded


def test_the_focal_loss_follows_its_formula() -> None:
    arch = small_arch(kind="sigmoid")
    logits, codes = random_outputs(arch, 1)
    boxes, label = torch.tensor([[6.0, 10, 50, 44]]), 1
    iou_A = box_iou(boxes, anchors_of(arch))[0]
    matched = iou_A >= 0.5
    matched[iou_A.argmax()] = True
    p = torch.sigmoid(logits[0, :, 1:])
    target = torch.zeros_like(p)
    target[matched, label] = 1.0
    focal = -target * 0.75 * (1 - p) ** 2 * p.log() - (1 - target) * 0.25 * p**2 * (1 - p).log()
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    anchors = anchors_of(arch)[matched]
    difference = (
        codes[0, matched] - coder.encode_single(boxes.expand(len(anchors), 4), anchors)
    ).abs()
    smooth_l1 = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
    parts = detection_loss(arch).parts(
        (logits, codes), torch.tensor([[[*boxes[0].tolist(), label]]])
    )
    assert 1 < int(matched.sum()) < 100
    torch.testing.assert_close(parts["classification"], focal.sum() / matched.sum())
    torch.testing.assert_close(parts["bbox_regression"], smooth_l1.sum() / 4 / matched.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 3])
def test_outputs_that_encode_the_targets_give_the_targets(classes: int, kind: Kind) -> None:
    arch = small_arch(classes, kind)
    truth = torch.tensor([[6.0, 10, 50, 44, classes - 1], [30, 2, 62, 20, 0]])
    anchors = anchors_of(arch)
    assert arch.detector is not None
    background = arch.detector.background
    assert background == (kind != "fcos")
    logits = torch.full((1, len(anchors), background + classes), -9.0)
    logits[..., :background] = 9.0
    codes = torch.zeros(1, len(anchors), 4)
    scales = (1.0, 1.0, 1.0, 1.0) if kind == "fcos" else (10.0, 10.0, 5.0, 5.0)
    coder = BoxCoder(weights=scales)
    for row, logit in zip(truth, (9.0, 7.0), strict=True):
        nearest = int(box_iou(row[None, :4], anchors).argmax())
        logits[0, nearest, :background] = -9.0
        logits[0, nearest, background + int(row[4])] = logit
        codes[0, nearest] = coder.encode_single(row[None, :4], anchors[nearest][None])[0]
    (detections,) = PostProcessor(arch, PostProcessing(min_score=0.5))((logits, codes))
    torch.testing.assert_close(detections.boxes_D4, truth[:, :4], rtol=0, atol=1e-3)
    assert detections.classes_D.tolist() == truth[:, 4].tolist()
    assert 1 >= detections.scores_D[0] > detections.scores_D[1] > 0.99


def test_sigmoid_scores_are_sigmoids() -> None:
    """Against thresholds and NMS by hand."""
    arch = small_arch(kind="sigmoid")
    logits, codes = random_outputs(arch, 1)
    config = PostProcessing(min_score=0.9, candidates=10_000, nms_iou=0.6, detections=10_000)
    boxes_A4 = (
        BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        .decode_single(codes[0], anchors_of(arch))
        .clamp(0, 64)
    )
    anchor, label = (torch.sigmoid(logits[0, :, 1:]) > 0.9).nonzero(as_tuple=True)
    scores = torch.sigmoid(logits[0, anchor, 1 + label])
    kept = batched_nms(boxes_A4[anchor], scores, label, 0.6)
    (detections,) = PostProcessor(arch, config)((logits, codes))
    assert 100 < len(kept) < len(label)
    torch.testing.assert_close(detections.scores_D, scores[kept])
    torch.testing.assert_close(detections.boxes_D4, boxes_A4[anchor][kept])
    assert torch.equal(detections.classes_D, label[kept])


@pytest.mark.parametrize("kind", KINDS)
def test_no_detections_are_empty_tensors(kind: Kind) -> None:
    arch = small_arch(kind=kind)
    logits, codes = random_outputs(arch)
    assert arch.detector is not None
    logits[:] = -50.0
    logits[..., : arch.detector.background] = 50.0
    for detections in PostProcessor(arch)((logits, codes)):
        assert (
            detections.boxes_D4.shape,
            detections.scores_D.shape,
            detections.classes_D.shape,
        ) == (
            (0, 4),
            (0,),
            (0,),
        )


def test_half_precision_outputs_are_accepted() -> None:
    """As they come out of autocast."""
    arch, (_, y_NM5) = small_arch(), batch(count=2)
    logits, codes = random_outputs(arch)
    half = (logits.bfloat16(), codes.bfloat16())
    torch.testing.assert_close(
        detection_loss(arch)(half, y_NM5),
        detection_loss(arch)((logits, codes), y_NM5),
        rtol=0.02,
        atol=0,
    )
    assert all(
        detections.boxes_D4.dtype == torch.float32 for detections in PostProcessor(arch)(half)
    )


def test_an_anchor_free_detector_learns_the_iou_in_the_score_of_the_class() -> None:
    """With boxes that are right, the target is 1, and the quality focal loss is the focal
    loss without alpha, which torchvision has.
    """
    arch = small_arch(kind="fcos")
    truth = torch.tensor([[4.0, 4, 60, 60, 2]])
    anchors_A4 = anchors_of(arch)
    logits, _ = random_outputs(arch, 1)
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    codes = coder.encode_single(truth[:, :4].expand(len(anchors_A4), 4), anchors_A4)[None]
    parts = detection_loss(arch).parts((logits, codes), truth[None])

    matched = matched_cells(arch, truth)
    targets = torch.zeros_like(logits)
    targets[0, matched, 2] = 1.0
    expected = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2, reduction="sum")
    torch.testing.assert_close(parts["classification"], expected / len(matched))
    torch.testing.assert_close(parts["bbox_regression"], torch.tensor(0.0), rtol=0, atol=1e-4)


def matched_cells(arch: Architecture, truth: torch.Tensor) -> list[int]:
    """The cells that have to find the only box, by FCOS's rules, one cell at a time."""
    assert arch.detector is not None
    x1, y1, x2, y2 = truth[0, :4].tolist()
    cells = []
    number = 0
    sizes = [head.size for head in arch.detector.heads]
    for level, size in enumerate(sizes):
        stride = arch.resolution / size
        for row in range(size):
            for column in range(size):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                to_centre = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                low = 0 if level == 0 else 4 * stride
                high = float("inf") if level == len(sizes) - 1 else 8 * stride
                if min(sides) > 0 and to_centre < 1.5 * stride and low < max(sides) < high:
                    cells.append(number)
                number += 1
    assert cells
    return cells


def test_boxes_learn_by_giou_weighted_with_the_scores() -> None:
    arch = small_arch(kind="fcos")
    truth = torch.tensor([[4.0, 4, 60, 60, 2]])
    logits, codes = random_outputs(arch, 1)
    matched = matched_cells(arch, truth)
    boxes = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0)).decode_single(codes[0], anchors_of(arch))
    weight = logits.sigmoid()[0, matched].amax(dim=1)
    giou = torch.diagonal(generalized_box_iou(boxes[matched], truth[:, :4].expand(len(matched), 4)))
    parts = detection_loss(arch).parts((logits, codes), truth[None])
    expected = 2 * (weight * (1 - giou)).sum() / weight.sum()
    torch.testing.assert_close(parts["bbox_regression"], expected)


def test_the_squares_of_an_anchor_free_detector_are_centred_on_their_cells() -> None:
    arch = small_arch(kind="fcos")
    boxes = anchors_of(arch)

    assert arch.detector is not None
    sizes = [head.size for head in arch.detector.heads]
    assert sizes == [32, 16, 8] and len(boxes) == sum(size**2 for size in sizes)
    assert boxes[0].tolist() == [1 - 8, 1 - 8, 1 + 8, 1 + 8]
    # the second row of the second map: 4 px strides
    assert boxes[32**2 + 16].tolist() == [2 - 16, 6 - 16, 2 + 16, 6 + 16]
    assert boxes[-1].tolist() == [60 - 32, 60 - 32, 60 + 32, 60 + 32]


@pytest.mark.parametrize("resolution", [256, 320, Rectangle(160, 320)])
def test_every_map_of_an_anchor_free_detector_has_something_to_find(resolution: Size) -> None:
    arch = with_detector(published("mobilenet_v2"), 1, FCOSSpec(), resolution=resolution)
    height, width = arch.size_HW
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (400, 2, 2)), axis=1) * [width, height]
    boxes = torch.from_numpy(corners.reshape(-1, 1, 4)).float()
    targets = torch.cat((boxes, torch.zeros(len(boxes), 1, 1)), dim=2)
    loss = detection_loss(arch)
    matched: list[torch.Tensor] = []
    loss.fcos.head.compute_loss = lambda t, h, a, matches: matched.extend(matches) or {}  # type: ignore[union-attr,operator]
    detector = arch.detector
    assert detector is not None
    outputs = torch.zeros(len(targets), detector.anchors, 1)
    loss.parts((outputs, outputs.expand(-1, -1, 4)), targets)
    found_A = (torch.stack(matched) >= 0).sum(dim=0)
    per_map = found_A.split([area(head.size) for head in detector.heads])
    assert all(int(found.sum()) > 50 for found in per_map)


def test_the_cells_of_a_rectangle_are_spread_over_all_of_it() -> None:
    arch = with_detector(published("mobilenet_v2"), 1, FCOSSpec(), resolution=Rectangle(96, 320))
    boxes = anchors_of(arch)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # the coarsest map has 3 rows and 10 columns of 32 px
    assert centres[-30:, 1].tolist() == [16.0] * 10 + [48.0] * 10 + [80.0] * 10
    assert centres[-10:, 0].tolist() == [16.0 + 32 * column for column in range(10)]
    sides_A2 = boxes[:, 2:] - boxes[:, :2]
    assert (sides_A2[:, 0] == sides_A2[:, 1]).all()
