"""What a device is, and what hwnas needs of a connection to one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from hwnas.devices import CONNECTIONS
from hwnas.document import Document, nearest
from hwnas.errors import ConfigError
from hwnas.resources import resource_path


class Device(Document):
    """A device: its name in tables, its chip, how it is reached and which cores a
    measurement should use.
    """

    SCHEMA: ClassVar[str] = "hwnas.device"

    id: str
    soc: str
    connection: str
    options: dict[str, str] = {}
    cores: tuple[int, ...] | None = None
    governor: str = "unknown"


class Connection(Protocol):
    """Where measurements and predictions run. ``deploy/runner.py`` documents plan and
    rows. A connection may not be able to feed an item's ``input``: its rows say
    ``"input": "image"`` where it was fed.

    A connection is made from a Device document without contacting the device; wrong
    ``options`` are refused there and then.
    """

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores to pin ``threads`` threads to."""

    def runtimes(self) -> dict[str, str]:
        """The runtimes that work on the device, as a plan names them, each with its
        package and version. Raises DeviceError.
        """

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan; yield the runner's header, then one row per item as it comes.
        Raises DeviceError.

        Between them may come ``{"note": "a sentence for the person who waits"}`` and
        ``{"conditions": {"celsius": 31.5, ...}}``, the state of the device at that
        moment.
        """

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Outputs float32 [N, ...] of a model file for float32 images, or for uint8
        ones where it takes pixels. Raises DeviceError.

        Several outputs become one row per image, [N, numbers of all], each flattened,
        in the file's order.
        """


HOST = Device(id="host", soc="this computer", connection="host")
ADDRESSES = {"ssh": "host", "adb": "serial"}
"""Connections whose devices can be named without a document, and the option that the
rest of the name is.
"""


def known_devices() -> dict[str, Device]:
    """The host, and every device document in ``configs/devices``."""
    devices = {HOST.id: HOST}
    for path in sorted((resource_path("configs") / "devices").glob("*.json")):
        device = Device.load(path)
        devices[device.id] = device
    return devices


def find_device(name: str) -> Device:
    """A device by id, by the path of a document ending in .json, or by its address:
    ``ssh:pi@board``, ``adb:SERIAL``, ``adb``.
    """
    if Path(name).suffix == ".json":
        return Device.load(name)
    devices = known_devices()
    if name in devices:
        return devices[name]
    connection, _, address = name.partition(":")
    if connection in ADDRESSES:
        options = {ADDRESSES[connection]: address} if address else {}
        return Device(
            id=re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-"),
            soc="unknown",
            connection=connection,
            options=options,
        )
    raise ConfigError(
        f"unknown device {name!r}; {nearest(name, devices)} A path must end in .json; ssh:USER@HOST"
        " and adb:SERIAL need no document."
    )


def connect(device: Device) -> Connection:
    """A connection to a device."""
    connection: Connection = CONNECTIONS.get(device.connection)(device)
    return connection
