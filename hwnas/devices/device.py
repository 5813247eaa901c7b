"""Device documents, and the interface of a connection to a device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import AfterValidator

from hwnas.config.tables import CoreIndex
from hwnas.devices import CONNECTIONS
from hwnas.document import Document, nearest
from hwnas.errors import ConfigError, DeviceError
from hwnas.printable import quoted
from hwnas.resources import resource_path


def _printable(text: str) -> str:
    """The text itself. Raises ValueError if it could do something to the terminal."""
    if not text.isprintable():
        raise ValueError("holds a character that cannot be displayed; leave it out")
    return text


Name = Annotated[str, AfterValidator(_printable)]


class Device(Document):
    """A device: its name in tables, its chip, the connection to it, and the cores that
    measurements use. Without ``cores``, they are the last or the fastest ones; with
    ``[]``, measurements are not pinned, and the device's system chooses.
    """

    SCHEMA: ClassVar[str] = "hwnas.device"

    id: Name
    soc: Name
    connection: Name
    options: dict[str, str] = {}
    cores: tuple[CoreIndex, ...] | None = None
    governor: Name = "unknown"


class Connection(Protocol):
    """Where measurements and predictions run.

    The docstring of ``deploy/runner.py`` defines the format of plans and rows. Not every
    connection can feed the ``input`` of an item. The rows of items that did get their
    input say ``"input": "image"``.

    A connection is made from a Device document. That does not contact the device, but
    raises ConfigError at once if the document's ``options`` are wrong.
    """

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores to pin ``threads`` threads to. Empty: not pinned."""

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


@runtime_checkable
class Explaining(Protocol):
    """A connection that can tell why runtimes do not work on its device."""

    def missing(self) -> dict[str, str]:
        """The runtimes that do not work -> a sentence that says why, and how to install
        it. Raises DeviceError.
        """


def pinned_cores(
    device: Device, threads: int, available: Callable[[], Sequence[int]]
) -> tuple[int, ...]:
    """The cores to pin ``threads`` threads to: those of the device document, or else the
    last of the ``available`` ones. Empty if the document says not to pin.

    Raises DeviceError if there are fewer than ``threads``.
    """
    if device.cores == ():
        return ()
    # the last cores, because the first one serves the system's interrupts
    cores = device.cores or tuple(available()[-threads:])
    if len(cores) < threads:
        raise DeviceError(
            f"device.threads = {threads} needs {threads} cores, but {device.id} has only"
            f" {len(cores)}: lower device.threads."
        )
    return cores


def expanded(path: str) -> Path:
    """A path of a device document, whose ``~`` is the home folder. That of a user who does
    not exist stays as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_file(path: str) -> bool:
    """Whether a path of a device document is a file, whatever it consists of."""
    try:
        return expanded(path).is_file()
    except OSError:  # longer than any path
        return False


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
    is_path = Path(name).suffix == ".json" and "\0" not in name  # which no path can hold
    if is_path:
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
        f"unknown device {quoted(name)}; {nearest(name, devices)} Use ssh:USER@HOST or adb:SERIAL"
        " for a"
        " device without a document, or give the path of a document (*.json)."
    )


def connect(device: Device) -> Connection:
    """A connection to a device. Raises ConfigError if its options are wrong."""
    connection: Connection = CONNECTIONS.get(device.connection)(device)
    return connection
