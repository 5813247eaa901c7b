"""The cache: private to this user, and never a file that is not what was put there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hwnas.cache import cache_folder, is_intact, private_folder, write_verified
from hwnas.errors import StorageError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert mode(private_folder(tmp_path / "cache")) == 0o700
    finally:
        os.umask(old)


def test_an_open_folder_of_ours_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    private_folder(folder)
    assert mode(folder) == 0o700


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StorageError, match=r"belongs to another user, .*: set HWNAS_CACHE to"):
        private_folder(tmp_path)


def test_a_folder_of_all_users_is_refused_and_stays_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(StorageError, match="is shared by all users: set HWNAS_CACHE"):
        private_folder(tmp_path)
    assert mode(tmp_path) == 0o1777


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0", "x" * 5000])
def test_a_path_that_cannot_be_a_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be used \(.*\): set HWNAS_CACHE"):
        private_folder(tmp_path / name)


def test_the_home_of_an_unknown_user_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWNAS_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(StorageError, match=r"HWNAS_CACHE = '~nobody-of-that-name/cache' begins"):
        cache_folder()


def test_an_empty_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWNAS_CACHE", "")
    assert cache_folder() == Path.home() / ".cache/hwnas"


def test_what_was_written_is_intact(tmp_path: Path) -> None:
    write_verified(tmp_path / "a", b"content")
    assert is_intact(tmp_path / "a")
    assert not is_intact(tmp_path / "b")


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    content = b"content"
    write_verified(tmp_path / "a", content)
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        (tmp_path / "a").write_bytes(flipped)
        assert not is_intact(tmp_path / "a")


@pytest.mark.parametrize("damage", [b"", b"cont", b"content and more"])
def test_a_file_of_another_length_is_noticed(damage: bytes, tmp_path: Path) -> None:
    write_verified(tmp_path / "a", b"content")
    (tmp_path / "a").write_bytes(damage)
    assert not is_intact(tmp_path / "a")


def test_a_missing_or_damaged_digest_is_noticed(tmp_path: Path) -> None:
    write_verified(tmp_path / "a", b"content")
    (tmp_path / "a.sha256").write_bytes(b"\xff\x00")
    assert not is_intact(tmp_path / "a")
    (tmp_path / "a.sha256").unlink()
    assert not is_intact(tmp_path / "a")


def test_a_file_under_the_name_of_another_is_noticed(tmp_path: Path) -> None:
    """Even if its digest came along, and from a folder of the same layout."""
    (tmp_path / "old").mkdir()
    write_verified(tmp_path / "a", b"content of a")
    write_verified(tmp_path / "b", b"content of b")
    write_verified(tmp_path / "old/b", b"old content of b")
    for place in ("a", "old/b"):
        for suffix in ("", ".sha256"):
            (tmp_path / f"b{suffix}").write_bytes((tmp_path / f"{place}{suffix}").read_bytes())
        assert not is_intact(tmp_path / "b")
