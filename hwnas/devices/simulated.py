"""A device whose clock is a formula: for tests of everything around a measurement.

The latency of an op is MACs / rate + bytes moved / bandwidth + a constant. The latency
of a network is 1.05 times the sum plus 0.02 ms. Each row has 1 % noise from a generator
that is seeded by (item, round), so a killed and resumed profile measures the same. The
device document's option ``delay_ms`` makes each row take that long.

Tables made here say ``simulated`` in their header. Model outputs are real: the host
computes them.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.core.ops import Op
from hwnas.devices.device import Device
from hwnas.devices.host import Host

MACS_PER_MS = 2e7
BYTES_PER_MS = 4e6
CONSTANT_MS = 0.005


def simulated_ms(op: Op) -> float:
    """The latency of an op by the formula, in milliseconds."""
    values = sum(
        layer.in_ch * layer.size**2 + layer.out_ch * layer.out_size**2 for layer in op.layers
    )
    return op.macs / MACS_PER_MS + 4 * (values + op.params) / BYTES_PER_MS + CONSTANT_MS


class Simulated:
    """Computes the rows of a plan with the formula, from the op keys of each item."""

    def __init__(self, device: Device) -> None:
        self.host = Host(device)
        self.delay_ms = float(device.options.get("delay_ms", "0"))

    def cores(self, threads: int) -> tuple[int, ...]:
        """Cores 0 to threads - 1."""
        return tuple(range(threads))

    def runtimes(self) -> dict[str, str]:
        """The runtimes that compute model outputs on the host. They do not affect times."""
        return dict.fromkeys(("litert", "onnxruntime"), "simulated")

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """A header and one row per item."""
        del folder
        unknown = dict.fromkeys(
            ("runtime_package", "runtime_version", "cpu", "machine", "governor", "python"),
            "simulated",
        )
        yield {
            "runner": 1,
            "runtime": plan["runtime"],
            "cores": plan["cores"],
            "threads": plan["threads"],
            **unknown,
        }
        for item in plan["items"]:
            ops = [Op.parse(key) for key in item["ops"]]
            ms = sum(simulated_ms(op) for op in ops)
            if len(ops) > 1:
                # a network: not exactly the sum of its ops, as on real devices
                ms = 1.05 * ms + 0.02
            time.sleep(self.delay_ms / 1e3)

            # crc32, because Python's own hash of a string differs between processes
            rng = np.random.default_rng([zlib.crc32(item["id"].encode()), item["round"]])
            yield {
                "id": item["id"],
                "round": item["round"],
                "ms": [float(ms * factor) for factor in rng.normal(1.0, 0.01, size=5)],
            }

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Real outputs, computed on the host."""
        return self.host.predict(model, images_NHWC, folder)
