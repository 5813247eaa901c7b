"""Reads the weights of a trained network, from hwnas, timm or elsewhere, as the start of
another network.

Only the shapes of layers and their order say what a network is, so no list of names has
to be kept up: a convolution with one filter per channel is depthwise, what widens its
input before it is the expansion, and what follows is the projection, with
squeeze-and-excitation in between if two layers without BN narrow and widen again.

PyTorch's files keep the order of the layers. Those of safetensors do not, so they need
the name of timm's model, unless hwnas wrote them, or a ``config.json`` beside the file
names the model, as on the Hugging Face Hub. Files are opened without unpickling
anything but tensors, and nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from hwnas.config import DataConfig
from hwnas.core.ops import Classifier, Conv, Head, Op, separable
from hwnas.document import file_sha256, nearest, user_path
from hwnas.errors import CheckpointError, ConfigError, SpaceError
from hwnas.failures import is_out_of_memory
from hwnas.nn.checkpoint import first_line, load_network
from hwnas.nn.network import Network
from hwnas.nn.remapping import (
    SeedBlock,
    State,
    TargetBlock,
    begins_stage,
    remap,
)
from hwnas.nn.shared import GatedNetworks

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""

RGB = 3
"""Channels of the images whose weights can be adapted to others."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
"""What the names of weight files end in."""
LEAST_SHARE = 0.1
"""The smallest share of the weights that is worth starting from (our choice)."""


@dataclass(frozen=True)
class Pretrained:
    """The blocks of a trained network, and where they come from. ``bn_eps`` is the epsilon
    of its BNs, if it is known.
    """

    blocks: tuple[SeedBlock, ...]
    title: str
    bn_eps: float | None = None
    normalisation: Normalisation | None = None
    """Mean and standard deviation of each channel of the images that it was trained on, if
    they are known.
    """

    def note(self, data: DataConfig) -> str | None:
        """What to change if the images are normalised differently from those of the weights;
        None if they are not, or if that is unknown.
        """
        if self.normalisation is None or data.channels != len(self.normalisation[0]):
            return None
        if np.allclose(self.normalisation, (data.mean, data.std), atol=0.01):
            return None
        mean, std = (list(values) for values in self.normalisation)
        return (
            f"note: {self.title} was trained on images normalised by data.mean = {mean} and"
            f" data.std = {std}: set them for a better start."
        )

    def with_bn_eps(self, bn_eps: float) -> Pretrained:
        """Rescaled so that the BNs compute the same with another epsilon."""
        if self.bn_eps in (None, bn_eps):
            return self
        blocks = []
        for block in self.blocks:
            state = dict(block.state)
            for name, variance in block.state.items():
                if name.endswith("norm.running_var"):
                    scale = name.removesuffix("running_var") + "weight"
                    factor = ((variance + bn_eps) / (variance + self.bn_eps)).sqrt()
                    state[scale] = state[scale] * factor
            blocks.append(replace(block, state=state))
        return replace(self, blocks=tuple(blocks), bn_eps=bn_eps)

    def with_channels(self, channels: int) -> Pretrained:
        """For images of another number of channels, by timm's ``adapt_input_conv``: one
        channel gets the sum of the weights of all.
        """
        stem = self.blocks[0]
        if stem.op.in_ch == channels:
            return self
        node = stem.op.layers[0]
        name = f"{stem.op.WEIGHTS}{node.name}.conv.weight"
        if node.kind != "conv" or node.groups > 1 or stem.op.in_ch != RGB:
            raise ConfigError(
                f"{self.title} is for images of {stem.op.in_ch} channels, and data.channels ="
                f" {channels}: name weights for {channels} or 3 channels."
            )
        weight = adapt_input_conv(channels, stem.state[name])
        state = {**stem.state, name: weight}
        first = replace(stem, op=replace(stem.op, in_ch=channels), state=state)
        return replace(self, blocks=(first, *self.blocks[1:]))


