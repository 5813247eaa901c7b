"""Starting from the weights of another network: timm's networks, runs of hwnas, and
super-nets. timm's own outputs are what ours have to be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hwnas.config import DataConfig, SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.ops import Classifier, Conv, DSConv, MBConv, Op
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import load_space, mobile32, published
from hwnas.errors import CheckpointError, ConfigError, HwnasError
from hwnas.nn.checkpoint import save_network
from hwnas.nn.network import Network, network_of
from hwnas.nn.pretrained import (
    Pretrained,
    load_pretrained,
    load_pretrained_supernet,
    pretrained_file,
    pretrained_hashes,
    read_pretrained,
)
from hwnas.nn.remapping import (
    SeedBlock,
    TargetBlock,
    begins_stage,
    remap,
    with_kernel,
)
from hwnas.nn.supernet import MacroSupernet
from tests.nn.nets import supernet_of

torch.set_num_threads(1)
KEY = "train.pretrained"


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """The module with other BN statistics, so that outputs depend on all of them."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def new(arch: Architecture, seed: int = 9) -> Network:
    return network_of(arch, generator=torch.Generator().manual_seed(seed)).eval()


def started(arch: Architecture, source: str | Path, model: str | None = None) -> Network:
    network = new(arch)
    load_pretrained(network, read_pretrained(str(source), model, KEY), KEY)
    return network


def logits(network: nn.Module, size: int = 64, channels: int = 3) -> Tensor:
    x_NCHW = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs: Tensor = network(x_NCHW)
    return outputs


# files of others


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mobilenetv2_050", "mobilenet_v2-w0.5"),
        ("mobilenetv3_small_050", "mobilenet_v3_small-w0.5"),
        ("mnasnet_050", "mnasnet_b1-w0.5"),
        ("efficientnet_lite0", "efficientnet_lite0"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_networks_compute_the_same_from_their_files(
    model: str, name: str, suffix: str, tmp_path: Path
) -> None:
    theirs = randomised(timm.create_model(model))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": theirs.state_dict()}, path)
    else:
        save_file(theirs.state_dict(), path)
    ours = started(published(name, resolution=64), path, model)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)


def test_a_classifier_of_other_classes_is_dropped(tmp_path: Path) -> None:
    arch = published("mobilenet_v2-w0.35", resolution=32)
    seed = randomised(new(arch, seed=1))
    torch.save(seed.state_dict(), tmp_path / "seed.pth")
    target = new(replaced(arch, classes=7))
    before = target.blocks[-1].state_dict()["linear.weight"].clone()
    text = load_pretrained(target, read_pretrained(str(tmp_path / "seed.pth"), None, KEY), KEY)
    assert "52 of 53 layers with" in text and "without the classifier of 1,000 classes" in text
    assert torch.equal(target.blocks[-1].state_dict()["linear.weight"], before)
    for ours, theirs in zip(target.blocks[:-1], seed.blocks[:-1], strict=True):
        for key, tensor in ours.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(tensor, theirs.state_dict()[key])


def replaced(arch: Architecture, classes: int) -> Architecture:
    *blocks, classifier = arch.blocks
    return arch.model_copy(update={"blocks": (*blocks, replace(classifier, out_ch=classes))})


def test_a_run_of_hwnas_is_a_source(tmp_path: Path) -> None:
    space = mobile32(classes=4)
    arch = space.decode(space.sample(np.random.default_rng(0)))
    seed = randomised(new(arch, seed=1))
    (tmp_path / "run" / "train").mkdir(parents=True)
    save_network(seed, tmp_path / "run" / "train" / "model.safetensors")
    for source in (tmp_path / "run", tmp_path / "run" / "train" / "model.safetensors"):
        ours = started(arch, source)
        assert torch.equal(logits(ours, 32, arch.in_channels), logits(seed, 32, arch.in_channels))


def test_the_hub_says_which_model_a_file_is_of(tmp_path: Path) -> None:
    theirs = randomised(timm.create_model("mobilenetv2_035"))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    arch = published("mobilenet_v2-w0.35", resolution=32)
    with pytest.raises(ConfigError, match=r"in which order its layers run: set train\.pretrained_"):
        started(arch, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "mobilenetv2_035"}))
    ours = started(arch, tmp_path)
    torch.testing.assert_close(logits(ours, 32), logits(theirs, 32), rtol=1e-4, atol=1e-4)


