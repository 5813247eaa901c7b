"""The 14 heuristics of "How to Train Your Super-Net", one by one: each does what its
definition says.

Yu, Ranftl, Salzmann (arXiv 2003.04276, arXiv 2110.01154). The fourteenth, the sampling
of paths, is the strategy ``spos``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import DataConfig, OptimizerConfig, SearchConfig, SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.spaces import mobile32, proxylessnas_enlarged
from hwnas.data.images import Portion, load_images
from hwnas.engine import Engine, steps_of
from hwnas.errors import ConfigError
from hwnas.nn.slot import Width, slot_gates
from hwnas.nn.supernet import MacroSupernet, resized
from hwnas.search.proposal import one_hot
from hwnas.search.tunas import TuNAS
from hwnas.search.weights import Batches
from tests.nn.nets import (
    PLAIN,
    batch,
    depths_space,
    groups_space,
    kernels_space,
    random_picks,
    supernet_of,
    widths_space,
)

torch.set_num_threads(1)


def conv_of(supernet: MacroSupernet, position: int, name: str, source: int = 0) -> Any:
    """An elastic convolution of a super-net."""
    copies: Any = supernet.slots[position].copies
    return copies[source][name]


def test_the_defaults_are_those_of_tunas() -> None:
    config = SupernetConfig()
    assert (config.channels, config.operation_on, config.wsbn) == ("first", "node", False)
    assert (config.sharing, config.kernels) == ("auto", "auto")  # as in the method's paper
    assert (TuNAS.sharing, TuNAS.kernels) == ("collapsed", "own")
    assert (config.dropout, config.path_dropout, config.proxy_depth, config.proxy_width) == (
        0.0,
        0.0,
        None,
        1.0,
    )
    assert config.proxy_resolution is None
    assert (config.bn_affine, config.bn_track) == (True, False)
    search = SearchConfig()
    assert (search.data_portion, search.batch_size, search.epochs) == (1.0, 64, 20)
    assert (search.optimizer.lr, search.optimizer.weight_decay) == (0.165, 4e-5)


def narrow_space() -> MacroSpace:
    return MacroSpace(
        name="narrow",
        resolution=6,
        classes=3,
        stages=(SpaceStage(widths=(4, 8), slots=(("cn_k3",),)),),
    )


@pytest.mark.parametrize("method", ["first", "chunk", "random", "interpolation"])
def test_dynamic_channelling(method: Any) -> None:
    """A narrower layer uses the first filters, consecutive ones, any, or averages of
    neighbours.
    """
    supernet = supernet_of(narrow_space(), SupernetConfig(channels=method)).double()
    x_NCHW = batch(narrow_space())[0].double()
    part = conv_of(supernet, 0, "conv_k3")
    seen: set[tuple[int, ...]] = set()
    for seed in range(40):
        torch.manual_seed(seed)
        logits = supernet.train()(x_NCHW, {"s0.width": np.array([1.0, 0.0])})
        options = {
            "first": [[0, 1, 2, 3]],
            "chunk": [list(range(i, i + 4)) for i in range(5)],
            "random": [],
            "interpolation": [],
        }[method]
        if method == "random":
            torch.manual_seed(seed)
            options = [torch.randperm(8)[:4].sort().values.tolist()]
        taken = [
            tuple(index)
            for index in options
            if torch.allclose(logits, logits_of(supernet, x_NCHW, part, index), atol=1e-10)
        ]
        if method == "interpolation":
            assert torch.allclose(logits, logits_of(supernet, x_NCHW, part, None), atol=1e-10)
            break
        assert len(taken) == 1
        seen.update(taken)
    if method == "random":
        # of 70 possible choices, drawn 40 times
        assert len(seen) > 20
    else:
        assert len(seen) == {"first": 1, "chunk": 5, "interpolation": 0}[method]
    evaluated = supernet.eval()(x_NCHW, {"s0.width": np.array([1.0, 0.0])})
    index = None if method == "interpolation" else [0, 1, 2, 3]
    assert torch.allclose(evaluated, logits_of(supernet, x_NCHW, part, index), atol=1e-10)


def logits_of(
    supernet: MacroSupernet, x_NCHW: Tensor, part: Any, index: list[int] | None
) -> Tensor:
    """Logits of the layer with some of its filters, or (None) averages of pairs."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2)).mean(1) if index is None else tensor[index]

    x_NCHW = F.conv2d(x_NCHW, kept(part.conv.weight), padding=1)
    x_NCHW = F.batch_norm(
        x_NCHW,
        None,
        None,
        kept(part.norms[0].weight),
        kept(part.norms[0].bias),
        training=True,
        eps=1e-3,
    )
    return F.linear(
        F.relu(x_NCHW).mean((2, 3)), supernet.classifier.weight[:, :4], supernet.classifier.bias
    )