@dataclass
class _Layer:
    """A convolution or a fully connected layer of a file, with the BN after it. A file does
    not say what its ``stride`` is.
    """

    weight: Tensor
    stride: int | None = None
    bias: Tensor | None = None
    norm: dict[str, Tensor] = field(default_factory=dict)

    @property
    def out_ch(self) -> int:
        return self.weight.shape[0]

    @property
    def in_ch(self) -> int:
        return self.weight.shape[1]

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1] if self.weight.dim() == 4 else 1

    @property
    def is_linear(self) -> bool:
        return self.weight.dim() == 2

    @property
    def is_depthwise(self) -> bool:
        return not self.is_linear and self.in_ch == 1 and self.out_ch > 1

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == 1 and not self.is_depthwise

    def state(self, name: str) -> State:
        """Its tensors, as those of the layer ``name`` of a block."""
        if self.is_linear and name == "linear":
            tensors = {"weight": self.weight}
        else:
            weight = self.weight if self.weight.dim() == 4 else self.weight[..., None, None]
            tensors = {"conv.weight": weight}
        if self.bias is not None:
            tensors["bias" if name == "linear" else "conv.bias"] = self.bias
        tensors |= {f"norm.{key}": tensor for key, tensor in self.norm.items()}
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def pretrained_file(source: str, key: str) -> Path:
    """The file of the weights that the configuration's ``key`` names: a file, a run's folder
    or its ``train`` folder, or a timm model whose weights are in its cache.

    Raises ConfigError if there is no such file.
    """
    path = user_path(source, key)
    if path.is_file():
        return path
    if path.is_dir():
        for file in (path / "model.safetensors", path / "train" / "model.safetensors"):
            if file.is_file():
                return file
        raise ConfigError(
            f"{key} = {source!r} has no model.safetensors: name the folder of a finished training"
            " run, or a file."
        )
    if Path(source).suffix in SUFFIXES or len(Path(source).parts) > 1:
        raise ConfigError(f"{key} = {source!r} does not exist: check the path.")
    return _cached(source, key)


def _cached(name: str, key: str) -> Path:
    """The weights of a timm model in the caches of the Hugging Face Hub and of PyTorch."""
    config = _timm_config(name, key)
    if config.hf_hub_id is not None:
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or file_name)
            if isinstance(cached, str):
                return Path(cached)
    if config.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        if path.is_file():
            return path
    raise ConfigError(
        f"{key} = {name!r}: timm's weights are not in the cache of this computer: download them"
        f" with timm.create_model({name!r}, pretrained=True), or name a file and set"
        f" {key}_model = {name!r}."
    )


def _timm_config(name: str, key: str) -> Any:
    if not timm.is_model(name):
        raise ConfigError(
            f"{key} = {name!r} is neither a file or folder nor a model of timm;"
            f" {nearest(name, timm.list_models())}"
        )
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ConfigError(f"{key} = {name!r}: timm has no weights of this model: choose another.")
    return config


