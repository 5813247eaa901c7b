"""The input and output of exported files for apps: normalised floats or raw pixels in,
logits or probabilities out.

Without further settings, a file takes float32 images that the app has normalised, and
returns the network's outputs. ``export.input = "uint8"`` puts the normalisation into
the file, before the network, so that an app feeds the bytes of its image.
``export.softmax`` appends a softmax to a classifier.

Both are added to the finished file, no matter which writer made it, and are computed in
float32 even in int8 files. The network itself is unchanged: its outputs are those that
the plain file returns for images normalised by the app.

*Why the normalisation is not folded into the first convolution*: the convolution's
padding is 0 after normalisation. Before normalisation, that is a different colour per
channel, which no border of pixels can have. ``tflite_interface`` explains how
the extra operators are kept cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwnas.export import onnx_interface, tflite_interface
from hwnas.export.metadata import Normalisation
from hwnas.export.names import LOGITS, PROBABILITIES

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
WHITE = 255
"""The largest pixel value."""


@dataclass(frozen=True)
class Interface:
    """The input and the output of all files of a bundle. ``mean`` and ``std`` per
    channel are for images scaled to 0..1.
    """

    input: Literal["float32", "uint8"]
    softmax: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def output(self) -> Literal["logits", "probabilities"]:
        """The name of a classifier's output."""
        return PROBABILITIES if self.softmax else LOGITS

    @property
    def normalisation(self) -> Normalisation | None:
        """How an app has to normalise pixels. None if the file does it."""
        if self.input == "uint8":
            return None
        return Normalisation.of_parts(self.mean, self.std)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest possible value of any channel of an image."""
        if self.input == "uint8":
            return 0.0, float(WHITE)
        # over all channels, because a bundle states one range for the whole image
        channels = list(zip(self.mean, self.std, strict=True))
        black = [(0.0 - mean) / std for mean, std in channels]
        white = [(1.0 - mean) / std for mean, std in channels]
        return min(black + white), max(black + white)

    def fed(self, images_NHWC: Floats) -> Floats | Pixels:
        """Convert normalised images to the form that files take: unchanged, or as uint8
        pixels. Images that were made from pixels give exactly these pixels.
        """
        if self.input == "float32":
            return images_NHWC
        pixels: Floats = WHITE * (images_NHWC * np.array(self.std) + np.array(self.mean))
        # rounding undoes the error of float32; clipping is for values that no pixel has
        return pixels.round().clip(0, WHITE).astype(np.uint8)

    def seen(self, fed_NHWC: Floats | Pixels) -> Floats:
        """The images float32 that the network sees if a file is fed ``fed_NHWC``."""
        if self.input == "float32":
            return fed_NHWC.astype(np.float32)
        # float64 in between, so that the result is the nearest float32
        scaled = fed_NHWC.astype(np.float64) / WHITE
        normalised: Floats = ((scaled - np.array(self.mean)) / np.array(self.std)).astype(
            np.float32
        )
        return normalised

    def outputs_of(self, logits: Floats) -> Floats:
        """The outputs of a classifier's file if the network computes ``logits`` [N,
        classes].
        """
        return softmax(logits) if self.softmax else logits

    def around(self, model: bytes, runtime: str) -> bytes:
        """Add the interface to the file of a network for ``runtime``: ``litert`` or
        ``onnxruntime``. A softmax requires a classifier.
        """
        if self.input == "uint8":
            scales = 1 / (WHITE * np.array(self.std))
            shifts = -np.array(self.mean) / np.array(self.std)
            model = _PIXELS[runtime](model, scales, shifts)
        # last, because the softmax replaces the output
        if self.softmax:
            model = _SOFTMAX[runtime](model)
        return model


_PIXELS = {"litert": tflite_interface.with_pixels, "onnxruntime": onnx_interface.with_pixels}
_SOFTMAX = {"litert": tflite_interface.with_softmax, "onnxruntime": onnx_interface.with_softmax}


def softmax(logits: Floats) -> Floats:
    """The probabilities of logits, both [N, classes]."""
    # Subtracting the maximum avoids overflow, and does not change the result.
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = powers / powers.sum(axis=1, keepdims=True)
    return probabilities