@pytest.mark.parametrize("kernels", ["ofa", "ofa_transform"])
@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
def test_ofa_kernel(kernels: Any, sharing: Any) -> None:
    """One largest kernel and one BN per slot, with its centres as smaller kernels.
    Transforms start as the identity and are trained.
    """
    space = kernels_space()
    supernet = supernet_of(space, SupernetConfig(kernels=kernels, sharing=sharing)).double()
    prefix = "ir_e3_se0_25|" if sharing == "separate" else ""
    assert [
        name for name, _ in supernet.slots[1].copies[0].named_children() if "depthwise" in name
    ] == [f"{prefix}depthwise"]
    part = conv_of(supernet, 1, f"{prefix}depthwise")
    assert part.conv.kernel_size == (7, 7)
    x_NCHW = torch.randn(4, 8, 8, 8).double()
    weight, width = part.conv.weight.detach().clone(), Width(8, 8)
    with torch.no_grad():
        part.conv.weight[:, :, 2:5, 2:5] = 0  # the 3 x 3 centre
        module = supernet.slots[1]
        assert torch.equal(
            module(x_NCHW, slot_gates(module.slot, np.eye(3)[0]), width, width).std((0, 2, 3))
            < 1e-6,
            torch.ones(8) > 0,
        )
        part.conv.weight.copy_(weight)
    network = supernet.extract({"s1.b0": "ir_k3_e3_se0.25", "s1.b1": "skip"})
    assert torch.equal(network.blocks[1].layers.depthwise.conv.weight, weight[:, :, 2:5, 2:5])
    loss = supernet(
        batch(space)[0].double(), one_hot({"s1.b0": "ir_k3_e3_se0.25", "s1.b1": "skip"}, space)
    ).sum()
    loss.backward()
    border = part.conv.weight.grad.clone()
    border[:, :, 2:5, 2:5] = 0
    assert border.abs().sum() == 0
    assert part.conv.weight.grad.abs().sum() > 0
    assert [matrix.grad is not None for matrix in part.transforms.values()] == [True] * (
        2 if kernels == "ofa_transform" else 0
    )


def skippable_space() -> MacroSpace:
    """A space whose last slot may take its input from any of the three before it."""
    stages = (
        SpaceStage(
            widths=(8,),
            slots=(("cn_k3",), ("ir_k3_e3", "skip"), ("ir_k3_e3", "skip"), ("ir_k3_e3",)),
        ),
    )
    return MacroSpace(name="skippable", resolution=6, classes=3, stages=stages)


PATHS: dict[tuple[str, str], int] = {
    ("ir_k3_e3", "ir_k3_e3"): 0,
    ("skip", "ir_k3_e3"): 0,
    ("ir_k3_e3", "skip"): 1,
    ("skip", "skip"): 2,
}
"""How many slots the last slot's input passes over, by the options of the two slots
before it.
"""


def touched(supernet: MacroSupernet, options: tuple[str, str]) -> dict[str, set[int]]:
    """Indices of the copies and norms of the last slot that a step trains."""
    space = skippable_space()
    x_NCHW, y = batch(space)
    supernet.zero_grad(set_to_none=True)
    F.cross_entropy(
        supernet(x_NCHW, one_hot({"s0.b1": options[0], "s0.b2": options[1]}, space)), y
    ).backward()
    copies: Any = supernet.slots[3].copies
    trained = [
        (i, name)
        for i, copy in enumerate(copies)
        for name, p in copy.named_parameters()
        if p.grad is not None
    ]
    norms = {int(name.split(".")[2]) for _, name in trained if ".norms." in name}
    return {"copies": {i for i, _ in trained}, "norms": norms}


