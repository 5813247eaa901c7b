"""The built-in connections pass what third parties' connections have to pass."""

from __future__ import annotations

from hwnas.devices.device import HOST, Connection, Device, connect
from hwnas.testing import DeviceConformance


class TestHost(DeviceConformance):
    def connection(self) -> Connection:
        return connect(HOST)


class TestHostInt8(TestHost):
    dtype = "int8"


class TestHostOnnxruntime(TestHost):
    runtime = "onnxruntime"


class TestSimulated(DeviceConformance):
    reads_files = False  # its clock is a formula of the op keys

    def connection(self) -> Connection:
        return connect(Device(id="simulated", soc="none", connection="simulated"))
