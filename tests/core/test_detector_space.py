"""Detector spaces: their architectures, the costs of their terms, and refusals."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.cost import CostModel
from hwnas.core.detection import with_detector
from hwnas.core.limits import activation_bytes
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import MACRO_SPACES, mobile32, ofa_mobilenet_v3
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.errors import DocumentError, SpaceError
from hwnas.testing import synthetic_table

HUNDRED = settings(deadline=None, derandomize=True, max_examples=100)
OPTIONS = ("ir_k3_e3", "ir_k5_e3")


def classifiers() -> MacroSpace:
    """Searched widths at both taps, a searched depth at one and skips at the other."""
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16, 24), stride=2, slots=(OPTIONS, (*OPTIONS, "skip"))),
        SpaceStage(widths=(16, 24, 32), slots=(OPTIONS, (*OPTIONS, "skip"))),
        SpaceStage(widths=(32, 40), stride=2, slots=(OPTIONS,) * 3, depths=(2, 3)),
        SpaceStage(widths=(64,), slots=(("cn_k1",),)),
        SpaceStage(widths=(96,), slots=(("hd",),)),
    )
    return MacroSpace(name="boxes", resolution=64, classes=3, stages=stages)


def detectors() -> MacroSpace:
    return classifiers().with_detector(SSDLiteSpec(extras=(48, 32), scores="sigmoid"))


def indices(space: MacroSpace) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(0, len(choice.options) - 1) for choice in space.choices))


def test_the_classifier_is_left_out_and_the_document_reads_back() -> None:
    space = detectors()
    assert space.name == "boxes-ssdlite" and space.detector is not None
    assert len(space.stages) == 4 and space.detector.taps == (2, 3)
    assert json.loads(space.to_json())["detector"] == {
        "taps": [2, 3],
        "extras": [48, 32],
        "scores": "sigmoid",
    }
    assert MacroSpace.parse(space.to_json()) == space
    again = space.with_detector(SSDLiteSpec(extras=(16,)))
    assert (
        again.stages == space.stages
        and again.detector is not None
        and again.detector.extras == (16,)
    )


@given(indices(detectors()))
@HUNDRED
def test_decode_attaches_the_detector_and_encode_finds_the_picks(index: tuple[int, ...]) -> None:
    space = detectors()
    picks = space.at(index)
    arch = space.decode(picks)
    bare = Architecture(name="bare", blocks=arch.blocks)
    assert (
        arch.detector
        == with_detector(
            bare, 3, SSDLiteSpec(extras=(48, 32), scores="sigmoid"), resolution=64
        ).detector
    )
    assert space.encode(arch) == picks
    encoded = space.encode(arch.model_copy(update={"origin": None}))
    assert (space.decode(encoded).blocks, space.decode(encoded).detector) == (
        arch.blocks,
        arch.detector,
    )


@given(indices(detectors()))
@HUNDRED
def test_indexed_terms_are_the_architectures_ops_in_order(index: tuple[int, ...]) -> None:
    space = detectors()
    at = dict(zip((choice.key for choice in space.choices), index, strict=True))
    ops = [
        (
            term.ops[np.ravel_multi_index([at[key] for key in term.keys], term.shape)]
            if term.keys
            else term.ops[0]
        )
        for term in space.terms()
    ]
    arch = space.decode(space.at(index))
    assert tuple(op for op in ops if op is not None) == arch.ops()
    assert AdditiveCost.of_ops(space, lambda op: op.params).cost(space.at(index)) == arch.params


def test_only_what_reads_a_tap_depends_on_its_width() -> None:
    keys = {
        term.slot: term.keys
        for term in detectors().terms()
        if term.slot.startswith(("extra", "head"))
    }
    assert keys == {
        "extra0": ("s3.width",), "extra1": (), "head0": ("s2.width",), "head1": ("s3.width",), "head2": (), "head3": (),
    }  # fmt: skip


def test_expected_latency_is_the_mean_over_all_picks() -> None:
    space = detectors().restrict(
        {"s1.b0": ["ir_k3_e3"], "s2.b0": ["ir_k3_e3"], "s3.b0": ["ir_k3_e3"], "s3.b1": ["ir_k3_e3"]}
    )
    cost = CostModel.of_table(space, synthetic_table(space))
    rng = np.random.default_rng(0)
    gates = {choice.key: rng.dirichlet(np.ones(len(choice.options))) for choice in space.choices}
    index_NC = np.array(
        list(itertools.product(*(range(len(choice.options)) for choice in space.choices)))
    )
    weight_N = np.prod(
        [gates[choice.key][index_NC[:, i]] for i, choice in enumerate(space.choices)], axis=0
    )
    assert float(cost.expected(gates)) == pytest.approx(float(weight_N @ cost.costs(index_NC)))


@pytest.mark.parametrize("name", MACRO_SPACES)
def test_every_built_in_space_has_the_detectors_of_its_architectures(name: str) -> None:
    space = MACRO_SPACES[name](
        classes=2, resolution=96 if name in ("mobile32", "nasbench_macro") else 320
    )
    space = space.restrict({"resolution": [space.resolution]})
    boxes = space.with_detector()
    for seed in range(3):
        picks = boxes.sample(np.random.default_rng(seed))
        rest = {choice.key: choice.options[0] for choice in space.choices}
        theirs, mine = (
            with_detector(space.decode({**rest, **picks}), 2, resolution=space.resolution),
            boxes.decode(picks),
        )
        assert (mine.blocks, mine.detector) == (theirs.blocks, theirs.detector)


def test_documents_without_a_detector_keep_their_hash() -> None:
    """The hashes were computed before spaces had detectors."""
    assert mobile32().sha256 == "bc5345c2f8be68cde2a634e3acbf6d0f3cae24dd38599878d9192e20d453fb3f"
    assert (
        ofa_mobilenet_v3().sha256
        == "22c4142f1a2aae18a0ad0b1113da786d379a62d7341371281b135414c1e5bd92"
    )


def test_the_last_stage_before_a_detector_is_scaled_like_the_others() -> None:
    assert [stage.widths for stage in detectors().scaled(0.5).stages][-1] == (16, 24)
    assert [stage.widths for stage in classifiers().scaled(0.5).stages][-1] == (96,)


def test_another_detector_on_the_same_blocks_is_not_in_the_space() -> None:
    space = detectors()
    arch = space.decode(space.at([0] * len(space.choices)))
    other = with_detector(
        Architecture(name="bare", blocks=arch.blocks),
        3,
        SSDLiteSpec(extras=(48,), scores="sigmoid"),
        resolution=64,
    )
    with pytest.raises(SpaceError, match="its blocks match, but its detector differs"):
        space.encode(other)
    with pytest.raises(SpaceError, match="are not those of its origin's picks"):
        space.encode(arch.model_copy(update={"detector": other.detector}))


def test_spaces_that_cannot_carry_a_detector_say_why() -> None:
    with pytest.raises(
        SpaceError,
        match=(
            r"space ofa_mobilenet_v3 has several input resolutions \(128, 160, 192,"
            r" 224\).*space\.restrict"
        ),
    ):
        ofa_mobilenet_v3().with_detector()
    flat = MacroSpace(
        name="flat",
        resolution=8,
        classes=2,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5"),)),),
    )
    with pytest.raises(
        SpaceError,
        match="space flat cannot carry a detector: it needs feature maps at two resolutions",
    ):
        flat.with_detector()


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([1, 3], "must be ascending stages"),
        ([3, 2], "must be ascending"),
        ([2], "end with 3"),
        ([2, 9], "taps"),
    ],
)
def test_taps_that_do_not_fit_are_refused(taps: list[int], message: str) -> None:
    content = json.loads(detectors().to_json())
    content["detector"]["taps"] = taps
    with pytest.raises(DocumentError, match=message) as caught:
        MacroSpace.parse(json.dumps(content))
    assert "\n" not in str(caught.value)


def test_predictors_keep_their_input_for_the_second_branch() -> None:
    # maps of 16 pixels: input 32, depthwise 32, logits 36, codes 24
    op = Op.parse("ssd-h4-i32-o36-k3-a6-relu6")
    assert activation_bytes(op, "int8") == 16 * (32 + 32 + 36)
    wide = Op.parse("ssd-h4-i8-o120-k3-a6-relu6")
    assert activation_bytes(wide, "int8") == 16 * (120 + 8 + 24)