@pytest.mark.parametrize("track", [False, True])
def test_wsbn(track: bool) -> None:
    """A slot has separate scales, shifts and running statistics for each slot that its
    input may come from; convolutions are shared.
    """
    supernet = supernet_of(skippable_space(), SupernetConfig(wsbn=True, bn_track=track))
    assert [len(conv_of(supernet, position, "expand").norms) for position in (1, 2, 3)] == [1, 2, 3]
    for options, far in PATHS.items():
        before = [
            norm.running_mean.clone() if track else None
            for norm in conv_of(supernet, 3, "expand").norms
        ]
        assert touched(supernet, options) == {"copies": {0}, "norms": {far}}
        if track:
            after = [norm.running_mean for norm in conv_of(supernet, 3, "expand").norms]
            assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
                i == far for i in range(3)
            ]
    network = supernet.extract({"s0.b1": "skip", "s0.b2": "skip"})
    assert torch.equal(
        network.blocks[1].layers.expand.norm.weight, conv_of(supernet, 3, "expand").norms[2].weight
    )


def test_operation_on_node_or_edge() -> None:
    """On edges, a slot has separate weights for each slot that its input may come from;
    on nodes, it has one set.
    """
    edge = supernet_of(skippable_space(), SupernetConfig(operation_on="edge"))
    node = supernet_of(skippable_space(), SupernetConfig(operation_on="node"))
    assert [len(module.copies) for module in edge.slots] == [1, 1, 2, 3]
    assert [len(module.copies) for module in node.slots] == [1, 1, 1, 1]
    for options, far in PATHS.items():
        assert touched(edge, options)["copies"] == {far}
        assert touched(node, options)["copies"] == {0}
    network = edge.extract({"s0.b1": "skip", "s0.b2": "skip"})
    assert torch.equal(
        network.blocks[1].layers.expand.conv.weight, conv_of(edge, 3, "expand", 2).conv.weight
    )


@pytest.mark.parametrize("make", [groups_space, depths_space, skippable_space])
@pytest.mark.parametrize(
    "config", [{"wsbn": True}, {"operation_on": "edge"}, {"operation_on": "op"}]
)
def test_the_producer_may_be_in_any_earlier_stage(make: Any, config: dict[str, Any]) -> None:
    """Even if a stage's first slot is skipped or its depth omits the last ones."""
    space = make()
    supernet = supernet_of(space, SupernetConfig(**config)).double()
    x_NCHW = batch(space)[0].double()
    for picks in random_picks(space, 12):
        network = supernet.extract(picks).train()
        logits = supernet(x_NCHW, one_hot(picks, space))
        assert torch.allclose(logits, network(resized(x_NCHW, network.arch.resolution)), atol=1e-10)


def test_global_dropout() -> None:
    """On the pooled features before the classifier, in training only."""
    space = kernels_space()
    supernet = supernet_of(space, SupernetConfig(dropout=0.4))
    plain = supernet_of(space)
    x_NCHW, gates = batch(space)[0], one_hot(random_picks(space, 0)[0], space)
    features: list[Tensor] = []
    plain.classifier.dropout.register_forward_hook(
        lambda module, args, output: features.append(output)
    )
    evaluated = plain(x_NCHW, gates)
    assert torch.equal(supernet.eval()(x_NCHW, gates), evaluated)
    torch.manual_seed(4)
    logits = supernet.train()(x_NCHW, gates)
    torch.manual_seed(4)
    expected = F.linear(
        F.dropout(features[0], 0.4), supernet.classifier.weight, supernet.classifier.bias
    )
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, evaluated)


def test_path_dropout() -> None:
    """NAO's schedule: keep = 1 - rate * layer / layers * progress. A residual branch is
    dropped for whole images and otherwise scaled by 1 / keep.
    """
    supernet = supernet_of(skippable_space(), SupernetConfig(path_dropout=0.6)).double()
    module, width = supernet.slots[3], Width(8, 8)
    x_NCHW, gates = torch.randn(512, 8, 6, 6).double(), slot_gates(module.slot, None)
    branch = module(x_NCHW, gates, width, width) - x_NCHW
    keeps = []
    for fraction in (0.0, 0.5, 1.0):
        supernet.fraction = fraction
        seen: list[Any] = []
        handle = module.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[-1])
        )
        supernet(
            batch(skippable_space())[0].double(),
            one_hot({"s0.b1": "skip", "s0.b2": "skip"}, skippable_space()),
        )
        handle.remove()
        assert seen[0].keep_path == pytest.approx(1 - 0.6 * 4 / 4 * fraction)
        torch.manual_seed(0)
        dropped = module(x_NCHW, gates, width, width, seen[0]) - x_NCHW
        kept_N = dropped.abs().sum((1, 2, 3)) > 1e-9
        assert torch.allclose(dropped[kept_N], branch[kept_N] / seen[0].keep_path, atol=1e-9)
        keeps.append(float(kept_N.double().mean()))
        assert torch.equal(
            module.eval()(x_NCHW, gates, width, width, seen[0]),
            module.train()(x_NCHW, gates, width, width),
        )
    # about three standard errors over 512 images
    assert keeps == [1.0, pytest.approx(0.7, abs=0.07), pytest.approx(0.4, abs=0.07)]
    assert [round(supernet._keep_path(position), 6) for position in range(4)] == [
        0.85,
        0.7,
        0.55,
        0.4,
    ]
    first = supernet.slots[0]  # no residual, so nothing to drop
    x_NCHW = torch.randn(4, 3, 6, 6).double()
    full = first(x_NCHW, slot_gates(first.slot, None), Width(3, 3), width)
    assert torch.equal(
        first(x_NCHW, slot_gates(first.slot, None), Width(3, 3), width, seen[0]), full
    )


