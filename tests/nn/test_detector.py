"""Detection networks: their outputs and the order of these, initialisation, and
checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hwnas.core.arch import Architecture
from hwnas.core.detection import detector_of, with_detector
from hwnas.core.ops import Classifier, Conv
from hwnas.core.published import NETWORKS, published
from hwnas.errors import CheckpointError
from hwnas.nn.bn import recalibrate
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.detector import DetectionNetwork, predictions
from tests.nn.detectors import BLOCKS, batch, small_arch, small_network

torch.set_num_threads(1)
CLASSIFIERS = [name for name in NETWORKS if published(name).detector is None]


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.inference_mode()
def test_every_published_network_carries_a_detector_at_320_px(name: str) -> None:
    arch = with_detector(published(name), 2)
    network = DetectionNetwork(arch).eval()
    logits, codes = network(torch.zeros(1, 3, 320, 320))
    assert (logits.shape, codes.shape) == ((1, 3234, 3), (1, 3234, 4))
    assert arch.params == sum(parameter.numel() for parameter in network.parameters())


@torch.inference_mode()
def test_rows_are_anchors_cell_by_cell_and_map_by_map() -> None:
    network = small_network().eval()
    maps = [
        torch.randn(2, head.in_ch, head.size, head.size) for head in detector_of(network.arch).heads
    ]
    logits, codes = predictions(network.heads, maps, 4)
    finest = 6 * 16**2  # the first map's anchors come first
    for row, column, anchor in ((0, 0, 0), (2, 5, 4), (7, 1, 5)):
        index, at = finest + (row * 8 + column) * 6 + anchor, (1, slice(None), row, column)
        class_map, code_map = network.heads[1](maps[1])
        torch.testing.assert_close(logits[1, index], class_map[at][4 * anchor : 4 * anchor + 4])
        torch.testing.assert_close(codes[1, index], code_map[at][4 * anchor : 4 * anchor + 4])


def test_weights_depend_only_on_the_generator_and_start_as_documented() -> None:
    network, same, other = small_network(), small_network(), small_network(seed=1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert not torch.equal(
        network.blocks[0].layers.conv.conv.weight, other.blocks[0].layers.conv.conv.weight
    )
    convolutions = [
        part
        for part in (*network.extras.modules(), *network.heads.modules())
        if isinstance(part, nn.Conv2d)
    ]
    weights = torch.cat([part.weight.flatten() for part in convolutions])
    assert weights.std().item() == pytest.approx(0.03, rel=0.05)
    assert all(part.bias is None or not part.bias.any() for part in convolutions)


@torch.inference_mode()
def test_sigmoid_scores_start_at_one_percent() -> None:
    logits, codes = small_network(kind="sigmoid").eval()(torch.zeros(1, 3, 64, 64))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.01, rel=0.1)
    assert codes.abs().max() < 1


def test_blocks_take_the_weights_of_a_classifier() -> None:
    arch = Architecture(
        name="classifier", blocks=(*BLOCKS, Conv(8, 40, 64, act="relu6"), Classifier(8, 64, 7))
    )
    classifier = ClassificationNetwork(arch, generator=torch.Generator().manual_seed(5))
    network = small_network()
    left_out = network.load_state_dict(
        {
            name: tensor
            for name, tensor in classifier.state_dict().items()
            if name in network.state_dict()
        },
        strict=False,
    )
    assert {name.split(".")[0] for name in left_out.missing_keys} == {"extras", "heads"}


def test_bn_is_recalibrated_in_every_part() -> None:
    network = small_network()
    recalibrate(network, [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))])
    for name, tensor in network.named_buffers():
        assert not name.endswith("running_mean") or tensor.any(), name


def test_a_checkpoint_restores_the_detector(tmp_path: Path) -> None:
    network = small_network(kind="sigmoid").train()
    x_NCHW, _ = batch()
    network(x_NCHW)  # moves the BN statistics
    save_network(network, tmp_path / "model.safetensors", {"ap": "0.3"})
    loaded = load_network(tmp_path / "model.safetensors")
    assert isinstance(loaded, DetectionNetwork)
    assert loaded.arch == network.arch
    with torch.inference_mode():
        for mine, theirs in zip(loaded.eval()(x_NCHW), network.eval()(x_NCHW), strict=True):
            assert torch.equal(mine, theirs)


def test_a_checkpoint_without_the_detectors_weights_is_refused(tmp_path: Path) -> None:
    network = small_network()
    backbone = ClassificationNetwork(Architecture(name="backbone", blocks=network.arch.blocks))
    backbone.arch = network.arch
    save_network(backbone, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is corrupt or was cut off .*: train again, or restore the file\."
    ):
        load_network(tmp_path / "model.safetensors")


def test_each_kind_of_network_refuses_the_others_architectures() -> None:
    with pytest.raises(AssertionError, match="has a detector"):
        ClassificationNetwork(small_arch())
    with pytest.raises(AssertionError, match="has no detector"):
        DetectionNetwork(published("mobilenet_v2"))
