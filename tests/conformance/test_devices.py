"""The built-in connections pass the tests that third parties' connections must pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from hwnas.devices.device import HOST, Connection, Device, connect
from hwnas.testing import DeviceConformance
from tests.devices import sshd
from tests.devices.fake_phone import FakePhone, adb_server, phone, phones

__all__ = ["adb_server", "phone", "phones"]  # fixtures


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


class TestAdb(DeviceConformance):
    @pytest.fixture(autouse=True)
    def _plug_in(self, phone: FakePhone) -> None:
        self.phone = phone

    def connection(self) -> Connection:
        return connect(self.phone.device())


class TestAdbInt8(TestAdb):
    dtype = "int8"


class TestSsh(DeviceConformance):
    board: ClassVar[Connection]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _switch_on(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with sshd.running(tmp_path_factory.mktemp("sshd")) as server:
            cls.board = connect(server.device())
            yield

    def connection(self) -> Connection:
        return self.board


class TestSshOnnxruntime(TestSsh):
    runtime = "onnxruntime"
