"""Images and feature maps that are not square: keys, counts, architectures and spaces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.ops import Op
from hwnas.core.published import published
from hwnas.core.size import Rectangle, area, each_side, size_of, strided
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import load_space, nasbench201, ofa_mobilenet_v3, proxylessnas
from hwnas.errors import DocumentError, SpaceError
from tests.core.test_detector_space import classifiers

WIDE = Rectangle(96, 160)


def test_a_square_is_a_number() -> None:
    assert size_of(20, 20) == 20 and size_of(20, 40) == Rectangle(20, 40)
    assert each_side(Rectangle(3, 4), lambda side: 12 // side) == Rectangle(4, 3)
    assert strided(Rectangle(3, 4), 2) == 2 and strided(7, 2) == 4
    assert (area(Rectangle(3, 4)), area(5)) == (12, 25)


@pytest.mark.parametrize(
    "key",
    [
        "mbconv-h20w40-i16-o16-m48-k5-relu-id",
        "conv-h15w8-i3-o4-k3-s2-relu",
        "fcos-h4w8-i16-o3-m16-k5-relu6",
        "maxpool-h4w8-i16-o16-k2-s2",
    ],
)
def test_keys_have_the_width_after_the_height(key: str) -> None:
    assert Op.parse(key).key == key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("conv-h20w20-i3-o4", "is not how this op is written; write 'conv-h20-i3-o4'"),
        ("conv-h20w0-i3-o4", "below 1"),
        ("conv-h20-i3w4-o4", "'i3w4' is not a field of conv"),
        ("conv-h20w-i3-o4", "'h20w' is not a field of conv"),
        ("maxpool-h4w7-i16-o16-k2-s2", "do not tile 4 x 7 pixels"),
    ],
)
def test_other_spellings_are_refused(key: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Op.parse(key)


def test_counts_are_per_pixel() -> None:
    """Twice the width of an even stride: twice the multiply-accumulates."""
    square = Op.parse("mbconv-h20-i16-o24-m48-k5-s2-relu")
    wide = Op.parse("mbconv-h20w40-i16-o24-m48-k5-s2-relu")
    assert (wide.macs, wide.params) == (2 * square.macs, square.params)
    assert wide.out_size == Rectangle(10, 20)
    assert max(wide.program.live_numbers()) == 2 * max(square.program.live_numbers())


def test_squeeze_and_excitation_pools_a_rectangle_to_a_pixel() -> None:
    op = Op.parse("mbconv-h20w40-i16-o24-m48-k5-q12-relu")
    assert [node.size for node in op.layers if node.name.startswith("se.")] == [1, 1]


@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet_a1", "mobilenet_v3_large", "fbnet_c"])
def test_published_networks_take_any_size(name: str) -> None:
    wide = published(name, resolution=WIDE)
    square = published(name, resolution=96)
    assert (wide.size, wide.size_HW, wide.resolution) == (WIDE, (96, 160), 96)
    assert wide.params == square.params
    # 160 / 96 columns, besides the layers after the pooling
    assert wide.macs / square.macs == pytest.approx(160 / 96, rel=0.05)
    assert Architecture.parse(wide.to_json()) == wide


def test_a_space_of_rectangles_decodes_encodes_and_reads_back() -> None:
    space = proxylessnas(resolution=WIDE, classes=7)
    assert json.loads(space.to_json())["resolution"] == [96, 160]
    assert MacroSpace.parse(space.to_json()) == space
    picks = space.sample(np.random.default_rng(0))
    arch = space.decode(picks)
    assert arch.size == WIDE and arch.blocks[-1].size == Rectangle(3, 5)
    found = space.encode(arch.model_copy(update={"origin": None}))
    assert space.decode(found).blocks == arch.blocks
    assert set(arch.ops()) <= set(space.ops)
    narrower = space.restrict({"s2.b0": ["ir_k3_e3"]})
    assert narrower.resolution == WIDE
    assert space.scaled(0.5).resolution == WIDE


def test_the_document_of_a_square_space_has_one_number() -> None:
    assert json.loads(proxylessnas(resolution=96).to_json())["resolution"] == 96
    space = MacroSpace.parse(proxylessnas(resolution=96).to_json().replace("96", "[96, 96]", 1))
    assert space.resolution == 96 or space.stages != proxylessnas(resolution=96).stages


def test_a_space_of_detectors_prices_rectangles() -> None:
    space = classifiers().model_copy(update={"resolution": Rectangle(64, 128)})
    boxes = MacroSpace.parse(space.to_json()).with_detector()
    arch = boxes.decode(boxes.sample(np.random.default_rng(1)))
    assert set(arch.ops()) <= set(boxes.ops)
    expected = with_detector(
        Architecture(name="bare", blocks=arch.blocks), 3, resolution=Rectangle(64, 128)
    )
    assert arch.detector == expected.detector
    assert arch.detector is not None
    assert arch.detector.anchors == 6 * sum(
        rows * columns for rows, columns in ((16, 32), (8, 16), (4, 8), (2, 4), (1, 2), (1, 1))
    )


def test_cells_and_choices_of_resolutions_take_squares() -> None:
    with pytest.raises(SpaceError, match=r"nasbench201.* takes square images, and 32 x 64 px"):
        load_space("nasbench201", resolution=Rectangle(32, 64))
    with pytest.raises(SpaceError, match="ofa_mobilenet_v3 takes square images"):
        ofa_mobilenet_v3(resolution=WIDE)
    with pytest.raises(SpaceError, match="its resolution cannot be restricted"):
        proxylessnas(resolution=WIDE).restrict({"resolution": [96]})
    assert nasbench201().side == 32


@pytest.mark.parametrize("resolution", [[96], [96, 0], [96, "160"], [96, 160, 3], "96", 0, -3])
def test_other_values_are_no_sizes(resolution: object) -> None:
    document = json.loads(proxylessnas(resolution=96).to_json())
    document["resolution"] = resolution
    with pytest.raises(DocumentError, match="resolution"):
        MacroSpace.parse(json.dumps(document))
