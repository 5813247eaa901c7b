"""SSDLite on all kinds of architectures: taps, what it leaves out, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.ops import Classifier, Conv, Op
from hwnas.core.published import published
from hwnas.core.spaces import mobile32, proxylessnas
from hwnas.core.ssdlite import SSDLiteSpec, split_expansion
from hwnas.errors import SpaceError


@pytest.mark.parametrize(
    ("name", "fine", "coarse"),
    [
        ("mobilenet_v2", 96, 320),
        # TuNAS's endpoints: after blocks 5 and 7, before the 1280 channels of the
        # classifier
        ("proxylessnas_mobile", 96, 320),
        ("mobilenet_v3_large", 112, 160),
        ("mobilenet_v3_small", 48, 96),
        ("fbnet_a", 112, 352),
        ("multi_max", 128, 160),
    ],
)
def test_taps_are_the_last_blocks_of_strides_16_and_32(name: str, fine: int, coarse: int) -> None:
    arch = with_detector(published(name), 20)
    assert arch.detector is not None
    shapes = [(head.in_ch, head.size) for head in arch.detector.heads]
    assert shapes == [(fine, 20), (coarse, 10), (512, 5), (256, 3), (256, 2), (128, 1)]
    assert (arch.resolution, arch.classes, arch.name, arch.origin) == (
        320,
        20,
        f"{name}-ssdlite",
        None,
    )
    assert arch.detector.anchors == 6 * (400 + 100 + 25 + 9 + 4 + 1) == 3234
    assert Architecture.parse(arch.to_json()) == arch


def test_the_backbone_is_the_network_without_its_classifier() -> None:
    whole = published("mobilenet_v3_large", resolution=320)
    # without the 1 x 1 convolution, the pooled head and the classifier
    assert with_detector(published("mobilenet_v3_large"), 3).blocks == whole.blocks[:-3]
    whole = published("mobilenet_v2", resolution=320)
    assert with_detector(whole, 3).blocks == whole.blocks[:-2]


def test_a_backbone_keeps_a_1x1_convolution_that_belongs_to_no_classifier() -> None:
    space = proxylessnas(resolution=320)
    blocks = space.decode(space.sample(np.random.default_rng(0))).blocks[:-1]
    assert with_detector(Architecture(name="backbone", blocks=blocks), 3).blocks == blocks


def test_a_detector_replaces_a_detector() -> None:
    once = with_detector(published("mobilenet_v2"), 3)
    twice = with_detector(once, 7, SSDLiteSpec(scores="sigmoid"))
    assert (twice.blocks, twice.classes) == (once.blocks, 7)
    assert twice.detector is not None
    assert twice.detector.scores == "sigmoid"


def test_samples_of_a_space_for_small_images_are_tapped_at_their_own_strides() -> None:
    space = mobile32()
    arch = with_detector(
        space.decode(space.sample(np.random.default_rng(1))),
        1,
        SSDLiteSpec(extras=(64, 32)),
        resolution=96,
    )
    assert arch.detector is not None
    assert [(head.in_ch, head.size) for head in arch.detector.heads] == [
        (64, 24),
        (160, 12),
        (64, 6),
        (32, 3),
    ]
    assert [op.out_ch for op in arch.detector.heads] == [12] * 4


def test_a_network_with_one_resolution_is_refused() -> None:
    flat = Architecture(name="flat", blocks=(Conv(32, 3, 8, kernel=3), Classifier(32, 8, 10)))
    with pytest.raises(
        SpaceError,
        match=r"^architecture 'flat' cannot carry a detector: it needs feature maps at two resolutions\.$",
    ):
        with_detector(flat, 2)


def test_splitting_a_block_keeps_its_macs_and_parameters() -> None:
    whole = Op.parse("mbconv-h20-i112-o80-m672-k5-s2-q168-hsig-hswish")
    expansion, rest = split_expansion(whole)
    assert (expansion.out_size, rest.out_size) == (20, whole.out_size)
    assert expansion.macs + rest.macs == whole.macs
    assert expansion.params + rest.params == whole.params
    assert (*expansion.layers, *rest.layers)[0].act == "hswish"