def read_pretrained(source: str, model: str | None, key: str) -> Pretrained:
    """The network of ``pretrained_file``. ``model`` is the name of the timm model that a
    file holds.

    Raises ConfigError if the file holds no network of mobile blocks or the order of its
    layers is unknown, and CheckpointError if it is damaged.
    """
    path = pretrained_file(source, key)
    metadata = _metadata(path) if path.suffix == ".safetensors" else {}
    if "supernet" in metadata:
        raise ConfigError(
            f"{key} = {source!r} is a super-net: name a trained network, or set search.backbone to"
            " the super-net."
        )
    if "architecture" in metadata:
        network = load_network(path)
        if network.arch.graph:
            raise ConfigError(
                f"{key} = {source!r} is {network.arch.name!r}, a graph of cells: name a network of"
                " blocks in a chain."
            )
        blocks = zip(network.arch.ops(), network.blocks, strict=False)
        seeds = tuple(SeedBlock(op, block.state_dict(), begins_stage(op)) for op, block in blocks)
        title = f"{network.arch.name} ({source})"
        return Pretrained(seeds, title, network.arch.bn_eps)

    state = _read_tensors(path)
    model = timm_model_of(source, model, path)
    bn_eps = None
    normalisation = None
    strides: Mapping[str, int] = {}
    if model is not None:
        theirs = _model_of(state, model, f"{key}_model")
        state = {name: state[name] for name in theirs.state_dict() if name in state}
        modules = dict(theirs.named_modules())
        strides = {n: part.stride[0] for n, part in modules.items() if isinstance(part, nn.Conv2d)}
        config = timm.get_pretrained_cfg(model)
        normalisation = None if config is None else (config.mean, config.std)
        bn_eps = next((p.eps for p in modules.values() if isinstance(p, nn.BatchNorm2d)), None)
    elif path.suffix == ".safetensors":
        raise ConfigError(
            f"{key} = {source!r} does not say in which order its layers run: set {key}_model to"
            " the timm model that the weights belong to."
        )
    try:
        blocks_of_file = tuple(_blocks(list(_layers(state, strides))))
        _check_chain(blocks_of_file)
    except SpaceError as error:
        raise ConfigError(
            f"{key} = {source!r} is not a network of mobile blocks: {error}"
        ) from error
    if not any(block.op.kind in ("mbconv", "dsconv") for block in blocks_of_file):
        raise ConfigError(
            f"{key} = {source!r} has no separable convolutions, so none of its weights fit: name"
            " the weights of a mobile network, such as efficientnet_lite0 or mobilenetv2_100."
        )
    return Pretrained(blocks_of_file, source, bn_eps, normalisation)


def is_own_network(path: Path) -> bool:
    """Whether hwnas wrote a file of weights, with the architecture in it."""
    return path.suffix == ".safetensors" and "architecture" in _metadata(path)


def load_timm_model(source: str, model: str | None, data: DataConfig, key: str) -> nn.Module:
    """timm's whole model for ``data`` with the weights of ``pretrained_file``. ``model`` is
    its name, if a file does not say it.

    Raises ConfigError if the model is unknown, or another one than that of the file, or if
    the classes or channels differ; CheckpointError if the file is damaged.
    """
    path = pretrained_file(source, key)
    if path.suffix == ".safetensors" and "supernet" in _metadata(path):
        raise ConfigError(f"{key} = {source!r} is a super-net: name a trained network.")
    name = timm_model_of(source, model, path)
    if name is None:
        raise ConfigError(
            f"{key} = {source!r} does not say which network it is: set {key}_model to the timm"
            " model that the weights belong to."
        )
    state = _read_tensors(path)
    options = {"num_classes": data.classes, "in_chans": data.channels}
    expected = _model_of(state, name, f"{key}_model", options).state_dict()
    for layer, tensor in expected.items():
        if layer in state and state[layer].shape != tensor.shape:
            raise ConfigError(
                f"{key} = {source!r} does not fit {name!r} for {data.classes} classes and"
                f" {data.channels} channels ({layer} is {list(state[layer].shape)}, not"
                f" {list(tensor.shape)}): name a network that was trained on the same classes."
            )
    # initial weights, which are replaced, are drawn from the global generator
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = timm.create_model(name, **options)
    known = {layer: tensor for layer, tensor in state.items() if layer in expected}
    # files may lack the numbers of batches that BNs have seen
    network.load_state_dict(known, strict=False)
    return network


