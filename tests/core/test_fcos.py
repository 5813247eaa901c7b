"""The anchor-free detector: its document, its neck, spaces with it, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hwnas.core.arch import Architecture, Picks
from hwnas.core.cost import CostModel
from hwnas.core.detection import detector_of, with_detector
from hwnas.core.fcos import FCOS, FCOSSpec
from hwnas.core.ops import FCOSPredictor, Op, SeparableLayer, Upsample
from hwnas.core.published import published
from hwnas.core.space import MacroSpace
from hwnas.errors import DocumentError, SpaceError
from hwnas.testing import synthetic_table
from tests.core.test_detector_space import classifiers

MOBILENET = with_detector(published("mobilenet_v2"), 80, FCOSSpec())


def space() -> MacroSpace:
    return classifiers().with_detector(FCOSSpec(channels=16))


def test_it_taps_strides_8_16_and_32_and_searches_these_maps() -> None:
    detector = detector_of(MOBILENET)
    assert [MOBILENET.blocks[tap].out_size for tap in detector.taps] == [40, 20, 10]
    assert [(head.in_ch, head.size) for head in detector.heads] == [
        (96, 40),
        (96, 20),
        (96, 10),
    ]
    assert (detector.classes, detector.logits, detector.background) == (80, 80, 0)
    assert detector.anchors == 40**2 + 20**2 + 10**2
    assert MOBILENET.name == "mobilenet_v2-fcos"


def test_its_macs_are_those_of_the_formulas() -> None:
    """Separable layers k = 5 with 96 channels; see the module's docstring."""
    separable = 25 * 96 + 96 * 96
    neck = 40**2 * 32 * 96 + 20**2 * 96 * 96 + 10**2 * 320 * 96  # lateral
    neck += separable * (20**2 + 40**2)  # top-down
    neck += separable * (2 * 20**2 + 2 * 10**2)  # bottom-up
    heads = (2 * separable + 96 * 84) * (40**2 + 20**2 + 10**2)
    backbone = sum(op.macs for op in MOBILENET.blocks)
    assert MOBILENET.macs - backbone == neck + heads


def test_the_document_reads_back_and_wirings_differ() -> None:
    assert Architecture.parse(MOBILENET.to_json()) == MOBILENET
    assert json.loads(MOBILENET.to_json())["detector"]["kind"] == "fcos"
    assert "sum 4 6" in MOBILENET.wiring and "map11" in MOBILENET.wiring


def test_ops_have_keys() -> None:
    upsample = Op.parse("upsample-h10-i8-o8")
    assert isinstance(upsample, Upsample) and (upsample.out_size, upsample.macs) == (20, 0)
    separable = Op.parse("separable-h9-i8-o16-k5-s2-relu6")
    assert isinstance(separable, SeparableLayer) and separable.out_size == 5
    head = Op.parse("fcos-h10-i96-o80-m64-k5-n3-relu6")
    assert isinstance(head, FCOSPredictor) and (head.depth, head.classes) == (3, 80)
    with pytest.raises(SpaceError, match="does not change the channels"):
        Op.parse("upsample-h10-i8-o9")


@pytest.mark.parametrize("seed", range(5))
def test_a_space_prices_and_encodes_its_detectors(seed: int) -> None:
    boxes = space()
    picks = boxes.sample(np.random.default_rng(seed))
    arch = boxes.decode(picks)
    assert boxes.encode(arch) == picks
    encoded = boxes.encode(arch.model_copy(update={"origin": None}))
    assert boxes.decode(encoded).detector == arch.detector
    ops = []
    for term in boxes.terms():
        options = [index_of(boxes, key, picks) for key in term.keys]
        ops.append(term.ops[np.ravel_multi_index(options, term.shape) if options else 0])
    assert tuple(op for op in ops if op is not None) == arch.ops()
    table = synthetic_table(boxes)
    expected = sum(table.entries[op.key].ms for op in arch.ops())
    assert CostModel.of_table(boxes, table).cost(picks) == pytest.approx(expected)


def index_of(boxes: MacroSpace, key: str, picks: Picks) -> int:
    [choice] = [choice for choice in boxes.choices if choice.key == key]
    return choice.options.index(picks[key])


def test_only_the_lateral_convolutions_depend_on_the_backbone() -> None:
    dependent = {
        term.slot: term.keys for term in space().terms()[-15:] if term.keys and "neck" in term.slot
    }
    # the last stages at strides 2, 4 and 8
    assert dependent == {"neck0": ("s0.width",), "neck1": ("s2.width",), "neck2": ("s3.width",)}


def test_three_resolutions_are_needed() -> None:
    flat = Architecture.parse(
        json.dumps(
            {
                "schema": "hwnas.architecture/1",
                "name": "flat",
                "blocks": ["conv-h64-i3-o8-k3-s2-relu", "conv-h32-i8-o16-k3-s2-relu"],
            }
        )
    )
    with pytest.raises(SpaceError, match="needs feature maps at three resolutions"):
        with_detector(flat, 2, FCOSSpec(), resolution=64)
    with_detector(flat, 2, resolution=64)


def test_maps_must_halve_exactly() -> None:
    with pytest.raises(
        SpaceError, match=r"maps that halve exactly, .* 38, 19, 10 px: choose a data.resolution"
    ):
        with_detector(published("mobilenet_v2"), 2, FCOSSpec(), resolution=300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": [11, 14]}, "there are 2 maps, but 3 heads"),
        ({"maps": [11, 14, 99]}, "reads point 99, which no step makes"),
        ({"maps": [11, 14, 14]}, r"head 2 .* takes 96 channels at 10 px, but its map has 96 at"),
        ({"scores": "softmax"}, "has sigmoid scores, not softmax"),
        ({"kind": "yolo"}, r"detector.kind = 'yolo' is unknown; known: 'ssdlite', 'fcos'"),
        ({"ops": ["classifier-h40-i32-o96"] * 12}, "of the neck makes no feature map"),
        ({"side": 0}, "detector.side = 0: input should be greater than 0"),
    ],
)
def test_documents_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    document = json.loads(MOBILENET.to_json())
    document["detector"] |= changes
    with pytest.raises(DocumentError, match=message):
        Architecture.parse(json.dumps(document))


def test_a_detector_without_a_kind_is_ssdlite() -> None:
    arch = with_detector(published("mobilenet_v2"), 80)
    assert "kind" not in json.loads(arch.to_json())["detector"]
    assert not isinstance(arch.detector, FCOS)
