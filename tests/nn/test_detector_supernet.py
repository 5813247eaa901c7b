"""The super-net of a detector space: one-hot gates give the extracted detector,
mixtures are differentiable, and backbones are inherited.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwnas.config import SupernetConfig
from hwnas.core.fcos import FCOSSpec
from hwnas.core.size import sides
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import nasbench201
from hwnas.errors import CheckpointError, ConfigError
from hwnas.nn.bn import recalibrate
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.independent import IndependentNetworks
from hwnas.nn.supernet import MacroSupernet, load_supernet, make_supernet
from hwnas.search.proposal import one_hot
from tests.core.test_detector_space import classifiers, detectors

torch.set_num_threads(1)


def images(count: int = 4, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def supernet_of(space: MacroSpace, seed: int = 0, **config: Any) -> MacroSupernet:
    return MacroSupernet(space, torch.Generator().manual_seed(seed), SupernetConfig(**config))


CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"sharing": "separate"},
    {"kernels": "ofa", "channels": "interpolation"},
    {"wsbn": True},
    {"proxy_depth": 1},
    {"bn_affine": False},
)


SPACES: dict[str, MacroSpace] = {
    "ssdlite": detectors(),
    "fcos": classifiers().with_detector(FCOSSpec(channels=16)),
    "wide": MacroSpace.model_validate({**detectors().model_dump(), "resolution": (64, 96)}),
}


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_one_hot_gates_give_the_extracted_detector(config: dict[str, Any], kind: str) -> None:
    space = SPACES[kind]
    supernet = supernet_of(space, **config).eval()
    x_NCHW = images(size=sides(space.resolution))
    for seed in range(4):
        picks = space.sample(np.random.default_rng(seed))
        network = supernet.extract(picks)
        assert isinstance(network, DetectionNetwork) and network.arch == supernet.arch(picks)
        recalibrate(network, [x_NCHW])
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train()  # use the statistics of the batch, as the super-net does
        for mine, theirs in zip(
            supernet(x_NCHW, one_hot(picks, space)), network(x_NCHW), strict=True
        ):
            assert mine.shape == theirs.shape and mine.std() > 1e-3
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SPACES)
def test_every_gate_gets_a_gradient_from_the_detectors_outputs(kind: str) -> None:
    space = SPACES[kind]
    supernet = supernet_of(space).train()
    gates = {
        choice.key: torch.full((len(choice.options),), 1 / len(choice.options), requires_grad=True)
        for choice in space.choices
    }
    logits, codes = supernet(images(size=sides(space.resolution)), gates)
    (logits.square().mean() + codes.square().mean()).backward()
    for key, gate in gates.items():
        assert gate.grad is not None and gate.grad.abs().max() > 0, key
    assert supernet.no_weight_decay() == set()


def test_probed_widths_get_a_gradient_too() -> None:
    """The gradient of a width of weight 0 comes from the extra layer, not from the
    predictors, whose BN would turn a zero map into something else.
    """
    space = detectors()
    supernet, picks = supernet_of(space).train(), space.at([0] * len(space.choices))
    gates = {
        key: torch.tensor(gate, dtype=torch.float32, requires_grad=True)
        for key, gate in one_hot(picks, space).items()
    }
    logits, codes = supernet(images(), gates, {"s3.width": (1,)})
    (logits.square().mean() + codes.square().mean()).backward()
    gradient = gates["s3.width"].grad
    assert gradient is not None and gradient[1] != 0


def test_sigmoid_scores_start_at_one_percent() -> None:
    supernet = supernet_of(detectors()).eval()
    logits, _ = supernet(
        images(), one_hot(detectors().at([0] * len(detectors().choices)), detectors())
    )
    assert torch.sigmoid(logits[..., 1:]).mean().item() == pytest.approx(0.01, rel=0.2)


def test_a_super_net_of_detectors_is_saved_with_its_space(tmp_path: Path) -> None:
    supernet = supernet_of(detectors())
    supernet.save(tmp_path / "shared.safetensors")
    again = load_supernet(tmp_path / "shared.safetensors", detectors())
    assert all(
        torch.equal(again.state_dict()[name], tensor)
        for name, tensor in supernet.state_dict().items()
    )
    with pytest.raises(ConfigError, match="was trained on space boxes-ssdlite"):
        load_supernet(tmp_path / "shared.safetensors", classifiers())


@torch.no_grad()
def test_a_portfolio_holds_detectors() -> None:
    space = detectors()
    members = [space.sample(np.random.default_rng(seed)) for seed in range(2)]
    portfolio = IndependentNetworks(space, members, torch.Generator().manual_seed(0)).eval()
    network = portfolio.extract(members[1]).eval()
    for mine, theirs in zip(
        portfolio(images(), one_hot(members[1], space)), network(images()), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert portfolio.no_weight_decay() == set()


# inheritance


def test_slots_that_match_take_the_classifiers_weights(tmp_path: Path) -> None:
    """The other super-net has smaller images and another stage in the middle."""
    stages = classifiers().stages
    other = classifiers().model_copy(
        update={
            "stages": (*stages[:2], SpaceStage(widths=(16,), slots=(("ir_k3_e6",),)), *stages[3:]),
            "resolution": 32,
        }
    )
    source = supernet_of(MacroSpace.model_validate(other.model_dump()), seed=5)
    source.save(tmp_path / "shared.safetensors")
    supernet = supernet_of(detectors())
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    inherited = supernet.load_backbone(tmp_path / "shared.safetensors")
    assert inherited.taken == ("s0.b0", "s1.b0", "s1.b1", "s3.b1", "s3.b2") and inherited.left == (
        "s2.b0",
        "s2.b1",
        "s3.b0",
    )
    assert (
        str(inherited)
        == "5 of 8 slots have inherited weights; s2.b0, s2.b1, s3.b0 start from scratch"
    )
    for position, slot in enumerate(supernet.proxy.slots):
        for name, tensor in supernet.slots[position].state_dict().items():
            taken = slot.key in inherited.taken
            matching = [
                module
                for module, theirs in zip(source.slots, source.proxy.slots, strict=True)
                if theirs.key == slot.key
            ]
            expected = (
                matching[0].state_dict()[name] if taken else before[f"slots.{position}.{name}"]
            )
            assert torch.equal(tensor, expected), (slot.key, name)
    assert all(
        torch.equal(supernet.state_dict()[name], tensor)
        for name, tensor in before.items()
        if name.startswith("detector.")
    )


def test_a_super_net_without_a_common_slot_is_refused(tmp_path: Path) -> None:
    stages = (
        SpaceStage(widths=(12,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(20,), stride=2, slots=(("ir_k3_e3",),)),
    )
    foreign = MacroSpace(name="foreign", resolution=64, classes=3, stages=stages)
    supernet_of(foreign).save(tmp_path / "shared.safetensors")
    with pytest.raises(
        ConfigError,
        match=(
            "of space foreign has no slot in common with space boxes-ssdlite: train it on the same"
            " space"
        ),
    ):
        supernet_of(detectors()).load_backbone(tmp_path / "shared.safetensors")
    cells = nasbench201(width=0.25, resolution=8)
    make_supernet(cells, torch.Generator().manual_seed(0)).save(tmp_path / "shared.safetensors")
    with pytest.raises(
        ConfigError, match="of space nasbench201 has no slot in common with space boxes-ssdlite"
    ):
        supernet_of(detectors()).load_backbone(tmp_path / "shared.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        supernet_of(detectors()).load_backbone(tmp_path / "broken.safetensors")