def _metadata(path: Path) -> Mapping[str, str]:
    """What a safetensors file says about itself."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} does not hold weights that can be read safely ({first_line(error)}): save a"
        " state_dict by torch.save, or as safetensors."
    )


def timm_model_of(source: str, model: str | None, path: Path) -> str | None:
    """The name of timm's model: ``model``, the source itself, or what a ``config.json``
    beside the file says; None if nothing does.
    """
    if model is not None:
        return model
    if timm.is_model(source):
        return source
    config = path.parent / "config.json"
    if not config.is_file():
        return None
    try:
        name = json.loads(config.read_text()).get("architecture")
    except (ValueError, AttributeError, OSError):
        return None
    return name if isinstance(name, str) and timm.is_model(name) else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(path), use_ema=True, weights_only=True)
        items = dict(state).items()
    except Exception as error:  # a damaged file may raise anything
        if is_out_of_memory(error):
            raise
        raise _unreadable(path, error) from error
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors, neither at the top nor under state_dict, model or"
            " state_dict_ema: save the state_dict of a network."
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
            raise CheckpointError(f"{path}: {name} is not an ordinary tensor of numbers.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: {name} has values that are not finite: choose weights from before the"
                " training diverged."
            )
    return tensors


def _check_chain(blocks: Sequence[SeedBlock]) -> None:
    """Raise SpaceError if a block does not read what the one before it writes."""
    for before, block in pairwise(blocks):
        if block.op.in_ch != before.op.out_ch:
            raise SpaceError(
                f"a layer reads {block.op.in_ch} channels after one that writes"
                f" {before.op.out_ch}, so the layers are no chain."
            )


def _model_of(
    state: Mapping[str, Tensor], model: str, key: str, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """timm's model, created with ``options`` and without weights. Raises ConfigError if the
    tensors are another's.
    """
    if not timm.is_model(model):
        raise ConfigError(
            f"{key} = {model!r} is not a model of timm; {nearest(model, timm.list_models())}"
        )
    with torch.device("meta"):
        network: nn.Module = timm.create_model(model, **(options or {}))
    names = [name for name in network.state_dict() if "num_batches" not in name]
    missing = [name for name in names if name not in state]
    if missing:
        raise ConfigError(
            f"{key} = {model!r} is not the model of the weights, which lack {missing[0]} and"
            f" {len(missing) - 1} more: name the model that they are of."
        )
    return network


def _layers(state: Mapping[str, Tensor], strides: Mapping[str, int]) -> Iterator[_Layer]:
    """The layers, in the order of the file. A BN belongs to the layer before it.
    ``strides`` are those of the convolutions by name, if they are known.
    """
    layer: _Layer | None = None
    owner = ""
    norm = ""
    # other vectors, such as the slopes of a PReLU, have no statistics
    norms = {name.rpartition(".")[0] for name in state if name.endswith("running_mean")}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.dim() in (2, 4):
            if layer is not None:
                yield layer
            if tensor.dim() == 4 and tensor.shape[2] != tensor.shape[3]:
                raise SpaceError(f"the kernel of {prefix} is not square.")
            layer = _Layer(tensor.float(), strides.get(prefix))
            owner = prefix
            norm = ""
        elif layer is None or tensor.dim() != 1:
            continue
        elif kind == "bias" and prefix == owner:
            layer.bias = tensor.float()
        elif prefix in norms and norm in ("", prefix) and len(tensor) == layer.out_ch:
            norm = prefix
            layer.norm[kind] = tensor.float()
    if layer is not None:
        yield layer


def _blocks(layers: Sequence[_Layer]) -> Iterator[SeedBlock]:
    """Layers as the blocks that they make up. Raises SpaceError if a layer does not fit."""
    position = 0
    last: set[str] = set()
    while position < len(layers):
        rest = layers[position:]
        # the filters of a stem for grey images look like those of a depthwise convolution
        named = _separable(rest) if position else {}
        if named:
            op = _separable_op(named)
        else:
            op, named = _single(rest[0], last=len(rest) == 1)
        state: dict[str, Tensor] = {}
        for name, layer in named.items():
            for key, tensor in layer.state(name).items():
                state[op.WEIGHTS + key] = tensor
        stride = max(layer.stride or 1 for layer in named.values())
        # without strides, a stage of the same width can still be told by other layers
        other = stride > 1 or (rest[0].stride is None and named.keys() != last)
        yield SeedBlock(op, state, op.in_ch != op.out_ch or other)
        position += len(named)
        last = set(named)


def _separable(layers: Sequence[_Layer]) -> dict[str, _Layer]:
    """The layers of the block that begins with an expansion or a depthwise convolution, by
    the names of ``hwnas.core.ops``; empty if no such block begins here.
    """
    named: dict[str, _Layer] = {}
    rest = list(layers)
    if len(rest) > 1 and rest[0].is_pointwise and rest[1].is_depthwise:
        named["expand"] = rest.pop(0)
    if not rest[0].is_depthwise:
        return {}
    depthwise = named["depthwise"] = rest.pop(0)
    if "expand" in named and named["expand"].out_ch != depthwise.out_ch:
        return {}
    if len(rest) > 2 and _squeezes(rest[0], rest[1], depthwise.out_ch):
        named["se.reduce"] = rest.pop(0)
        named["se.expand"] = rest.pop(0)
    if not rest or not rest[0].is_pointwise or rest[0].in_ch != depthwise.out_ch:
        return {}
    named["project"] = rest.pop(0)
    return named


def _separable_op(named: Mapping[str, _Layer]) -> Op:
    depthwise = named["depthwise"]
    squeeze = named.get("se.reduce")
    se_ch = 0 if squeeze is None else squeeze.out_ch
    out_ch = named["project"].out_ch
    if "expand" in named:
        in_ch = named["expand"].in_ch
        return separable(1, in_ch, out_ch, depthwise.out_ch, kernel=depthwise.kernel, se_ch=se_ch)
    return separable(1, depthwise.out_ch, out_ch, kernel=depthwise.kernel, se_ch=se_ch)


def _squeezes(first: _Layer, second: _Layer, channels: int) -> bool:
    """Whether two layers are squeeze-and-excitation."""
    return (
        not first.norm
        and not second.norm
        and first.is_pointwise
        and first.in_ch == second.out_ch == channels
        and first.out_ch == second.in_ch
    )


def _single(layer: _Layer, last: bool) -> tuple[Op, dict[str, _Layer]]:
    """A block of one layer, and that layer by name."""
    if layer.is_linear and last:
        return Classifier(1, layer.in_ch, layer.out_ch), {"linear": layer}
    if layer.is_pointwise and layer.bias is not None and not layer.norm:
        return Head(1, layer.in_ch, layer.out_ch), {"conv": layer}
    return Conv(1, layer.in_ch, layer.out_ch, layer.kernel), {"conv": layer}


def load_pretrained(network: Network, pretrained: Pretrained, key: str) -> str:
    """Start a network from the weights of another one, in place. Returns in words what
    was done.

    Raises ConfigError, which names the configuration's ``key``, if the network is a graph
    and not a chain of blocks, or if next to nothing fits.
    """
    arch = network.arch
    if arch.graph:
        raise ConfigError(
            f"{key}: {arch.name!r} is a graph of cells, and weights are only remapped between"
            " chains of blocks: remove it."
        )
    target = []
    # a detector's extra layers and heads have no counterpart
    for op, block in zip(arch.blocks, network.blocks, strict=False):
        target.append(TargetBlock([(op, block.state_dict())], begins_stage(op)))
    return _remapped(target, pretrained, key, arch.bn_eps, sorts=False)


def load_pretrained_supernet(supernet: GatedNetworks, pretrained: Pretrained, key: str) -> str:
    """Start all options of a super-net of blocks in a chain from the weights of a network,
    in place. Returns in words what was done. Raises ConfigError, which names the
    configuration's ``key``, if next to nothing fits.
    """
    bn_eps = supernet.space.bn_eps
    return _remapped(supernet.target_blocks(), pretrained, key, bn_eps, sorts=True)


def _remapped(
    target: Sequence[TargetBlock], pretrained: Pretrained, key: str, bn_eps: float, sorts: bool
) -> str:
    """``remap``, in words. Raises ConfigError if next to nothing fits."""
    seed = pretrained.with_channels(target[0].op.in_ch).with_bn_eps(bn_eps)
    remapped = remap(target, seed.blocks, sorts)
    if remapped.share < LEAST_SHARE:
        raise ConfigError(
            f"{key}: only {remapped.share:.1%} of the weights can start from {pretrained.title}:"
            " name weights of a network with similar blocks and widths."
        )
    return f"weights of {pretrained.title}: {remapped.text}"


def pretrained_hashes(source: str, model: str | None, key: str) -> dict[str, str]:
    """What initial weights depend on, as inputs of a stage: the content of the file, and
    the model by which it is read.
    """
    path = pretrained_file(source, key)
    named = timm_model_of(source, model, path) or "unknown"
    return {"pretrained": file_sha256(path), "pretrained model": named}