def test_number_of_layers() -> None:
    """proxy_depth d trains the first d slots of every stage and leaves out the
    others.
    """
    space = mobile32(resolution=16)
    supernet = supernet_of(space, SupernetConfig(proxy_depth=2))
    picks = {choice.key: choice.options[0] for choice in space.choices}
    assert len(space.decode(picks).blocks) == 17
    arch = supernet.arch(picks)
    kept = [
        block
        for block, slot in zip(space.decode(picks).blocks, space.slots, strict=False)
        if slot.index < 2
    ]
    assert arch.blocks == (*kept, space.decode(picks).blocks[-1])
    x_NCHW, y = batch(space)
    logits = supernet(x_NCHW, one_hot(picks, space))
    assert torch.allclose(logits, supernet.extract(picks).train()(x_NCHW), atol=1e-5)
    F.cross_entropy(logits, y).backward()
    for slot, module in zip(space.slots, supernet.slots, strict=True):
        assert any(p.grad is not None for p in module.parameters()) == (slot.index < 2)


def test_number_of_channels() -> None:
    """proxy_width scales every stage but the last, in multiples of 8; picks name the
    same choices.
    """
    space = mobile32(resolution=16)
    supernet = supernet_of(space, SupernetConfig(proxy_width=0.5))
    picks = space.sample(np.random.default_rng(0))
    assert supernet.arch(picks).blocks == space.scaled(0.5).decode(picks).blocks
    assert [stage.widths[0] for stage in supernet.proxy.stages] == [8, 8, 16, 24, 32, 48, 80, 320]
    x_NCHW, _ = batch(space)
    assert torch.allclose(
        supernet(x_NCHW, one_hot(picks, space)), supernet.extract(picks).train()(x_NCHW), atol=1e-5
    )
    # the searched widths of that space would merge
    with pytest.raises(ConfigError, match=r"proxy_width = 0\.25"):
        MacroSupernet(
            proxylessnas_enlarged(resolution=32, classes=10),
            torch.Generator(),
            SupernetConfig(proxy_width=0.25),
        )


def test_number_of_pixels() -> None:
    """proxy_resolution trains on smaller images until the last part of the steps;
    evaluation takes images as they are.
    """
    space = mobile32(resolution=16)
    supernet = supernet_of(space, SupernetConfig(proxy_resolution=8, full_resolution=0.25))
    picks = space.sample(np.random.default_rng(0))
    network, gates, (x_NCHW, _) = supernet.extract(picks), one_hot(picks, space), batch(space)
    small, full = network.train()(resized(x_NCHW, 8)), network.train()(x_NCHW)
    assert not torch.allclose(small, full, atol=1e-2)
    for fraction, mode, expected in (
        (0.0, True, small),
        (0.74, True, small),
        (0.75, True, full),
        (0.0, False, full),
    ):
        supernet.fraction = fraction
        assert torch.allclose(supernet.train(mode)(x_NCHW, gates), expected, atol=1e-5), (
            fraction,
            mode,
        )
    with pytest.raises(
        ConfigError, match=r"proxy_resolution = 16 must be below the 16 px of space mobile32"
    ):
        supernet_of(space, SupernetConfig(proxy_resolution=16))
    with pytest.raises(ConfigError, match="resolutions to choose from"):
        supernet_of(depths_space(), SupernetConfig(proxy_resolution=8))
    with pytest.raises(ConfigError, match="a detector's anchors"):
        supernet_of(space.with_detector(), SupernetConfig(proxy_resolution=8))
    with pytest.raises(
        ValueError, match=r"full_resolution = 0\.5 says when a proxy_resolution ends"
    ):
        SupernetConfig(full_resolution=0.5)


