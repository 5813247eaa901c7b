"""Checkpoint files: weights as safetensors, with the architecture in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.document import read_bytes, write_atomic
from hwnas.errors import CheckpointError, DocumentError
from hwnas.failures import is_out_of_memory
from hwnas.nn.network import Network, network_of


def save_network(network: Network, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save weights and BN statistics as safetensors, with the architecture in the
    metadata. The file is written atomically.
    """
    save_tensors_atomically(
        network, path, {"architecture": network.arch.to_json(), **(metadata or {})}
    )


def load_network(path: Path) -> Network:
    """Load the network of a checkpoint: a classifier or a detector, as its architecture
    says.

    Raises CheckpointError if the file is missing, corrupt, truncated or does not hold a
    network.
    """
    tensors, metadata = load_tensors_checked(path)
    try:
        network = network_of(Architecture.parse(metadata["architecture"], str(path)))
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _corrupt(path, error) from error
    return network


def save_tensors_atomically(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Save a module's state as safetensors.

    The same state always gives the same bytes. An existing file is replaced only once
    the new one is complete.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    write_atomic(path, _canonical(save_tensors(tensors, metadata)))


def load_tensors_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises CheckpointError if the file is missing, corrupt or truncated.
    """
    try:
        content = read_bytes(path)
    except DocumentError as error:
        raise CheckpointError(str(error)) from error
    try:
        return load_tensors(content), _metadata(content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is corrupt or was cut off ({first_line(error)}): train again, or"
        " restore the file."
    )


def _canonical(content: bytes) -> bytes:
    """The same safetensors file with a sorted header.

    safetensors writes metadata in random order, so the hashes of equal files would
    differ.
    """
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    # safetensors aligns the tensors to 8 bytes by padding the header with spaces
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, which starts with the length of the header in
    8 bytes and the header as JSON.
    """
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def first_line(error: Exception) -> str:
    """The first line of an error's text; the name of its type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
