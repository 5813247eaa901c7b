"""The bundle: a folder with everything an app needs to use a network, and the proof that its files are right.

export/
    bundle.json             what is in it: architecture, labels, preprocessing, files with sizes, parity and versions
    model-fp32.tflite       NHWC float32 in, logits out
    model-int8.tflite       the same interface, int8 inside
    model.onnx              NCHW float32 in, logits out; the architecture is in its metadata
    parity.npz              some test images as the model gets them, PyTorch's logits of them and classes of all
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from hwnas import __version__
from hwnas.config import DataConfig
from hwnas.core.arch import Architecture
from hwnas.data.images import Batch
from hwnas.document import Document, file_sha256, write_atomic

Format = Literal["tflite-fp32", "tflite-int8", "onnx"]
FILES: dict[str, tuple[str, str, str]] = {
    "tflite-fp32": ("model-fp32.tflite", "litert", "fp32"),
    "tflite-int8": ("model-int8.tflite", "litert", "int8"),
    "onnx": ("model.onnx", "onnxruntime", "fp32"),
}
"""Format -> (file name, runtime, dtype)."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parity(_Part):
    """A file's outputs against PyTorch's on real test images.

    ``relative_error`` is max |file - torch| / max |torch| over all logits; ``agreement`` the part of images with the same top-1.
    """

    images: int
    relative_error: float
    agreement: float


class BundleFile(_Part):
    """One exported file."""

    name: str
    format: Format
    runtime: str
    dtype: str
    size_bytes: int
    sha256: str
    parity: Parity


class Preprocessing(_Part):
    """From an RGB or grey image to the model's input: resize, scale to 0..1, subtract ``mean``, divide by ``std``."""

    resolution: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str


class Bundle(Document):
    """The description of a bundle (``bundle.json``)."""

    SCHEMA: ClassVar[str] = "hwnas.bundle"

    architecture: Architecture
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    macs: int
    params: int
    torch_accuracy: float
    test_images: int
    files: tuple[BundleFile, ...]
    versions: dict[str, str]


def preprocessing(data: DataConfig, resizing: str) -> Preprocessing:
    """What the data loader does to a test image, in words and numbers."""
    return Preprocessing(resolution=data.resolution, channels=data.channels, mean=data.mean, std=data.std, resize=resizing)


def parity(outputs: np.ndarray, reference: np.ndarray) -> Parity:
    """Compare logits [N, classes] of a file with PyTorch's."""
    return Parity(
        images=len(outputs),
        relative_error=float(np.abs(outputs - reference).max() / np.abs(reference).max()),
        agreement=float((outputs.argmax(1) == reference.argmax(1)).mean()),
    )


def describe_file(folder: Path, kind: str, measured: Parity) -> BundleFile:
    """The entry of an exported file."""
    name, runtime, dtype = FILES[kind]
    path = folder / name
    return BundleFile.model_validate(
        {
            "name": name,
            "format": kind,
            "runtime": runtime,
            "dtype": dtype,
            "size_bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "parity": measured,
        }
    )


@torch.inference_mode()
def torch_logits(network: torch.nn.Module, images_NHWC: np.ndarray) -> np.ndarray:
    """PyTorch's logits float32 [N, classes] for channels-last images, on the CPU in float32."""
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    logits: np.ndarray = network.cpu().eval()(x_NCHW).numpy()
    return logits


@torch.inference_mode()
def torch_predictions(network: torch.nn.Module, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's class for each image of ``batches``, and the right one: both int16 [N]."""
    pairs = [(network.cpu().eval()(x_NCHW).argmax(1).numpy(), y.numpy()) for x_NCHW, y in batches]
    predicted, labels = (np.concatenate(part).astype(np.int16) for part in zip(*pairs, strict=True))
    return predicted, labels


def save_parity(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def tool_versions() -> dict[str, str]:
    """Versions of everything that shaped the files."""
    packages = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "onnx", "onnxruntime")
    return {"hwnas": __version__, **{package: version(package) for package in packages}}
