"""What is put on a phone, and what is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hwnas.devices.adb import Adb
from hwnas.devices.adb_session import find_program
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


def test_damaged_files_are_sent_again(phone: FakePhone, tmp_path: Path) -> None:
    """A flipped bit in a model and in the tool, and the model of another op."""
    device = Adb(phone.device())
    list(device.measure(plan(3), tmp_path))
    places = [*(phone.folder / "models").iterdir(), *phone.folder.glob("benchmark_model-*")]
    whole = {path: path.read_bytes() for path in places}
    flipped, swapped, _, program = whole
    for path in (flipped, program):
        path.write_bytes(whole[path][:-1] + bytes([whole[path][-1] ^ 1]))
    swapped.write_bytes(whole[flipped])
    _, rows, _, _ = split_rows(Adb(phone.device()).measure(plan(3), tmp_path))
    assert all("ms" in row for row in rows) and len(rows) == 3
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_phone_without_sha256sum_gets_its_files_again(phone: FakePhone, tmp_path: Path) -> None:
    list(Adb(phone.device()).measure(plan(1), tmp_path))
    missing = phone.root / "system/bin/sha256sum"
    missing.write_text("#!/bin/sh\necho 'sha256sum: not found' >&2\nexit 127\n")
    missing.chmod(0o755)
    [model] = (phone.folder / "models").iterdir()
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    list(Adb(phone.device()).measure(plan(1), tmp_path))
    assert model.read_bytes() == content


def test_the_folder_is_closed_to_other_programs(phone: FakePhone, tmp_path: Path) -> None:
    list(Adb(phone.device()).measure(plan(1), tmp_path))
    folders = (phone.folder, phone.folder / "models")
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    for folder in folders:  # as an earlier version left them
        folder.chmod(0o777)
    list(Adb(phone.device()).measure(plan(1), tmp_path))
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_the_folder_of_all_programs_stays_open_to_them(phone: FakePhone, tmp_path: Path) -> None:
    shared = phone.local("/data/local/tmp")
    shared.chmod(0o771)
    list(Adb(phone.device(folder="/data/local/tmp")).measure(plan(1), tmp_path))
    assert shared.stat().st_mode & 0o777 == 0o771
    assert (shared / "models").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", ["tool\0", "~nobody-of-that-name/tool", "x" * 5000])
def test_a_path_of_the_tool_that_cannot_be(path: str) -> None:
    with pytest.raises(DeviceError, match=r"^benchmark_model = .* cannot be read \(.*\): correct"):
        find_program(path)


def test_the_lock_of_a_dead_run_is_broken(phone: FakePhone, tmp_path: Path) -> None:
    phone.folder.mkdir()
    # a live process, but not one of our runs
    (phone.folder / "lock").symlink_to(str(os.getpid()))
    assert len(split_rows(Adb(phone.device()).measure(plan(1), tmp_path))[1]) == 1
