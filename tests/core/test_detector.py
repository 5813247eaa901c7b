"""Detectors of architectures: documents, counts, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.core.ops import Op
from hwnas.core.published import NETWORKS, published
from hwnas.core.ssdlite import SSDLite
from hwnas.errors import DocumentError

BLOCKS = (
    "conv-h32-i3-o8-k3-s2-relu",
    "mbconv-h16-i8-o8-m24-k3-relu-id",
    "mbconv-h16-i8-o16-m24-k3-s2-relu",
)
DETECTOR: dict[str, Any] = {
    "taps": [1, 2],
    "extras": ["extra-h8-i16-o32-m16-k3-s2-relu6"],
    "heads": [
        "ssd-h16-i8-o24-k3-a4-relu6",
        "ssd-h8-i16-o24-k3-a4-relu6",
        "ssd-h4-i32-o36-k3-a6-relu6",
    ],
    "aspect_ratios": [[2.0], [2.0], [2.0, 3.0]],
}


def text_of(blocks: tuple[str, ...] = BLOCKS, **changes: Any) -> str:
    return json.dumps(
        {
            "schema": "hwnas.architecture/1",
            "name": "d",
            "blocks": blocks,
            "detector": {**DETECTOR, **changes},
        }
    )


def test_a_detector_reads_back_and_its_keys_are_written() -> None:
    arch = Architecture.parse(text_of(scores="sigmoid"))
    assert Architecture.parse(arch.to_json()) == arch
    stored = json.loads(arch.to_json())["detector"]
    assert stored == {**DETECTOR, "min_ratio": 0.2, "max_ratio": 0.95, "scores": "sigmoid"}
    assert arch.sha256 != Architecture.parse(text_of()).sha256


def test_ops_counts_and_classes_are_those_of_backbone_extras_and_heads() -> None:
    arch = Architecture.parse(text_of())
    assert [op.key for op in arch.ops()] == [*BLOCKS, *DETECTOR["extras"], *DETECTOR["heads"]]
    assert arch.detector is not None
    assert (arch.classes, arch.detector.classes, arch.resolution) == (5, 5, 32)
    assert arch.detector.anchors == 4 * 16**2 + 4 * 8**2 + 6 * 4**2
    assert [(head.in_ch, head.size) for head in arch.detector.heads] == [
        (8, 16),
        (16, 8),
        (32, 4),
    ]
    backbone = Architecture(name="b", blocks=arch.blocks)
    assert arch.macs - backbone.macs == sum(op.macs for op in arch.ops()[3:]) > 0
    assert arch.params - backbone.params == sum(op.params for op in arch.ops()[3:]) > 0


def test_documents_without_a_detector_keep_their_hash() -> None:
    """The hashes were computed before architectures had detectors."""
    assert (
        published("mobilenet_v2").sha256
        == "6a3cf8a023b61390adc223620fc36a64d76883ae534c901c9562472c02f84c50"
    )
    assert (
        published("mobilenet_v3_large").sha256
        == "89eb825fd2edac17a344b141cd22400eaf493b22211438ed462ed2f11c2a5484"
    )
    assert (
        published("fbnet_a").sha256
        == "35ff9b8846368d8971e460dcde4dcc8867e43167a2b48063b12deeefaefd5096"
    )
    for name in NETWORKS:
        arch = published(name)
        assert ("detector" in json.loads(arch.to_json())) == (arch.detector is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": [2, 1]}, r"the taps \[2, 1\] must be ascending positions of blocks that end with 2, the last block"),
        ({"taps": [2, 2]}, r"the taps \[2, 2\] must be ascending"),
        ({"taps": [0, 1]}, r"the taps \[0, 1\] must be ascending"),
        ({"taps": [-1, 2]}, r"the taps \[-1, 2\] must be ascending"),
        ({"taps": [1, 2, 3]}, r"the taps \[1, 2, 3\] must be ascending"),
        ({"taps": []}, r"detector\.taps = \[\]: tuple should have at least 1 item"),
        ({"taps": ["1", 2]}, r"detector\.taps\.0 = '1'"),
        ({"extras": ["conv-h8-i16-o32-k3-s2-relu6"]}, r"extra 0 \(conv-.*\) is a conv: write an extra"),
        ({"extras": ["extra-h8-i8-o32-m16-k3-s2-relu6"]}, r"extra 0 \(.*\) takes 8 channels at 8 px, but its map has 16 at 8 px"),
        ({"extras": ["extra-h16-i16-o32-m16-k3-s2-relu6"]}, r"extra 0 \(.*\) takes 16 channels at 16 px, but its map has 16 at 8 px"),
        ({"extras": []}, r"2 feature maps \(2 taps, 0 extras\), but 3 heads and 3 lists of aspect ratios"),
        ({"heads": DETECTOR["heads"][:2]}, "3 feature maps .*, but 2 heads and 3 lists"),
        ({"aspect_ratios": [[2.0], [2.0]]}, "3 feature maps .*, but 3 heads and 2 lists"),
        ({"heads": [*DETECTOR["heads"][:2], "ssd-h4-i16-o36-k3-a6-relu6"]}, r"head 2 \(.*\) takes 16 channels at 4 px, but its map has 32"),
        ({"heads": ["conv-h16-i8-o24-k3", *DETECTOR["heads"][1:]]}, r"head 0 \(.*\) is a conv: write an ssd"),
        ({"aspect_ratios": [[2.0], [2.0, 3.0], [2.0, 3.0]]}, r"head 1 \(.*\) has 4 anchors, but its aspect ratios give 6"),
        ({"heads": [*DETECTOR["heads"][:2], "ssd-h4-i32-o30-k3-a6-relu6"]}, r"head 2 \(.*\) does not have the 5 classes of head 0"),
        ({"aspect_ratios": [[2.0], [2.0], [2.0, 0.0]]}, r"detector\.aspect_ratios\.2\.1 = 0\.0: input should be greater than 0"),
        ({"min_ratio": 0.5, "max_ratio": 0.4}, r"min_ratio = 0\.5 is above max_ratio = 0\.4"),
        ({"min_ratio": 0}, r"detector\.min_ratio = 0: input should be greater than 0"),
        ({"max_ratio": 1.2}, r"detector\.max_ratio = 1\.2: input should be less than or equal to 1"),
        ({"scores": "relu"}, r"detector\.scores = 'relu': input should be 'softmax' or 'sigmoid'"),
        ({"anchor": 3}, r"unknown key 'detector\.anchor'"),
    ],
)  # fmt: skip
def test_detectors_that_do_not_fit_are_refused_in_one_sentence(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        Architecture.parse(text_of(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "last", ["classifier-h8-i16-o5", "head-h8-i16-o32", "ssd-h8-i16-o24-k3-a4-relu6"]
)
def test_blocks_that_leave_no_feature_map_are_refused(last: str) -> None:
    with pytest.raises(DocumentError, match=f"block {last} leaves no feature map"):
        Architecture.parse(text_of((*BLOCKS, last), taps=[1, 3]))


def test_predictors_must_end_a_chain() -> None:
    """A lone predictor is a chain by itself, so that it can be timed."""
    head = Op.parse("ssd-h8-i16-o24-k3-a4-relu6")
    assert Architecture(name="timing", in_channels=16, blocks=(head,)).ops() == (head,)
    with pytest.raises(
        ValueError, match=r"block 0 .* is a head of a detector, but not the last block"
    ):
        Architecture(name="timing", in_channels=16, blocks=(head, Op.parse("conv-h8-i24-o8-k3")))


def test_a_detector_without_heads_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads"):
        SSDLite(taps=(0,), heads=(), aspect_ratios=())


@pytest.mark.parametrize(
    "changes",
    [{"min_score": 1.0}, {"nms_iou": 1.5}, {"candidates": 0}, {"detections": 0}, {"nms": 0.5}],
)
def test_impossible_post_processing_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        PostProcessing.model_validate(changes)
