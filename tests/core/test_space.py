"""Spaces: decoding and encoding, choices, terms, restriction, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.arch import Architecture, Picks
from hwnas.core.ops import Classifier, Op
from hwnas.core.published import resolve_arch
from hwnas.core.space import Choice, MacroSpace, SpaceStage
from hwnas.core.spaces import load_space, mobile32, proxylessnas
from hwnas.errors import DocumentError, SpaceError

THOUSAND = settings(deadline=None, derandomize=True, max_examples=1000)


def elastic() -> MacroSpace:
    """A space with every width searched, stem and head included, and both kinds of
    residual.
    """
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3", "cn_k5"),)),
        SpaceStage(
            widths=(8, 16), slots=(("ds_k3", "ds_k5"), ("ds_k3", "skip")), residual="matching"
        ),
        SpaceStage(
            widths=(16, 24, 32), stride=2, slots=(options, (*options, "skip"), (*options, "skip"))
        ),
        SpaceStage(
            widths=(16, 24, 32),
            slots=(options, ("ir_k3_e1_g2", "ir_k3_e4_se0.25", "skip")),
            residual="matching",
            act="hswish",
        ),
        SpaceStage(
            widths=(24, 40),
            stride=2,
            slots=(("ir_k3_e3",), ("skip",), (*options, "skip")),
            residual="after_first",
        ),
        SpaceStage(widths=(64, 96), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="elastic", resolution=33, in_channels=1, classes=7, stages=stages)


def deep() -> MacroSpace:
    """A space with elastic depths and resolutions, a skip that keeps the shape, and a
    pooled head.
    """
    options = ("ir_k3_e3", "ir_k5_e3")
    stages = (
        SpaceStage(widths=(8,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(8,), slots=(("ir_k3_e1_g2", "ds_k3_nhs", "skip"),), residual="matching"),
        SpaceStage(widths=(16, 24), stride=2, slots=(options,) * 4, depths=(2, 3, 4)),
        SpaceStage(widths=(24,), slots=(options, (*options, "skip"), options), depths=(1, 3)),
        SpaceStage(widths=(32, 40), slots=(("hd",),), act="hswish"),
    )
    return MacroSpace(
        name="deep",
        resolution=25,
        resolutions=(16, 25, 20),
        in_channels=3,
        classes=4,
        stages=stages,
    )


SPACES = {
    "proxylessnas": proxylessnas(),
    "mobile32": mobile32(),
    "elastic": elastic(),
    "deep": deep(),
}


def indices(space: MacroSpace) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(0, len(choice.options) - 1) for choice in space.choices))


@st.composite
def sampled(draw: st.DrawFn, name: str) -> tuple[MacroSpace, Picks]:
    space = SPACES[name]
    return space, space.at(draw(indices(space)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_encode_undoes_decode_with_an_origin_and_without(name: str) -> None:
    @settings(THOUSAND, max_examples=300)
    @given(sampled(name))
    def check(drawn: tuple[MacroSpace, Picks]) -> None:
        space, picks = drawn
        arch = space.decode(picks)
        assert space.encode(arch) == picks
        by_hand = Architecture(
            name="by hand", in_channels=space.in_channels, bn_eps=space.bn_eps, blocks=arch.blocks
        )
        encoded = space.encode(by_hand)
        space.check(encoded)
        assert space.decode(encoded).blocks == arch.blocks
        assert all(
            encoded[choice.key] == picks[choice.key]
            for choice in space.choices
            if choice.kind in ("width", "resolution")
        )

    check()


@pytest.mark.parametrize("name", SPACES)
def test_index_and_at_are_inverse(name: str) -> None:
    @settings(THOUSAND, max_examples=200)
    @given(indices(SPACES[name]))
    def check(index: tuple[int, ...]) -> None:
        assert tuple(SPACES[name].index(SPACES[name].at(index))) == index

    check()


@pytest.mark.parametrize("name", SPACES)
def test_samples_reach_exactly_the_ops_of_the_space(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    plan, seen = set(space.ops), set()
    assert len(space.ops) == len(plan)
    for _ in range(1500):
        seen |= set(space.decode(space.sample(rng)).ops())
    assert seen == plan


def test_samples_are_uniform() -> None:
    space, rng = SPACES["elastic"], np.random.default_rng(1)
    index_NC = np.stack([space.index(space.sample(rng)) for _ in range(4000)])
    for i, choice in enumerate(space.choices):
        shares = np.bincount(index_NC[:, i], minlength=len(choice.options)) / len(index_NC)
        # more than four standard errors of a share of 4000 samples
        assert np.abs(shares - 1 / len(choice.options)).max() < 0.035


def test_choices_are_the_open_decisions_in_post_order() -> None:
    keys = [choice.key for choice in SPACES["elastic"].choices]
    expected = (
        "s0.b0 s0.width s1.b0 s1.b1 s1.width s2.b0 s2.b1 s2.b2 s2.width s3.b0 s3.b1 s3.width s4.b2"
        " s4.width s5.width"
    )
    assert keys == expected.split()
    assert SPACES["elastic"].choices[1] == Choice("s0.width", (8, 16), "width")
    assert SPACES["elastic"].size == 2**5 * 4 * 5 * 5 * 3 * 4 * 3 * 3 * 5 * 2 * 2
    assert SPACES["mobile32"].size == 2 * 4**4 * 5**8 * 4
    assert len(SPACES["proxylessnas"].ops) == 72
    assert SPACES["proxylessnas"].decisions == 3 * 6**6 * 12**15
    assert SPACES["elastic"].decisions == 2 * (2 * 2) * (4 * 8 * 8) * (4 * 4) * 8 * (
        2 * 2 * 3 * 3 * 2 * 2
    )


def test_the_number_of_architectures_is_that_of_distinct_canonical_forms() -> None:
    space = deep().restrict({"resolution": [16], "s2.width": [16], "s4.width": [32]})
    indices_NC = np.array(list(np.ndindex(*(len(choice.options) for choice in space.choices))))
    assert (
        len({space.canonical(index_C).tobytes() for index_C in indices_NC})
        == space.architectures
        < space.size
        == len(indices_NC)
    )
    # three resolutions and two widths in each of s2 and s4
    assert deep().architectures == 12 * space.architectures


def test_depths_follow_the_width_of_their_stage_and_the_resolution_comes_last() -> None:
    space = SPACES["deep"]
    keys = (
        "s1.b0 s2.b0 s2.b1 s2.b2 s2.b3 s2.width s2.depth s3.b0 s3.b1 s3.b2 s3.depth s4.width"
        " resolution"
    )
    assert [choice.key for choice in space.choices] == keys.split()
    assert space.choices[6] == Choice("s2.depth", (2, 3, 4), "depth")
    assert space.choices[-1] == Choice("resolution", (16, 25, 20), "resolution")
    assert space.decisions == (2 * 2) * 2**4 * 2 * 3 * (2 * (2 * 2) * 2) * 2 * 2 * 3


def test_terms_name_what_their_cost_depends_on() -> None:
    keys = {term.slot: term.keys for term in SPACES["deep"].terms()}
    assert keys == {
        "s0.b0": ("resolution",),
        "s1.b0": ("s1.b0", "resolution"),
        "s2.b0": ("s2.b0", "s2.width", "resolution"),
        "s2.b1": ("s2.b1", "s2.width", "resolution"),
        "s2.b2": ("s2.b2", "s2.width", "s2.depth", "resolution"),
        "s2.b3": ("s2.b3", "s2.width", "s2.depth", "resolution"),
        "s3.b0": ("s3.b0", "s2.width", "resolution"),
        "s3.b1": ("s3.b1", "s3.depth", "resolution"),
        "s3.b2": ("s3.b2", "s3.depth", "resolution"),
        "s4.b0": ("s4.width", "resolution"),
        "classifier": ("s4.width", "resolution"),
    }


@pytest.mark.parametrize("name", SPACES)
def test_terms_indexed_by_picks_are_the_blocks_that_decode_gives(name: str) -> None:
    space = SPACES[name]
    positions = {choice.key: i for i, choice in enumerate(space.choices)}

    @settings(THOUSAND, max_examples=200)
    @given(indices(space))
    def check(index: tuple[int, ...]) -> None:
        ops = []
        for term in space.terms():
            at = tuple(index[positions[key]] for key in term.keys)
            assert term.shape == tuple(
                len(space.choices[positions[key]].options) for key in term.keys
            )
            ops.append(term.ops[int(np.ravel_multi_index(at, term.shape)) if at else 0])
        assert tuple(op for op in ops if op is not None) == space.decode(space.at(index)).ops()

    check()


def test_blocks_that_the_depth_leaves_out_do_not_count() -> None:
    space = SPACES["deep"]
    picks = {**space.at([1] * len(space.choices)), "s2.depth": 2, "s3.depth": 1}
    arch = space.decode(picks)
    assert arch.blocks == space.decode({**picks, "s2.b2": "ir_k3_e3", "s3.b1": "skip"}).blocks
    encoded = space.encode(Architecture(name="by hand", blocks=arch.blocks))
    assert encoded == {
        **picks,
        "s2.b2": "ir_k3_e3",
        "s2.b3": "ir_k3_e3",
        "s3.b1": "ir_k3_e3",
        "s3.b2": "ir_k3_e3",
    }


def test_the_resolution_determines_the_size_of_every_block() -> None:
    space = SPACES["deep"]
    picks = space.at([0] * len(space.choices))
    sizes = {16: [16, 8, 8, 4, 4, 4], 20: [20, 10, 10, 5, 5, 5], 25: [25, 13, 13, 7, 7, 7]}
    for resolution, expected in sizes.items():
        arch = space.decode({**picks, "resolution": resolution})
        assert [op.size for op in arch.ops()] == [*expected, 1]
        assert [op.kind for op in arch.ops()[-2:]] == ["head", "classifier"]
    assert space.slots[0].size == 25
    assert space.slots[1].op("ds_k3_nhs", 8, 8, 10) == Op.parse("dsconv-h10-i8-o8-k3-hswish-id")
    assert space.slots[1].op("ds_k3_nhs", 8, 8) == Op.parse("dsconv-h13-i8-o8-k3-hswish-id")


def test_depth_and_resolution_can_be_restricted() -> None:
    space = deep()
    smaller = space.restrict(
        {"s2.depth": [2, 3], "s3.depth": [1], "resolution": [20, 16], "s1.b0": ["skip"]}
    )
    assert [len(stage.slots) for stage in smaller.stages] == [1, 1, 3, 1, 1]
    assert (smaller.stages[2].depths, smaller.stages[3].depths) == ((2, 3), ())
    assert (smaller.resolution, smaller.resolutions) == (20, (16, 20))
    assert set(smaller.ops) < set(space.ops)
    rng = np.random.default_rng(0)
    for _ in range(50):
        arch = smaller.decode(smaller.sample(rng))
        assert space.decode(space.encode(arch)).blocks == arch.blocks
    fixed = smaller.restrict({"resolution": [16], "s2.depth": [3]})
    assert (fixed.resolution, fixed.resolutions, fixed.stages[2].depths) == (16, (), ())
    assert fixed.restrict({"resolution": [16], "s2.depth": [3], "s0.depth": [1]}) == fixed


def test_residuals_are_where_the_stage_says() -> None:
    stage = {"widths": (8, 16), "slots": (("ir_k3_e3",), ("ir_k3_e3",))}

    def residuals(widths: dict[str, int], residual: str, stride: int = 1) -> list[bool]:
        space = MacroSpace(
            name="r", resolution=8, in_channels=8, classes=2,
            stages=(SpaceStage(**stage), SpaceStage(**stage, residual=residual, stride=stride)),
        )  # fmt: skip
        return [op.residual for op in space.decode(widths).ops()][2:4]

    same, different = {"s0.width": 8, "s1.width": 8}, {"s0.width": 8, "s1.width": 16}
    assert residuals(same, "after_first") == [False, True]
    assert residuals(same, "matching") == [True, True]
    assert residuals(different, "matching") == [False, True]
    assert residuals(same, "matching", stride=2) == [False, True]


def test_a_plain_convolution_is_never_residual() -> None:
    space = MacroSpace(
        name="c",
        resolution=8,
        in_channels=8,
        classes=2,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3",), ("cn_k3",)), residual="matching"),),
    )
    assert not any(op.residual for op in space.decode({}).ops())


def test_shapes_follow_strides_and_odd_sizes() -> None:
    arch = SPACES["elastic"].decode(SPACES["elastic"].at([0] * len(SPACES["elastic"].choices)))
    assert [op.size for op in arch.ops()] == [33, 17, 17, 17, 9, 9, 9, 9, 9, 5, 5, 5]
    assert arch.ops()[-1] == Classifier(5, 64, 7)


def test_a_space_without_choices_is_one_architecture() -> None:
    space = SPACES["mobile32"]
    picks = space.sample(np.random.default_rng(2))
    single = space.restrict({key: [option] for key, option in picks.items()})
    assert (single.choices, single.size, single.sample(np.random.default_rng(0))) == ((), 1, {})
    assert single.decode({}).blocks == space.decode(picks).blocks
    assert single.encode(single.decode({})) == {}
    assert single.index({}).shape == (0,)
    assert set(single.ops) == set(space.decode(picks).ops())


def test_space_documents_read_back(tmp_path) -> None:
    for name, space in SPACES.items():
        path = tmp_path / f"{name}.json"
        space.save(path)
        read = load_space(str(path))
        assert read == space
        assert read.sha256 == space.sha256


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        ({"s2.b9": "skip"}, r"has no choice 's2\.b9'; did you mean 's2\.b"),
        (
            {"s2.b0": "skip"},
            (
                r"choice 's2\.b0' of space mobile32 has no option 'skip'; known: ir_k3_e3,"
                r" ir_k5_e3, ir_k3_e6, ir_k5_e6"
            ),
        ),
        ({"s1.b0": "ds_k3"}, r"lack s2\.b0, s2\.b1, s2\.b2 \.\.\.: pick an option for each"),
    ],
)
def test_wrong_picks_are_refused(picks: Picks, message: str) -> None:
    for use in (mobile32().decode, mobile32().index, mobile32().check):
        with pytest.raises(SpaceError, match=message):
            use(picks)


def test_an_architecture_of_another_space_does_not_encode() -> None:
    rng = np.random.default_rng(0)
    foreign = mobile32(classes=11)
    with pytest.raises(SpaceError, match="is not in space mobile32: no picks give its"):
        mobile32().encode(foreign.decode(foreign.sample(rng)))
    arch = SPACES["proxylessnas"].decode(SPACES["proxylessnas"].sample(rng))
    with pytest.raises(SpaceError, match="is not in space mobile32"):
        mobile32().encode(arch)
    shorter = Architecture(
        name="no classifier", blocks=mobile32().decode(mobile32().sample(rng)).blocks[:-1]
    )
    with pytest.raises(SpaceError, match="is not in space mobile32"):
        mobile32().encode(shorter)


def test_an_origin_that_contradicts_the_blocks_is_refused() -> None:
    space = mobile32()
    a, b = (space.decode(space.sample(np.random.default_rng(seed))) for seed in (0, 1))
    assert a.blocks != b.blocks
    with pytest.raises(SpaceError, match=r"remove its origin\.$"):
        space.encode(a.model_copy(update={"blocks": b.blocks}))


def test_restriction_keeps_order_and_reads_as_a_new_document() -> None:
    space = elastic()
    smaller = space.restrict(
        {"s2.b1": ["skip", "ir_k5_e3"], "s2.width": [32, 16], "s3.b0": ["ir_k3_e3"]}, name="smaller"
    )
    options = {choice.key: choice.options for choice in smaller.choices}
    assert options["s2.b1"] == ("ir_k5_e3", "skip")
    assert options["s2.width"] == (16, 32)
    assert "s3.b0" not in options
    assert smaller.name == "smaller"
    assert smaller.sha256 != space.sha256
    assert set(smaller.ops) < set(space.ops)
    assert MacroSpace.parse(smaller.to_json()) == smaller
    assert space.restrict({}) == space


def test_every_architecture_of_a_restricted_space_is_in_the_whole_space() -> None:
    space, rng = elastic(), np.random.default_rng(3)
    smaller = space.restrict(
        {"s1.width": [16], "s2.b2": ["skip"], "s3.b1": ["skip", "ir_k3_e1_g2"], "s5.width": [96]}
    )
    for _ in range(50):
        arch = smaller.decode(smaller.sample(rng))
        assert space.decode(space.encode(arch)).blocks == arch.blocks


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"s2.b7": ["skip"]}, r"has no choice 's2\.b7'; did you mean 's2\.b"),
        ({"s2.widht": [16]}, r"has no choice 's2\.widht'; did you mean 's2\.width'"),
        (
            {"s2.b1": ["ir_k7_e3"]},
            r"'s2\.b1' cannot be restricted to \['ir_k7_e3'\]: its options are ir_k3_e3, ",
        ),
        (
            {"s2.width": [20]},
            r"'s2\.width' cannot be restricted to \[20\]: its options are 16, 24, 32",
        ),
        ({"s2.b1": []}, r"'s2\.b1' cannot be restricted to \[\]"),
        ({"s2.depth": [2]}, r"'s2\.depth' cannot be restricted to \[2\]: its options are 3"),
        ({"resolution": [32]}, r"'resolution' cannot be restricted to \[32\]: its options are 33"),
    ],
)
def test_impossible_restrictions_are_refused(
    allowed: dict[str, list[str | int]], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        elastic().restrict(allowed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"slots": [["ir_k3_e3", "ir_k3_e3"]]', "one or more different options"),
        ('"slots": [[]]', "one or more different options"),
        ('"slots": [["skip"]]', "changes the shape, so it cannot offer 'skip'"),
        ('"slots": [["ir_k4_e3"]]', "kernels must be odd"),
        ('"slots": [["ir_k3"]]', "'ir_k3' is not a block option"),
        ('"slots": [["cn_k3_g2"]]', "2 groups do not divide"),
        (
            '"slots": [["cn_k3"]], "act": "gelu"',
            "activation 'gelu' is unknown; known: none, relu, relu6, hswish",
        ),
        ('"slots": [["cn_k3"]], "residual": "always"', "residual"),
        ('"slots": [["cn_k3"]], "widht": 3', "unknown key 'stages.0.widht'; did you mean 'widths'"),
        ('"slots": []', "slots"),
        (
            '"slots": [["cn_k3"], ["ds_k3"]], "depths": [1]',
            "stage s0 needs different depths, and the largest must be its number of slots, 2, got .1.",
        ),
        ('"slots": [["cn_k3"], ["ds_k3"]], "depths": [0, 2]', "stage s0 needs different depths"),
        ('"slots": [["cn_k3"], ["ds_k3"]], "depths": [2, 2]', "stage s0 needs different depths"),
        ('"slots": [["hd", "cn_k1"]]', "offers a pooled head"),
        ('"slots": [["hd"]], "stride": 2', "offers a pooled head"),
    ],
)
def test_impossible_spaces_are_refused_when_they_are_read(change: str, message: str) -> None:
    text = (
        '{"schema": "hwnas.space/1", "name": "x", "resolution": 8, "classes": 2, "stages":'
        ' [{"widths": [8], ' + change + "}]}"
    )
    with pytest.raises(DocumentError, match=message):
        MacroSpace.parse(text)


@pytest.mark.parametrize("resolutions", [(8, 8), (4, 16), (4,), (0, 8)])
def test_impossible_resolutions_are_refused(resolutions: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="resolutions must be different, and the largest must be resolution = 8"
    ):
        MacroSpace(
            name="r",
            resolution=8,
            resolutions=resolutions,
            classes=2,
            stages=(SpaceStage(widths=(8,), slots=(("cn_k3",),)),),
        )


def test_documents_omit_depths_and_resolutions_that_are_not_searched() -> None:
    assert '"depths"' not in mobile32().to_json()
    assert '"resolutions"' not in mobile32().to_json()
    assert '"depths"' in deep().to_json()


def test_spaces_are_loaded_by_name() -> None:
    space = load_space("mobile32", classes=3, in_channels=1, resolution=16)
    assert (space.name, space.classes, space.in_channels, space.resolution) == (
        "mobile32",
        3,
        1,
        16,
    )
    assert load_space("proxylessnas", in_channels=1, classes=10, resolution=64).ops[0].in_ch == 1
    with pytest.raises(
        SpaceError,
        match=r"unknown space 'mobil32'; did you mean 'mobile32'\? A path must end in \.json\.",
    ):
        load_space("mobil32")
    with pytest.raises(SpaceError, match="does not take the override"):
        load_space("mobile32", depth=3)
    with pytest.raises(SpaceError, match=r"space 'mobile32': .*activation 'gelu' is unknown"):
        load_space("mobile32", act="gelu")


def test_architectures_are_read_from_text() -> None:
    space = load_space("nasbench_macro")
    picks = space.at([0, 1, 2, 0, 1, 2, 0, 1])
    for text in (
        "01201201",
        " 0 1 2 0 1 2 0 1\n",
        "0\t1\t2\t0\t1\t2\t0\t1",
        json.dumps(picks),
        f"\n{json.dumps(picks, indent=1)}",
    ):
        assert space.read(text) == picks
    assert (
        resolve_arch("01201201", space, resolution=32, classes=10).identity
        == space.decode(picks).identity
    )
    assert resolve_arch("mobilenet_v2", space, resolution=32, classes=10).name == "mobilenet_v2"
    for wrong, words in (
        ("0120120", "7 positions, but space nasbench_macro has 8 choices"),
        ("01201203", "position 3 at choice"),
        ("{1}", "not valid JSON"),
        ('{"s0.b0": "skip"}', "lack|no choice"),
        ("a b", "'a b' is not an architecture of space nasbench_macro: give the positions"),
    ):
        with pytest.raises(SpaceError, match=words):
            resolve_arch(wrong, space, resolution=32, classes=10)


def test_a_space_from_a_file_takes_no_overrides(tmp_path) -> None:
    mobile32().save(tmp_path / "s.json")
    with pytest.raises(
        SpaceError, match="takes no overrides: edit the document, or remove classes"
    ):
        load_space(str(tmp_path / "s.json"), classes=3)
    with pytest.raises(DocumentError, match="does not exist"):
        load_space(str(tmp_path / "absent.json"))
