"""What the runner needs to time and run programs of ``torch.export``."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch


class TorchModel:
    """A program on the CPU."""

    packages: ClassVar[dict[str, str]] = {"torch": "torch"}

    def __init__(self, module: Any, path: str, threads: int) -> None:
        module.set_num_threads(threads)
        program = module.export.load(path)
        [entry] = program.graph_signature.user_inputs
        node = next(node for node in program.graph.nodes if node.name == entry)
        self._shape = tuple(node.meta["val"].shape)
        self._program = program.module()
        self._x_NCHW = torch.zeros(self._shape)

    def randomise(self) -> None:
        self._x_NCHW = torch.from_numpy(
            np.random.default_rng(0).standard_normal(self._shape).astype(np.float32)
        )

    def feed(self, image_NHWC: Any) -> None:
        self._x_NCHW = torch.from_numpy(np.ascontiguousarray(image_NHWC.transpose(0, 3, 1, 2)))

    def invoke(self) -> Any:
        with torch.inference_mode():
            return self._program(self._x_NCHW)

    def predict(self, image_NHWC: Any) -> Any:
        self.feed(image_NHWC)
        return self.invoke().numpy()

    def facts(self) -> dict[str, Any]:
        return {}


MODELS = {"torch": TorchModel}
SUFFIXES = {".pt2": "torch"}