def test_a_name_of_timm_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "mobilenetv2_050"
    with pytest.raises(ConfigError, match="not in the cache of this computer: download them"):
        pretrained_file(name, KEY)
    url = timm.get_pretrained_cfg(name).url
    cached = tmp_path / "hub" / "checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    theirs = randomised(timm.create_model(name))
    torch.save(theirs.state_dict(), cached)
    ours = started(published("mobilenet_v2-w0.5", resolution=32), name)
    torch.testing.assert_close(logits(ours, 32), logits(theirs, 32), rtol=1e-4, atol=1e-4)


def test_another_normalisation_is_noted(tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv2_035").state_dict(), tmp_path / "a.pth")
    pretrained = read_pretrained(str(tmp_path / "a.pth"), "mobilenetv2_035", KEY)
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channels": 3}
    assert pretrained.note(DataConfig.model_validate(imagenet)) is None
    halves = {**imagenet, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    note = pretrained.note(DataConfig.model_validate(halves))
    assert note is not None and "data.mean = [0.485, 0.456, 0.406]" in note
    grey = {"mean": (0.5,), "std": (0.5,), "channels": 1}
    assert pretrained.note(DataConfig.model_validate(grey)) is None


def test_grey_images_get_the_sum_over_the_colours(tmp_path: Path) -> None:
    arch = published("mobilenet_v2-w0.35", resolution=32)
    seed = randomised(new(arch, seed=1))
    torch.save(seed.state_dict(), tmp_path / "seed.pth")
    grey = arch.model_copy(
        update={"in_channels": 1, "blocks": (replace(arch.blocks[0], in_ch=1), *arch.blocks[1:])}
    )
    ours = started(grey, tmp_path / "seed.pth")
    x_NCHW = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = seed(x_NCHW.expand(-1, 3, -1, -1))
        torch.testing.assert_close(ours(x_NCHW), expected, rtol=1e-4, atol=1e-4)


# other widths, depths and kernels


def small(
    width: int = 8, middle: int = 24, kernel: int = 3, depth: int = 2, se_ch: int = 0
) -> Architecture:
    """A stem, a stage of blocks, and a classifier of 5 classes."""
    first = MBConv(8, 4, width, 12, kernel=3, stride=2, act="relu6")
    later = MBConv(4, width, width, middle, kernel=kernel, se_ch=se_ch, act="relu6", residual=True)
    blocks: list[Op] = [Conv(16, 3, 4, kernel=3, stride=2, act="relu6"), first]
    blocks += [later] * depth
    blocks.append(Classifier(4, width, 5))
    return Architecture(name="small", in_channels=3, blocks=tuple(blocks))


def remapped(target: Architecture, seed: Network) -> Network:
    network = new(target)
    blocks = [
        SeedBlock(op, block.state_dict(), begins_stage(op))
        for op, block in zip(seed.arch.ops(), seed.blocks, strict=True)
    ]
    targets = [
        TargetBlock([(op, block.state_dict())], begins_stage(op))
        for op, block in zip(target.ops(), network.blocks, strict=True)
    ]
    remap(targets, blocks, sorts=False)
    return network


@pytest.mark.parametrize(
    "target",
    [
        small(width=12),
        small(middle=40),
        small(kernel=5),
        small(width=11, middle=31, kernel=7),
        small(se_ch=6),
    ],
    ids=["wider", "more expanded", "larger kernel", "all", "squeeze and excitation"],
)
def test_a_larger_network_computes_what_the_smaller_one_does(target: Architecture) -> None:
    seed = randomised(new(small(), seed=1))
    torch.testing.assert_close(
        logits(remapped(target, seed), 16), logits(seed, 16), rtol=1e-4, atol=1e-5
    )


def test_new_channels_can_learn() -> None:
    """What reads them starts at 0, but gets a gradient."""
    network = remapped(small(middle=40), randomised(new(small(), seed=1)))
    logits_NK = network(torch.randn(2, 3, 16, 16))
    logits_NK.square().sum().backward()
    projection = network.blocks[2].get_parameter("layers.project.conv.weight")
    assert not projection[:, 24:].any()
    assert projection.grad is not None
    # but for those that ReLU6 happens to cut off
    assert projection.grad[:, 24:].count_nonzero() > 0.5 * projection[:, 24:].numel()


def test_a_narrower_network_keeps_the_channels_that_matter() -> None:
    seed = randomised(new(small(), seed=1))
    with torch.no_grad():
        # 8 of 24 expanded channels are never read
        for block in seed.blocks[2:4]:
            block.get_parameter("layers.project.conv.weight")[:, 5:13] = 0
    torch.testing.assert_close(
        logits(remapped(small(middle=16), seed), 16), logits(seed, 16), rtol=1e-4, atol=1e-5
    )


def test_further_blocks_of_a_stage_take_the_weights_of_the_last_one() -> None:
    seed = randomised(new(small(depth=2), seed=1))
    network = remapped(small(depth=4), seed)
    states = [block.state_dict() for block in network.blocks]
    expected = [block.state_dict() for block in seed.blocks]
    for position, source in ((2, 2), (3, 3), (4, 3), (5, 3)):
        for key, tensor in states[position].items():
            assert torch.equal(tensor, expected[source][key]), (position, key)


@pytest.mark.parametrize(("size", "kernel"), [(5, 3), (7, 3), (3, 5), (3, 7), (5, 5)])
def test_kernels_have_one_centre(size: int, kernel: int) -> None:
    weight = torch.arange(2.0 * size**2).view(2, 1, size, size) + 1
    other = with_kernel(weight, kernel)
    assert other.shape == (2, 1, kernel, kernel)
    assert torch.equal(other[..., kernel // 2, kernel // 2], weight[..., size // 2, size // 2])
    assert other.count_nonzero() == 2 * min(size, kernel) ** 2


def test_stages_are_matched_by_width() -> None:
    """A seed without the middle stage: that stage starts anew but for what is alike."""
    seed = randomised(new(small(), seed=1))
    blocks = (
        Conv(16, 3, 4, kernel=3, stride=2, act="relu6"),
        MBConv(8, 4, 8, 12, kernel=3, stride=2, act="relu6"),
        MBConv(4, 8, 64, 24, kernel=3, act="relu6"),
        Classifier(4, 64, 5),
    )
    network = remapped(Architecture(name="deeper", in_channels=3, blocks=blocks), seed)
    for position in (0, 1):
        for key, tensor in seed.blocks[position].state_dict().items():
            assert torch.equal(network.blocks[position].state_dict()[key], tensor)


def test_a_separable_block_without_expansion_takes_its_channels_from_the_stream() -> None:
    def with_first(width: int) -> Architecture:
        blocks = (
            Conv(16, 3, width, kernel=3, stride=2, act="relu6"),
            DSConv(8, width, 8, kernel=3, act="relu6"),
            Classifier(8, 8, 5),
        )
        return Architecture(name="separable", in_channels=3, blocks=blocks)

    seed = randomised(new(with_first(12), seed=1))
    with torch.no_grad():
        dead = torch.tensor([2, 5, 7])
        seed.blocks[1].get_parameter("layers.project.conv.weight")[:, dead] = 0
        # the stem's BN scales say what is written
        seed.blocks[0].get_parameter("layers.conv.norm.weight")[dead] = 1e-6
    torch.testing.assert_close(
        logits(remapped(with_first(9), seed), 16), logits(seed, 16), rtol=1e-4, atol=1e-5
    )


# super-nets


@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
@pytest.mark.parametrize("kernels", ["own", "ofa", "ofa_transform"])
def test_a_super_net_contains_the_network_that_it_starts_from(
    sharing: Any, kernels: Any, tmp_path: Path
) -> None:
    """Its largest path has the seed's outputs, up to the order of channels."""
    space = mobile32(classes=4)
    options = [len(choice.options) - 1 for choice in space.choices]
    largest = max(
        (space.at([min(i, n) for n in options]) for i in range(max(options) + 1)),
        key=lambda picks: space.decode(picks).params,
    )
    arch = space.decode(largest)
    seed = randomised(new(arch, seed=1))
    save_network(seed, tmp_path / "model.safetensors")
    supernet = supernet_of(space, SupernetConfig(sharing=sharing, kernels=kernels))
    pretrained = read_pretrained(str(tmp_path), None, "search.pretrained")
    text = load_pretrained_supernet(supernet, pretrained, "search.pretrained")
    assert "layers" in text
    path = supernet.extract(largest).train()
    seed.train()
    x_NCHW = torch.randn(8, arch.in_channels, 32, 32)
    torch.testing.assert_close(path(x_NCHW), seed(x_NCHW), rtol=1e-3, atol=1e-4)


def test_every_option_of_a_super_net_starts_from_the_weights(tmp_path: Path) -> None:
    space = mobile32(classes=4)
    arch = space.decode(space.sample(np.random.default_rng(0)))
    save_network(randomised(new(arch, seed=1)), tmp_path / "model.safetensors")
    pretrained = read_pretrained(str(tmp_path), None, "search.pretrained")
    supernet: MacroSupernet = supernet_of(space, SupernetConfig(sharing="separate"))
    fresh = supernet_of(space, SupernetConfig(sharing="separate"))
    load_pretrained_supernet(supernet, pretrained, "search.pretrained")
    depthwise = [
        name
        for name, _ in supernet.named_parameters()
        if "depthwise" in name and name.endswith("conv.weight")
    ]
    assert len(depthwise) > 40
    before = dict(fresh.named_parameters())
    kept = [
        name
        for name, weight in supernet.named_parameters()
        if name in depthwise and torch.equal(weight, before[name])
    ]
    assert not kept


# refused


def resnet(tmp_path: Path) -> Path:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    return tmp_path / "resnet.pth"


def pickled(tmp_path: Path) -> Path:
    torch.save({"model": Harmful()}, tmp_path / "pickle.pth")
    return tmp_path / "pickle.pth"


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def cut_off(tmp_path: Path) -> Path:
    path = resnet(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def no_tensors(tmp_path: Path) -> Path:
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    return tmp_path / "numbers.pth"


def super_net(tmp_path: Path) -> Path:
    supernet_of(mobile32(classes=4)).save(tmp_path / "shared.safetensors")
    return tmp_path / "shared.safetensors"


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (resnet, ConfigError, "is not a network of mobile blocks: a layer reads"),
        (pickled, CheckpointError, "does not hold weights that can be read safely"),
        (cut_off, CheckpointError, "does not hold weights that can be read safely"),
        (no_tensors, CheckpointError, "holds no tensors, neither at the top nor under"),
        (super_net, ConfigError, "is a super-net: name a trained network"),
        (lambda path: path, ConfigError, r"has no model\.safetensors"),
        (lambda path: path / "absent.pth", ConfigError, "does not exist: check the path"),
        (lambda path: "mobilenetv2_50", ConfigError, "did you mean 'mobilenetv2_050'"),
    ],
    ids=["resnet", "pickle", "cut off", "no tensors", "super-net", "folder", "absent", "name"],
)
def test_bad_sources_are_refused_in_one_sentence(
    made: Callable[[Path], Path | str], error: type[HwnasError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        read_pretrained(str(made(tmp_path)), None, KEY)
    assert "\n" not in str(caught.value)


def test_another_model_than_the_files_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("mobilenetv2_035").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"pretrained_model = 'mnasnet_050' is not the model of"):
        read_pretrained(str(tmp_path / "a.safetensors"), "mnasnet_050", KEY)
    with pytest.raises(ConfigError, match="'mnasnet_5' is not a model of timm; did you mean"):
        read_pretrained(str(tmp_path / "a.safetensors"), "mnasnet_5", KEY)


def test_weights_that_hardly_fit_are_refused(tmp_path: Path) -> None:
    """Universal inverted bottlenecks have few layers in common with plain ones."""
    torch.save(new(small(), seed=1).state_dict(), tmp_path / "seed.pth")
    pretrained = read_pretrained(str(tmp_path / "seed.pth"), None, KEY)
    network = new(published("mobilenet_v4_conv_small", resolution=64))
    with pytest.raises(ConfigError, match=r"of the weights can start from .*seed\.pth: name"):
        load_pretrained(network, pretrained, KEY)


# found by a second reader


def test_a_shared_projection_serves_options_with_and_without_squeeze_and_excitation() -> None:
    """Also if the super-net tracks BN statistics."""
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(widths=(12,), stride=2, slots=(("ir_k3_e3", "ir_k3_e3_se0.25"),)),
        SpaceStage(widths=(16,), slots=(("cn_k1",),)),
    )
    space = MacroSpace(name="squeezed", resolution=16, in_channels=3, classes=4, stages=stages)
    plain = space.at([0])
    seed = randomised(new(space.decode(plain), seed=1))
    supernet = supernet_of(space, SupernetConfig(sharing="collapsed", bn_track=True))
    blocks = tuple(
        SeedBlock(op, block.state_dict(), begins_stage(op))
        for op, block in zip(seed.arch.ops(), seed.blocks, strict=True)
    )
    load_pretrained_supernet(supernet, Pretrained(blocks, "seed"), "search.pretrained")
    found = logits(supernet.extract(plain).train(), 16)
    torch.testing.assert_close(found, logits(seed.train(), 16), rtol=1e-3, atol=1e-4)


def test_the_slopes_of_a_prelu_are_no_scales_of_a_norm(tmp_path: Path) -> None:
    arch = published("mobilenet_v2-w0.35", resolution=32)
    seed = randomised(new(arch, seed=1))
    state = {}
    for name, tensor in seed.state_dict().items():
        state[name] = tensor
        if name.endswith("norm.running_var"):
            state[name.replace("norm.running_var", "act.weight")] = torch.full_like(tensor, 0.25)
    torch.save(state, tmp_path / "a.pth")
    ours = started(arch, tmp_path / "a.pth")
    assert torch.equal(logits(ours, 32), logits(seed, 32))


def nasbench(tmp_path: Path) -> Path:
    space = load_space("nasbench201")
    network = network_of(space.decode(space.sample(np.random.default_rng(0))))
    save_network(network, tmp_path / "cells.safetensors")
    return tmp_path / "cells.safetensors"


def changed(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    state = dict(new(published("mobilenet_v2-w0.35", resolution=32)).state_dict())
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def without_a_block(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]


def not_finite(state: dict[str, Tensor]) -> None:
    state["blocks.3.layers.expand.conv.weight"] = torch.full((48, 8, 1, 1), torch.nan)


def oblong(state: dict[str, Tensor]) -> None:
    state["blocks.0.layers.conv.conv.weight"] = torch.zeros(16, 3, 1, 3)


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (nasbench, ConfigError, "a graph of cells: name a network of blocks in a chain"),
        (lambda path: changed(path, without_a_block), ConfigError, "so the layers are no chain"),
        (lambda path: changed(path, not_finite), CheckpointError, "values that are not finite"),
        (lambda path: changed(path, oblong), ConfigError, r"kernel of blocks\.0.* is not square"),
    ],
    ids=["cells", "no chain", "not finite", "oblong"],
)
def test_networks_that_cannot_be_remapped_are_refused(
    made: Callable[[Path], Path], error: type[HwnasError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        read_pretrained(str(made(tmp_path)), None, KEY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_reported_as_such(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    torch.save(new(small()).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(damaged), 8):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(bytes(damaged[: int(rng.integers(1, len(damaged)))]))
        try:
            read_pretrained(str(path), None, KEY)
        except HwnasError as error:
            assert "\n" not in str(error)


def test_the_model_by_which_a_file_is_read_is_an_input(tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv2_050").state_dict(), tmp_path / "a.pth")
    path = str(tmp_path / "a.pth")
    unnamed = pretrained_hashes(path, None, KEY)
    named = pretrained_hashes(path, "mobilenetv2_050", KEY)
    assert unnamed["pretrained"] == named["pretrained"] and unnamed != named


def test_images_of_other_than_three_channels_are_not_adapted(tmp_path: Path) -> None:
    arch = published("mobilenet_v2-w0.35", resolution=32)
    grey = arch.model_copy(
        update={"in_channels": 1, "blocks": (replace(arch.blocks[0], in_ch=1), *arch.blocks[1:])}
    )
    torch.save(new(grey).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(ConfigError, match=r"is for images of 1 channels, and data\.channels = 3"):
        started(arch, tmp_path / "grey.pth")
