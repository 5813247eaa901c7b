"""Architectures: chains of ops that fit together, and their documents."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hwnas.core.arch import Architecture, Origin
from hwnas.core.ops import Classifier, Conv, MBConv
from hwnas.core.spaces import mobile32, published
from hwnas.errors import DocumentError

BLOCKS = (
    Conv(16, 3, 8, kernel=3, stride=2, act="relu"),
    MBConv(8, 8, 8, 24, 3, act="relu", residual=True),
    Classifier(8, 8, 5),
)


def test_counts_are_sums_over_the_blocks() -> None:
    arch = Architecture(name="a", blocks=BLOCKS)
    assert arch.ops() == BLOCKS
    assert (arch.resolution, arch.classes, arch.in_channels) == (16, 5, 3)
    assert arch.macs == 64 * 27 * 8 + 64 * (8 * 24 + 9 * 24 + 24 * 8) + 40
    assert arch.params == (216 + 16) + (192 + 48 + 216 + 48 + 192 + 16) + 45


def test_a_document_reads_back_with_its_origin() -> None:
    space = mobile32()
    for arch in (
        published("mobilenet_v2"),
        space.decode(space.sample(np.random.default_rng(0))),
        Architecture(name="a", blocks=BLOCKS),
    ):
        assert Architecture.parse(arch.to_json()) == arch
    stored = json.loads(Architecture(name="a", blocks=BLOCKS).to_json())
    assert stored["blocks"] == [
        "conv-h16-i3-o8-k3-s2-relu",
        "mbconv-h8-i8-o8-m24-k3-relu-id",
        "classifier-h8-i8-o5",
    ]
    assert stored["schema"] == "hwnas.architecture/1"


def test_picks_keep_their_types() -> None:
    origin = Origin(space="s", space_sha256="0", picks={"s0.width": 32, "s0.b0": "32"})
    read = Architecture.parse(Architecture(name="a", blocks=BLOCKS, origin=origin).to_json())
    assert read.origin is not None
    assert read.origin.picks == {"s0.width": 32, "s0.b0": "32"}


def text_of(**changes: object) -> str:
    content = json.loads(Architecture(name="a", blocks=BLOCKS).to_json())
    return json.dumps({**content, **changes})


KEYS = [op.key for op in BLOCKS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [KEYS[0], KEYS[2], KEYS[1]]}, "block 1 .* is a classifier, but not the last block"),
        ({"blocks": [KEYS[0], "mbconv-h8-i16-o16-m24-k3-relu", KEYS[2]]}, "block 1 .* takes 16 channels at 8 px, but gets 8"),
        ({"blocks": [KEYS[0], "mbconv-h16-i8-o8-m24-k3-relu", KEYS[2]]}, "takes 8 channels at 16 px, but gets 8"),
        ({"in_channels": 1}, "block 0 .* takes 3 channels at 16 px, but gets 1"),
        ({"blocks": []}, "blocks"),
        ({"blocks": ["conv-h16"]}, "is not an op key: it lacks in_ch, out_ch"),
        ({"blocks": [3]}, "blocks"),
        ({"bn_eps": 0}, "bn_eps"),
        ({"nmae": "b"}, "unknown key 'nmae'; did you mean 'name'"),
        ({"origin": {"space": "s", "space_sha256": "0", "picks": {}, "pick": {}}}, r"unknown key 'origin\.pick'; did you mean 'picks'"),
    ],
)  # fmt: skip
def test_chains_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Architecture.parse(text_of(**changes))
