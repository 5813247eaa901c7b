"""The adb program, and phones in every state that it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hwnas.devices.adb import Adb
from hwnas.devices.adb_client import attached_phones
from hwnas.devices.device import Device
from hwnas.errors import ConfigError, DeviceError
from tests.devices.fake_phone import FakePhone, adb, adb_server, phone, phones

__all__ = ["adb_server", "phone", "phones"]  # fixtures


def test_serial_numbers_of_all_kinds() -> None:
    for serial in (
        "R58M12ABCDE",
        "emulator-5554",
        "192.168.1.5:5555",
        "[fe80::1%eth0]:5555",
        "adb-R58M (2)._adb-tls-connect._tcp",
    ):
        Adb(Device(id="fake", soc="none", connection="adb", options={"serial": serial}))


def test_not_attached(phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Device(id="fake", soc="none", connection="adb", options={"serial": "R58M123"})
    with pytest.raises(
        DeviceError, match=rf"phone R58M123 is not attached; attached: {phone.serial}\."
    ):
        Adb(elsewhere).cores(1)
    monkeypatch.setenv("ANDROID_SERIAL", "$(reboot)")
    with pytest.raises(
        ConfigError, match=r"ANDROID_SERIAL = '\$\(reboot\)': not a valid serial number"
    ):
        Adb(Device(id="any", soc="none", connection="adb")).cores(1)
    monkeypatch.setenv("ANDROID_SERIAL", phone.serial)
    assert Adb(Device(id="any", soc="none", connection="adb")).cores(1) == (7,)


def test_which_phone_is_used(phones: Callable[[], FakePhone]) -> None:
    """A single phone need not be named; of several, one must be."""
    any_phone = Device(id="any", soc="none", connection="adb")
    with pytest.raises(
        DeviceError, match="no phone is attached: plug one in and allow USB debugging"
    ):
        Adb(any_phone).cores(1)
    serials = {phones().serial}
    assert Adb(any_phone).cores(1) == (7,)
    serials.add(phones().serial)
    with pytest.raises(
        DeviceError,
        match=r"2 phones are attached \(\S+, \S+\): choose one with device\.name = 'adb:SERIAL'",
    ) as caught:
        Adb(any_phone).cores(1)
    assert all(serial in str(caught.value) for serial in serials)


def test_unauthorized(phone: FakePhone) -> None:
    phone.unplug()
    phone.authorized = False
    adb("disconnect", phone.serial)
    phone.connect()
    with pytest.raises(
        DeviceError,
        match=(
            "does not trust this computer yet: unlock it and accept the dialog 'Allow USB"
            " debugging'"
        ),
    ):
        Adb(phone.device()).cores(1)
    assert attached_phones() == {phone.serial: "unauthorized"}


def test_offline(phone: FakePhone) -> None:
    phone.unplug()
    with pytest.raises(
        DeviceError, match="is offline: plug it in again, or run 'adb reconnect offline'"
    ):
        Adb(phone.device()).cores(1)


def test_without_adb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DeviceError, match=r"adb is not installed: 'apt install adb' \(Debian, Ubuntu\)"
    ):
        Adb(Device(id="any", soc="none", connection="adb")).cores(1)
    assert attached_phones() == {}


def test_attached_phones(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from a running server; none is started."""
    assert attached_phones() == {phone.serial: "Fake Phone"}
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    started = time.monotonic()
    assert attached_phones() == {}
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "no port")
    assert attached_phones() == {}
    assert time.monotonic() - started < 2
