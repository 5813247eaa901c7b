"""What is put on a phone, and what is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hwnas.devices.adb import Adb
from hwnas.errors import DeviceError
from tests.devices.fake_phone import FakePhone, adb_server, phone, phones, plan, split_rows

__all__ = ["adb_server", "phone", "phones"]  # fixtures


def test_a_full_phone(phone: FakePhone, tmp_path: Path) -> None:
    phone.free_bytes = 20_000
    with pytest.raises(
        DeviceError,
        match=(
            rf"phone {phone.serial} is full: free some space on it, or delete its folder"
            r" /data/local/tmp/hwnas\."
        ),
    ):
        list(Adb(phone.device()).measure(plan(2), tmp_path))
    assert not list((phone.folder / "models").iterdir())


def test_a_folder_that_cannot_be_written(phone: FakePhone, tmp_path: Path) -> None:
    phone.local("/data/local/tmp/hwnas").write_text("a file")
    with pytest.raises(
        DeviceError, match=r"cannot write to /data/local/tmp/hwnas on phone \S+: mkdir"
    ):
        list(Adb(phone.device()).measure(plan(1), tmp_path))


def test_a_tool_for_another_phone(phone: FakePhone, tmp_path: Path) -> None:
    phone.set_properties(
        {"ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a", "ro.product.model": "Arm"}
    )
    with pytest.raises(
        DeviceError,
        match=(
            r"benchmark_model is for x86_64, but phone \S+ runs arm64-v8a, armeabi-v7a: get the"
            r" build for"
        ),
    ):
        list(Adb(phone.device()).measure(plan(1), tmp_path))
    with pytest.raises(DeviceError, match="is for x86_64"):
        Adb(phone.device()).runtimes()
    assert phone.runs == [] and not phone.folder.exists()


def test_a_tool_that_is_missing_or_not_a_program(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "benchmark_model"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(
        DeviceError,
        match=(
            r"benchmark_model is not a program for Android: .*ANDROID\.md explains where to get"
            r" benchmark_model"
        ),
    ):
        list(Adb(phone.device(benchmark_model=str(script))).measure(plan(1), tmp_path))
    with pytest.raises(
        DeviceError,
        match=(
            r"benchmark_model = \S+nowhere cannot be read \(No such file or directory\): correct"
            r" .*ANDROID\.md"
        ),
    ):
        list(
            Adb(phone.device(benchmark_model=str(tmp_path / "nowhere"))).measure(plan(1), tmp_path)
        )
    monkeypatch.delenv("HWNAS_BENCHMARK_MODEL")
    with pytest.raises(
        DeviceError,
        match=(
            r"LiteRT's benchmark_model for Android was not found: set"
            r" \$HWNAS_BENCHMARK_MODEL"
        ),
    ):
        Adb(phone.device()).runtimes()


def test_the_tool_is_found_on_the_path(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name that it is downloaded with, executable or not."""
    shutil.copy(os.environ["HWNAS_BENCHMARK_MODEL"], tmp_path / "android_aarch64_benchmark_model")
    (tmp_path / "android_aarch64_benchmark_model").chmod(0o644)
    monkeypatch.delenv("HWNAS_BENCHMARK_MODEL")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(split_rows(Adb(phone.device()).measure(plan(1), tmp_path))[1]) == 1


def test_the_lock_of_a_dead_run_is_broken(phone: FakePhone, tmp_path: Path) -> None:
    phone.folder.mkdir()
    # a live process, but not one of our runs
    (phone.folder / "lock").symlink_to(str(os.getpid()))
    assert len(split_rows(Adb(phone.device()).measure(plan(1), tmp_path))[1]) == 1
