"""Stand-alone networks: the blocks of an architecture one after another, or as its
graph says. Checkpoint files of all kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.graph import Step
from hwnas.document import read_bytes, write_atomic
from hwnas.errors import CheckpointError, DocumentError
from hwnas.nn.blocks import build, initialise
from hwnas.nn.detector import DetectionNetwork


class Network(nn.Module):
    """An architecture without a detector in torch.

    Example:
        >>> from hwnas.core.spaces import published
        >>> Network(published("mobilenet_v2", resolution=64)).eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    def __init__(
        self, arch: Architecture, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        assert arch.detector is None, f"{arch.name} has a detector: build a DetectionNetwork"
        self.arch = arch
        self.blocks = nn.Sequential(
            *(build(op, bn_eps=arch.bn_eps, dropout=dropout) for op in arch.ops())
        )
        if generator is not None:
            initialise(self, generator)

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifier's (as in TuNAS's code)."""
        return {f"blocks.{len(self.blocks) - 1}.linear.weight"}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> logits [N, classes]."""
        logits: Tensor = (
            run_graph(self.arch.graph, self.blocks, x_NCHW)
            if self.arch.graph
            else self.blocks(x_NCHW)
        )
        return logits


def run_graph(graph: Sequence[Step], blocks: Iterable[nn.Module], x_NCHW: Tensor) -> Tensor:
    """The last point of a graph (``hwnas.core.graph``); each point is let go after its last use."""
    last = {point: position for position, step in enumerate(graph) for point in step.of}
    points: dict[int, Tensor] = {0: x_NCHW}
    each = iter(blocks)
    for position, step in enumerate(graph):
        points[position + 1] = _made(step, [points[point] for point in step.of], each, x_NCHW)
        for point in set(step.of):
            if last[point] == position:
                del points[point]
    return points[len(graph)]


def _made(step: Step, read: list[Tensor], blocks: Iterator[nn.Module], x_NCHW: Tensor) -> Tensor:
    if step.kind == "op":
        made: Tensor = next(blocks)(read[0])
        return made
    if step.kind == "concat":
        return torch.cat(read, dim=1)
    if step.kind == "cut":
        return read[0][:, : step.channels]
    if step.kind == "zero":
        zeros = x_NCHW.new_zeros(x_NCHW.shape[0], step.channels, step.size, step.size)
        return zeros.contiguous(memory_format=torch.channels_last)
    total = read[0]
    for term in read[1:]:
        total = total + term
    return total


AnyNetwork = Network | DetectionNetwork


def network_of(
    arch: Architecture, *, dropout: float = 0.0, generator: torch.Generator | None = None
) -> AnyNetwork:
    """The network of an architecture: a classifier, with ``dropout`` before its last
    layer, or a detector.
    """
    if arch.detector is not None:
        return DetectionNetwork(arch, generator=generator)
    return Network(arch, dropout=dropout, generator=generator)


def save_network(network: AnyNetwork, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Weights and BN statistics as safetensors, the architecture in the metadata,
    written atomically.
    """
    save_tensors_atomically(
        network, path, {"architecture": network.arch.to_json(), **(metadata or {})}
    )


def load_network(path: Path) -> AnyNetwork:
    """The network of a checkpoint, of the kind that its architecture is.

    Raises CheckpointError where the file is corrupt, cut off or no network's.
    """
    tensors, metadata = load_tensors_checked(path)
    try:
        network = network_of(Architecture.parse(metadata["architecture"], str(path)))
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _corrupt(path, error) from error
    return network


def save_tensors_atomically(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """A module's state as safetensors: the same state gives the same bytes, and an old
    file is replaced by a whole one only.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    write_atomic(path, _canonical(save_tensors(tensors, metadata)))


def load_tensors_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises CheckpointError where
    it is missing, corrupt or cut off.
    """
    try:
        content = read_bytes(path)
    except DocumentError as error:
        raise CheckpointError(str(error)) from error
    try:
        return load_tensors(content), _metadata(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is corrupt or was cut off ({_first_line(error)}): train again, or"
        " restore the file."
    )


def _canonical(content: bytes) -> bytes:
    """The same safetensors file with its header sorted: safetensors orders metadata at
    random, and hashes would differ.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(
        json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of header length, then the header as JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
