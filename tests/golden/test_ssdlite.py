"""The detectors against torchvision's own and MobileDet's published counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.ops import Conv, DSConv, MBConv, Op
from hwnas.core.option import scale_width
from hwnas.core.published import published
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detection_loss import detection_loss
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.post_processor import PostProcessor
from tests.nn.test_against_timm import randomise, weighted

torch.set_num_threads(1)
ARCH = published("ssdlite320_mobilenet_v3_large")


@pytest.fixture
def theirs() -> SSD:
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    randomise(model)
    return model.eval()


def ours_of(theirs: SSD) -> DetectionNetwork:
    """Our network with their weights. They order the heads by branch, we by feature
    map.
    """
    ours = DetectionNetwork(ARCH)
    parts = [
        ours.blocks,
        ours.extras,
        *(head.classes for head in ours.heads),
        *(head.boxes for head in ours.heads),
    ]
    mine = [layer for part in parts for layer in weighted(part)]
    for layer, yours in zip(mine, weighted(theirs), strict=True):
        assert layer.weight.shape == yours.weight.shape
        layer.load_state_dict(yours.state_dict())
    return ours.eval()


def images(count: int) -> Tensor:
    """Images in 0 .. 1 for torchvision, which scales them to -1 .. 1 itself."""
    return torch.rand(count, 3, 320, 320, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-2
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_raw_outputs_are_torchvisions(theirs: SSD) -> None:
    ours, x_NCHW = ours_of(theirs), 2 * images(2) - 1
    expected = theirs.head(list(theirs.backbone(x_NCHW).values()))
    logits, codes = ours(x_NCHW)
    close(logits, expected["cls_logits"])
    close(codes, expected["bbox_regression"])
    assert (logits[0] - logits[1]).abs().max() > 1e-2  # images matter, not only biases


@torch.inference_mode()
def test_detections_are_torchvisions(theirs: SSD) -> None:
    ours, x_NCHW = ours_of(theirs), images(2)
    detections = PostProcessor(ARCH)(ours(2 * x_NCHW - 1))
    for expected, mine in zip(theirs(list(x_NCHW)), detections, strict=True):
        assert len(expected["boxes"]) == 300
        torch.testing.assert_close(mine.boxes_D4, expected["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(mine.scores_D, expected["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(mine.classes_D + 1, expected["labels"])


def test_losses_are_torchvisions(theirs: SSD) -> None:
    ours, x_NCHW = ours_of(theirs).train(), images(3)
    y_NM5 = torch.tensor(
        [
            [[10, 20, 110, 220, 0], [200.5, 40, 320, 300, 89], [5, 5, 25, 30, 16]],
            [[0, 0, 320, 320, 7], [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]],
            [[0, 0, 0, 0, -1]] * 3,
        ]
    )
    targets = [
        {"boxes": y[y[:, 4] >= 0, :4], "labels": y[y[:, 4] >= 0, 4].long() + 1} for y in y_NM5
    ]
    expected = theirs.train()(list(x_NCHW), targets)
    parts = detection_loss(ARCH).parts(ours(2 * x_NCHW - 1), y_NM5)
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0.1
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=0)


def test_anchors_are_torchvisions(theirs: SSD) -> None:
    x_NCHW = images(1)
    maps = list(theirs.backbone(x_NCHW).values())
    assert torch.equal(
        anchors_of(ARCH), theirs.anchor_generator(theirs.transform(list(x_NCHW))[0], maps)[0]
    )


def test_macs_and_params_are_torchvisions(theirs: SSD) -> None:
    assert ARCH.params == sum(parameter.numel() for parameter in theirs.parameters()) == 3_440_060
    assert ARCH.macs == macs_of(theirs, [torch.zeros(3, 320, 320)])
    assert ARCH.macs == macs_of(DetectionNetwork(ARCH).eval(), torch.zeros(1, 3, 320, 320))
    assert round(ARCH.macs / 1e9, 3) == 0.583  # as torchvision's documentation says


@torch.inference_mode()
def macs_of(model: nn.Module, x: object) -> int:
    """MACs of the convolutions, from the shapes of their outputs."""
    macs = 0

    def hook(layer: nn.Conv2d, _: object, output: Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook)
    model(x)
    return macs


def mobiledet_cpu() -> Iterator[Op]:
    """The backbone of MobileDet-CPU: tensorflow/models,
    object_detection/models/ssd_mobiledet_feature_extractor.py.
    """
    op = Conv(320, 3, 16, kernel=3, stride=2, act="hswish")
    yield op
    op = DSConv(160, 16, 8, kernel=3, se_ch=8, act="hswish")
    yield op
    blocks = [
        "16 4 3 2", "32 8 3 2", *["32 4 3 1"] * 3,
        "72 8 5 2", "72 8 3 1", "72 4 5 1", "72 4 3 1", *["72 8 3 1"] * 4,
        "104 8 5 2", *["104 4 5 1"] * 2, "104 4 3 1", "144 8 3 1",
    ]  # fmt: skip
    for block in blocks:
        width, expansion, kernel, stride = map(int, block.split())
        mid = op.out_ch * expansion
        op = MBConv(
            op.out_size,
            op.out_ch,
            width,
            mid,
            kernel,
            stride,
            se_ch=scale_width(mid, 0.25),
            act="hswish",
        )
        yield op


def test_a_mobiledet_has_the_counts_that_its_authors_report() -> None:
    """0.45 B multiply-adds and 4.21 M parameters, which ours matches within 1 %: the
    original has three anchors fewer on its finest map.

    Without those, and with the BN statistics that TensorFlow also counts, ours would
    have 4.205 M.
    """
    arch = with_detector(
        Architecture(name="mobiledet_cpu", blocks=tuple(mobiledet_cpu())),
        90,
        SSDLiteSpec(scores="sigmoid"),
    )
    assert arch.detector is not None
    assert [head.in_ch for head in arch.detector.heads] == [72, 144, 512, 256, 256, 128]
    assert arch.macs == pytest.approx(0.45e9, rel=0.01)
    assert arch.params == pytest.approx(4.21e6, rel=0.01)
    fewer = 3 * 72 * (91 + 4) + 3 * (91 + 4)
    statistics = sum(2 * layer.out_ch for op in arch.ops() for layer in op.layers if layer.norm)
    assert round((arch.params - fewer + statistics) / 1e6, 2) == 4.21