def digits(portion: float) -> tuple[Portion, Any]:
    config = DataConfig(
        name="digits", resolution=8, channels=1, mean=(0.3,), std=(0.4,), augment="none"
    )
    images = load_images(config, "train")
    return Portion(images, portion), images


def test_portion_of_the_training_data() -> None:
    """A fixed random part with every class, whatever the seed of the run; epochs are
    counted on that part.
    """
    part, images = digits(0.25)
    assert len(part) == round(0.25 * len(images))
    assert part.kept.tolist() == digits(0.25)[0].kept.tolist() == sorted(set(part.kept.tolist()))
    assert part.kept.tolist() != list(range(len(part)))
    assert len(set(part.labels.tolist())) == 10
    x_NCHW, y = part.__getitems__([(0, 0), (5, 0)])
    assert torch.equal(
        x_NCHW, images.__getitems__([(int(part.kept[0]), 0), (int(part.kept[5]), 0)])[0]
    )
    assert y.tolist() == part.labels[[0, 5]].tolist()
    assert steps_of(4, len(part), 16) == round(4 * len(part) / 16)


@pytest.mark.parametrize("size", [8, 32])
def test_batch_size(size: int) -> None:
    """The number of images in training and held-out batches; the next test has the
    learning rate that follows from it.
    """
    part, images = digits(0.5)
    batches = Batches(part, images, DataConfig(), size, 0, 10)
    assert [
        len(y) for y in (batches.train(0)[1], batches.held_out(0, 1)[1], batches.held_out(0, 4)[1])
    ] == [size, size, 4 * size]


def engine_of(
    model: nn.Module, folder: Path, size: int = 64, steps: int = 100, **settings: Any
) -> Engine:
    return Engine(model, OptimizerConfig(**settings), steps, size, 0, folder)


def test_learning_rate_and_epochs(tmp_path: Path) -> None:
    """lr is per 256 images and scales linearly; warm-up, then a cosine to 0 at the end
    of the epochs.
    """
    model = nn.Linear(2, 2)
    engine = engine_of(model, tmp_path, size=128, name="momentum", lr=0.4, warmup=0.1)
    rates = []
    for step in (0, 10, 55, 99):
        engine.step = step
        rates.append(engine.lr)
    cosine = [0.1 * (1 + math.cos(math.pi * (step / 100 - 0.1) / 0.9)) for step in (10, 55, 99)]
    # 0.4 * 128 / 256 = 0.2, reached after 10 steps of warm-up
    assert rates == pytest.approx([0.2 / 11, *cosine])
    assert engine_of(model, tmp_path, size=32, lr=0.4).base_lr == pytest.approx(0.05)
    assert steps_of(20, 640, 64) == 200


