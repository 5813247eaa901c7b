"""A device whose clock is a formula: for tests of everything around a measurement.

The latency of an op is MACs / rate + bytes moved / bandwidth + a constant. The latency
of a network is 1.05 times the sum plus 0.02 ms. Each row has 1 % noise from a generator
that is seeded by (item, round), so a killed and resumed profile measures the same.

Options of the device document: ``delay_ms`` makes each row take that long; ``noise`` is
the relative standard deviation of whole rounds, as on a machine with other work to do
(0.3: a round is often a third faster or slower).

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
from pydantic import Field, ValidationError

from hwnas.config import Section
from hwnas.core.ops import Op
from hwnas.devices.device import Device, pinned_cores
from hwnas.devices.host import Host
from hwnas.document import explain
from hwnas.errors import ConfigError

MACS_PER_MS = 2e7
BYTES_PER_MS = 4e6
CONSTANT_MS = 0.005


def simulated_ms(op: Op) -> float:
    """The latency of an op by the formula, in milliseconds."""
    values = sum(layer.read + layer.written for layer in op.layers)
    return op.macs / MACS_PER_MS + 4 * (values + op.params) / BYTES_PER_MS + CONSTANT_MS


class SimulatedOptions(Section):
    """Options of a device document with ``"connection": "simulated"``."""

    delay_ms: float = Field(0.0, ge=0, le=60_000, description="how long each row takes")
    noise: float = Field(
        0.0, ge=0, le=2, description="relative standard deviation of an item's rounds"
    )


class Simulated:
    """Computes the rows of a plan with the formula, from the op keys of each item. Raises
    ConfigError if an option is wrong.
    """

    def __init__(self, device: Device) -> None:
        self.host = Host(device)
        self.device = device
        try:
            self.options = SimulatedOptions.model_validate(device.options)
        except ValidationError as error:
            raise ConfigError(
                f"options of device {device.id!r}: {explain(error, SimulatedOptions)}"
            ) from error

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores of the device document, or else 0 to threads - 1. Empty if the document
        says not to pin.
        """
        return pinned_cores(self.device, threads, lambda: range(threads))

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
            "pinned": bool(plan["cores"]),
            **unknown,
        }
        for item in plan["items"]:
            ops = [Op.parse(key) for key in item["ops"]]
            ms = sum(simulated_ms(op) for op in ops)
            if len(ops) > 1:
                # a network: not exactly the sum of its ops, as on real devices
                ms = 1.05 * ms + 0.02
            time.sleep(self.options.delay_ms / 1e3)

            # crc32, because Python's own hash of a string differs between processes
            rng = np.random.default_rng([zlib.crc32(item["id"].encode()), item["round"]])
            factors = rng.normal(1.0, 0.01, size=5)
            if self.options.noise:
                factors *= np.exp(rng.normal(0.0, self.options.noise))
            yield {
                "id": item["id"],
                "round": item["round"],
                "ms": [float(ms * factor) for factor in factors],
            }

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Real outputs, computed on the host."""
        return self.host.predict(model, images_NHWC, folder)
