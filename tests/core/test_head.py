"""The heads of networks and spaces, and what depends on them."""

from __future__ import annotations

import numpy as np
import pytest

from hwnas.core.arch import Architecture
from hwnas.core.cell_families import nasbench201
from hwnas.core.detection import with_detector
from hwnas.core.families import proxylessnas
from hwnas.core.graph import Step
from hwnas.core.head import ClassifierHead, DetectorHead
from hwnas.core.ops import Op
from hwnas.core.published import published
from hwnas.core.space_head import Classifiers, Detectors
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.errors import ConfigError


@pytest.fixture(scope="module")
def chain() -> Architecture:
    return published("mobilenet_v2", resolution=64, classes=7)


@pytest.fixture(scope="module")
def detector(chain: Architecture) -> Architecture:
    return with_detector(chain, 3, SSDLiteSpec(extras=(16,)), resolution=64)


def test_a_classifier_ends_with_its_last_block(chain: Architecture) -> None:
    assert chain.head == ClassifierHead(chain.blocks[-1])
    assert (chain.task, chain.classes, chain.ops()) == ("classify", 7, chain.blocks)
    assert chain.is_chain and chain.wiring == ()
    assert [place.slot for place in chain.positions()] == [
        f"block {i}" for i in range(len(chain.blocks))
    ]


def test_a_detector_has_ops_after_its_blocks(detector: Architecture) -> None:
    assert detector.detector is not None
    count, [extra] = len(detector.blocks), detector.detector.extras
    assert detector.head == DetectorHead(detector.detector)
    assert (detector.task, detector.classes) == ("detect", 3)
    assert detector.ops() == (*detector.blocks, extra, *detector.detector.heads)
    assert [place.slot for place in detector.positions()[count:]] == [
        "extra 0",
        "head 0",
        "head 1",
        "head 2",
    ]
    assert detector.positions()[count].op == extra and detector.positions()[count].channels == 16
    assert (
        detector.wiring == tuple(f"tap{tap}" for tap in detector.detector.taps)
        and not detector.is_chain
    )


def test_networks_of_cells_are_wired() -> None:
    space = nasbench201()
    arch = space.decode({choice.key: choice.options[-1] for choice in space.choices})
    assert (
        arch.task == "classify"
        and arch.wiring == tuple(step.key for step in arch.graph)
        and not arch.is_chain
    )


def test_a_detector_needs_a_chain(detector: Architecture) -> None:
    steps = [Step("op", (i,)) for i in range(len(detector.blocks))]
    with pytest.raises(ValueError, match="a network with a graph cannot carry a detector"):
        Architecture.model_validate(
            {**detector.model_dump(), "graph": [step.key for step in steps]}
        )


def test_a_copy_does_not_keep_the_head_of_the_original(detector: Architecture) -> None:
    head = detector.head
    bare = detector.model_copy(update={"detector": None})
    assert head.task == "detect" and bare.task == "classify" and bare.ops() == detector.blocks


def test_spaces_have_the_heads_of_their_networks() -> None:
    space = proxylessnas(resolution=64, classes=3)
    boxes = space.with_detector(SSDLiteSpec(extras=(16,)))
    assert space.head == Classifiers(3) and space.task == "classify"
    assert (
        boxes.detector is not None
        and boxes.head == Detectors(3, boxes.detector)
        and boxes.task == "detect"
    )
    assert (
        space.head.blocks(24, 5) == (Op.parse("classifier-h5-i24-o3"),)
        and boxes.head.blocks(24, 5) == ()
    )
    assert space.scaled(0.5).stages[-1].widths == space.stages[-1].widths
    assert boxes.scaled(0.5).stages[-1].widths == tuple(
        width // 2 for width in boxes.stages[-1].widths
    )


def test_places_of_an_architecture_have_the_names_of_its_space() -> None:
    classifiers = proxylessnas(resolution=64, classes=3)
    boxes = classifiers.with_detector(SSDLiteSpec(extras=(16,)))
    for space, ends in (
        (classifiers, ["classifier"]),
        (boxes, ["extra 0", "head 0", "head 1", "head 2"]),
    ):
        picks = space.sample(np.random.default_rng(0)) | {"s2.b1": "skip"}
        arch = space.decode(picks)
        places = space.positions(arch)
        assert [place.slot for place in places] == [*(slot.key for slot in space.slots), *ends]
        assert [place.op for place in places if place.op is not None] == list(arch.ops())
        at = [place.slot for place in places].index("s2.b1")
        assert places[at].op is None and (places[at].channels, places[at].size) == (
            places[at - 1].channels,
            places[at - 1].size,
        )
        stranger = arch.model_copy(update={"origin": None})
        assert (
            space.positions(stranger) == stranger.positions()
            and stranger.positions()[0].slot == "block 0"
        )


def test_places_of_cells_are_those_that_compute() -> None:
    space = nasbench201()
    arch = space.decode(
        space.read("|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|skip_connect~2|")
    )
    places = space.positions(arch)
    assert [place.op for place in places] == list(arch.blocks)
    assert [place.slot for place in places[:2]] == ["stem", "cell0.c.e0-1"] and places[
        -1
    ].slot == "classifier"


def test_cell_spaces_cannot_carry_a_detector() -> None:
    with pytest.raises(ConfigError, match="space 'nasbench201' is made of cells"):
        nasbench201().with_detector()
