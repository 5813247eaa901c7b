"""Device documents, and the interface of a connection to a device."""

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
    """A device: its name in tables, its chip, the connection to it, and the cores that
    measurements use.
    """

    SCHEMA: ClassVar[str] = "hwnas.device"

    id: str
    soc: str
    connection: str
    options: dict[str, str] = {}
    cores: tuple[int, ...] | None = None
    governor: str = "unknown"


class Connection(Protocol):
    """Where measurements and predictions run.

    The docstring of ``deploy/runner.py`` defines the format of plans and rows. Not every
    connection can feed the ``input`` of an item. The rows of items that did get their
    input say ``"input": "image"``.

    A connection is made from a Device document. That does not contact the device, but
    raises ConfigError at once if the document's ``options`` are wrong.
    """

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores to pin ``threads`` threads to."""

    def runtimes(self) -> dict[str, str]:
        """The runtimes that work on the device: the name that plans use -> package and
        version. Raises DeviceError.
        """

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan. Yields the runner's header, then one row per item as soon as it is
        measured. Raises DeviceError.

        Two more kinds of rows may come in between: ``{"note": "a sentence for the user"}``
        and ``{"conditions": {"celsius": 31.5, ...}}``, the state of the device at that
        moment.
        """

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Run a model file on images. Returns float32 [N, ...]. Raises DeviceError.

        Images are float32, or uint8 if the model takes raw pixels. If the model has
        several outputs, each row holds all of them, flattened and concatenated in the
        order of the file.
        """


HOST = Device(id="host", soc="this computer", connection="host")
ADDRESSES = {"ssh": "host", "adb": "serial"}
"""Connections that need no device document -> the option that holds the address, the
part of the name after the colon.
"""


def known_devices() -> dict[str, Device]:
    """The host, and every device document in ``configs/devices``, by id."""
    devices = {HOST.id: HOST}
    for path in sorted((resource_path("configs") / "devices").glob("*.json")):
        device = Device.load(path)
        devices[device.id] = device
    return devices


def find_device(name: str) -> Device:
    """Look up a device by its id, by the path of a document that ends in .json, or by an
    address: ``ssh:pi@board``, ``adb:SERIAL``, ``adb``.

    Raises ConfigError if nothing matches.
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
        f"unknown device {name!r}; {nearest(name, devices)} Use ssh:USER@HOST or adb:SERIAL for a"
        " device without a document, or give the path of a document (*.json)."
    )


def connect(device: Device) -> Connection:
    """A connection to a device. Raises ConfigError if its options are wrong."""
    connection: Connection = CONNECTIONS.get(device.connection)(device)
    return connection