def test_weight_decay(tmp_path: Path) -> None:
    """Adds wd * w to the gradients of convolutions, but not to those of BN, biases, the
    classifier, or weights that the step does not use.
    """
    space = kernels_space()
    picks: Picks = {"s1.b0": "ir_k3_e3_se0.25", "s1.b1": "skip"}
    x_NCHW, y = batch(space)
    after = {}
    for decay in (0.0, 0.5):
        supernet = supernet_of(space)
        engine = engine_of(
            supernet,
            tmp_path,
            name="momentum",
            lr=0.4,
            momentum=0.0,
            weight_decay=decay,
            warmup=0.0,
        )
        engine.train_step(x_NCHW, y, one_hot(picks, space))
        after[decay] = {name: parameter.detach() for name, parameter in supernet.named_parameters()}
    used = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    before = dict(supernet_of(space).named_parameters())
    for name, parameter in after[0.5].items():
        decays = name in used and parameter.ndim > 1 and not name.startswith("classifier")
        # the learning rate is 0.4 * 64 / 256 = 0.1
        expected = after[0.0][name] - (0.1 * 0.5 * before[name].detach() if decays else 0.0)
        assert torch.allclose(parameter, expected, atol=1e-6), name
        assert name in used or torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_bn_setting(affine: bool, track: bool) -> None:
    """Affine: norms have a scale and a shift. Tracked: running statistics are kept and
    used in evaluation; otherwise those of the batch are.
    """
    space = kernels_space()
    supernet = supernet_of(space, SupernetConfig(bn_affine=affine, bn_track=track)).double()
    norms = [norm for norm in supernet.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert (
        {norm.weight is not None for norm in norms}
        == {norm.bias is not None for norm in norms}
        == {affine}
    )
    assert {norm.running_mean is not None for norm in norms} == {track}
    picks = random_picks(space, 0)[0]
    x_NCHW, gates = batch(space)[0].double(), one_hot(picks, space)
    for _ in range(5):
        supernet.train()(3 * x_NCHW + 1, gates)
    evaluated, trained = supernet.eval()(x_NCHW, gates), supernet.train()(x_NCHW, gates)
    assert torch.allclose(evaluated, trained) == (not track)
    halves = torch.cat([supernet.eval()(x_NCHW[:3], gates), supernet.eval()(x_NCHW[3:], gates)])
    # one image's logits do not depend on the others'
    assert torch.allclose(supernet.eval()(x_NCHW, gates), halves) == track
    network = supernet.extract(picks)
    assert torch.allclose(
        network.train(not track)(x_NCHW), supernet.eval()(x_NCHW, gates), atol=1e-10
    )


EVERYTHING: dict[str, dict[str, Any]] = {
    "interpolation": {"channels": "interpolation"},
    "chunk": {"channels": "chunk"},
    "random": {"channels": "random"},
    "ofa": {"kernels": "ofa"},
    "ofa_transform": {"kernels": "ofa_transform"},
    "edge": {"operation_on": "edge"},
    "op": {"operation_on": "op"},
    "wsbn": {"wsbn": True},
    "depth": {"proxy_depth": 1},
    "width": {"proxy_width": 0.8},
    "track": {"bn_track": True},
    "no affine": {"bn_affine": False},
    "dropouts": {"dropout": 0.5, "path_dropout": 0.5},
    "many": {
        "channels": "interpolation",
        "kernels": "ofa_transform",
        "operation_on": "edge",
        "wsbn": True,
        "proxy_depth": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_the_extracted_network_is_the_path_under_every_heuristic(name: str, sharing: Any) -> None:
    """In evaluation mode, where nothing is random, with transforms and statistics away
    from their initial values.
    """
    for space in (widths_space(), depths_space(), kernels_space()):
        if name == "width":
            space = MacroSpace.model_validate({**space.model_dump(), "stages": wider(space)})
        supernet = supernet_of(space, SupernetConfig(sharing=sharing, **EVERYTHING[name])).double()
        with torch.no_grad():
            for key, tensor in [*supernet.named_parameters(), *supernet.named_buffers()]:
                if "transforms" in key or "running" in key:
                    tensor.uniform_(0.1, 1.0)
        x_NCHW = batch(space)[0].double()
        supernet.eval()
        for picks in random_picks(space, 3):
            network = supernet.extract(picks).train(name != "track")
            logits = supernet(x_NCHW, one_hot(picks, space))
            assert logits.std() > 1e-3
            assert torch.allclose(
                logits, network(resized(x_NCHW, network.arch.resolution)), rtol=1e-9, atol=1e-9
            )
            assert not supernet.training


def wider(space: MacroSpace) -> list[dict[str, Any]]:
    """Stages whose widths stay different when scaled by 0.8."""
    return [
        {**stage.model_dump(), "widths": [4 * width for width in stage.widths]}
        for stage in space.stages
    ]


def test_options_that_share_kernels_still_run_separately_with_separate_sharing() -> None:
    """A mixture of OFA kernels with separate sharing is the mean of the outputs."""
    space = MacroSpace(
        name="one",
        resolution=6,
        classes=3,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3",), PLAIN)),),
    )
    supernet = supernet_of(space, SupernetConfig(kernels="ofa", sharing="separate")).double()
    module, width = supernet.slots[1], Width(8, 8)
    x_NCHW = torch.randn(4, 8, 6, 6).double()
    outputs = [
        module(x_NCHW, slot_gates(module.slot, np.eye(4)[i]), width, width) for i in range(4)
    ]
    mixed = module(x_NCHW, slot_gates(module.slot, np.full(4, 0.25)), width, width)
    assert torch.allclose(mixed, sum(outputs) / 4, atol=1e-12)
