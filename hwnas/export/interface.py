"""What an app feeds an exported file and what it gets: normalised floats or plain
pixels in, logits or probabilities out.

A file of the network alone takes float32 images that the app has normalised.
``export.input = "uint8"`` puts the normalisation in front of the network, inside the
file, so that an app feeds the bytes of its image; ``export.softmax`` puts a softmax
behind a classifier. Both are added to the finished file, whatever made it, in float32
for int8 files too: what the network itself computes is untouched, and the file gives
what the one without them gives for pixels that the app has normalised.

*Why not in the first convolution*: its padding is 0 after normalisation, which is
another colour per channel before it, and no border of pixels can have that. The cost is
measured instead (``tflite_interface``).
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
"""The largest pixel."""


@dataclass(frozen=True)
class Interface:
    """What goes into all files of a bundle, and what comes out. ``mean`` and ``std``
    per channel are of images scaled to 0..1.
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
        """What an app has to do to pixels; None where the file does it."""
        return Normalisation.of_parts(self.mean, self.std) if self.input == "float32" else None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that any channel of an image takes."""
        if self.input == "uint8":
            return 0.0, float(WHITE)
        ends = [
            (bound - mean) / std
            for mean, std in zip(self.mean, self.std, strict=True)
            for bound in (0.0, 1.0)
        ]
        return min(ends), max(ends)

    def fed(self, images_NHWC: Floats) -> Floats | Pixels:
        """Normalised images as a file takes them: as they are, or the pixels that they
        were, exactly where they were pixels.
        """
        if self.input == "float32":
            return images_NHWC
        pixels: Floats = WHITE * (images_NHWC * np.array(self.std) + np.array(self.mean))
        return pixels.round().clip(0, WHITE).astype(np.uint8)

    def seen(self, fed_NHWC: Floats | Pixels) -> Floats:
        """What the network gets of images that a file was fed: float32, normalised."""
        values: Floats = fed_NHWC.astype(np.float32)
        if self.input == "uint8":
            values = (
                (fed_NHWC.astype(np.float64) / WHITE - np.array(self.mean)) / np.array(self.std)
            ).astype(np.float32)
        return values

    def outputs_of(self, logits: Floats) -> Floats:
        """What a classifier's file gives where the network gives these logits [N, classes]."""
        return softmax(logits) if self.softmax else logits

    def around(self, model: bytes, runtime: str) -> bytes:
        """The file of a network (``litert`` or ``onnxruntime``) with what belongs
        around it. A softmax is for classifiers.
        """
        if self.input == "uint8":
            scales, shifts = (
                1 / (WHITE * np.array(self.std)),
                -np.array(self.mean) / np.array(self.std),
            )
            model = _PIXELS[runtime](model, scales, shifts)
        return _SOFTMAX[runtime](model) if self.softmax else model


_PIXELS = {"litert": tflite_interface.with_pixels, "onnxruntime": onnx_interface.with_pixels}
_SOFTMAX = {"litert": tflite_interface.with_softmax, "onnxruntime": onnx_interface.with_softmax}


def softmax(logits: Floats) -> Floats:
    """Probabilities [N, classes] of logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares
