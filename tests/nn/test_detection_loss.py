"""Losses and detections, against torchvision's parts and by hand. The complete detector
is compared in tests/golden/test_ssdlite.py.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_iou

from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing, Scores
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detection_loss import detection_loss
from hwnas.nn.detector import Outputs
from hwnas.nn.post_processor import PostProcessor
from tests.nn.detectors import PADDING, batch, small_arch, small_network

torch.set_num_threads(1)


def random_outputs(arch: Architecture, count: int = 2) -> Outputs:
    assert arch.detector is not None
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(count, arch.detector.anchors, arch.classes + 1, generator=generator)
    return logits, torch.randn(count, arch.detector.anchors, 4, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_detector_learns_its_batch(classes: int, scores: Scores) -> None:
    network = small_network(classes, scores).train()
    loss, (x_NCHW, y_NM5) = detection_loss(network.arch), batch(classes)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    values = []
    for _ in range(25):
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


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_a_box_has_a_loss_and_a_gradient(scores: Scores, rows: int) -> None:
    network = small_network(scores=scores).train()
    x_NCHW, _ = batch()
    outputs = network(x_NCHW)
    value = detection_loss(network.arch)(
        outputs, torch.tensor(PADDING).expand(len(x_NCHW), rows, 5)
    )
    value.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert bool(value > 0) == any(gradient.any() for gradient in gradients) == (scores == "sigmoid")


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_padding_order_and_boxes_without_area_make_no_difference(scores: Scores) -> None:
    arch = small_arch(scores=scores)
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
    arch = small_arch(scores="sigmoid")
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


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [1, 3])
def test_outputs_that_encode_the_targets_give_the_targets(classes: int, scores: Scores) -> None:
    arch = small_arch(classes, scores)
    truth = torch.tensor([[6.0, 10, 50, 44, classes - 1], [30, 2, 62, 20, 0]])
    anchors = anchors_of(arch)
    logits = torch.zeros(1, len(anchors), classes + 1)
    logits[..., 0], logits[..., 1:] = 9.0, -9.0
    codes = torch.zeros(1, len(anchors), 4)
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    for row, logit in zip(truth, (9.0, 7.0), strict=True):
        nearest = int(box_iou(row[None, :4], anchors).argmax())
        logits[0, nearest, 0], logits[0, nearest, 1 + int(row[4])] = -9.0, logit
        codes[0, nearest] = coder.encode_single(row[None, :4], anchors[nearest][None])[0]
    (detections,) = PostProcessor(arch, PostProcessing(min_score=0.5))((logits, codes))
    torch.testing.assert_close(detections.boxes_D4, truth[:, :4], rtol=0, atol=1e-3)
    assert detections.classes_D.tolist() == truth[:, 4].tolist()
    assert 1 >= detections.scores_D[0] > detections.scores_D[1] > 0.99


def test_sigmoid_scores_are_sigmoids() -> None:
    """Against thresholds and NMS by hand."""
    arch = small_arch(scores="sigmoid")
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


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_no_detections_are_empty_tensors(scores: Scores) -> None:
    arch = small_arch(scores=scores)
    logits, codes = random_outputs(arch)
    logits[..., 0], logits[..., 1:] = 50.0, -50.0
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
