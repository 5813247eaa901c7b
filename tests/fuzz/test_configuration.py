"""Experiments, damaged: TOML files, ``-s KEY=VALUE`` and names that lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwnas.config import all_keys
from tests.conftest import TINY_CONFIG, write_tiny
from tests.fuzz.damage import damaged, fuzzed
from tests.fuzz.driving import survives

OVERRIDDEN = (
    "0", "-1", "1", "3", "0.5", "-0.5", "1e-300", "1e300", "inf", "nan", "1e999", "9" * 5000, "0x" + "f" * 9000,
    str(2**31), str(2**63), str(10**40), "true", "false", "''", "' '", "host", "/etc/passwd", "../..", "~nobody-at-all/x",
    "'x\\u0000y'", "\"x\\u0000y\"", "x" * 5000, "\x1b[2J", "\u202egnp.exe", '"\\u009b31m"', "[]", "[[]]", "{}", "{name = 1}",
    "[1, 2]", "['a', 'a']", "[true]", "[" * 3000, "{a=" * 2000, "2026-01-01", "12:00:00", "'''", "", "{name = 'evolution'}",
    "{name = 'tunas', rl_lr = -1}", "{kind = 'macs', max_macs = 1e300}", "[{kind = 'macs', max_macs = -1}]",
    "[{kind = 'latency', table = '~nobody-at-all/x', max_ms = 1}]", "[" + "1," * 3000 + "]", "mobilenet_v2", "x.json",
    "x" * 5000 + ".json",
)  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole small experiment."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_tiny(folder)
    return folder


@fuzzed(40)
@given(content=st.just(TINY_CONFIG).flatmap(lambda text: damaged(text.encode())))
def test_files(folder: Path, content: bytes) -> None:
    named = content.replace(b"{folder}", str(folder).encode()).replace(b"{{", b"{")
    config = folder / "damaged.toml"
    config.write_bytes(named.replace(b"}}", b"}"))
    survives(folder, "run", config, "--plan", "-q", "--out", folder / "none")


@fuzzed(80)
@given(key=st.sampled_from(all_keys()), value=st.sampled_from(OVERRIDDEN), detects=st.booleans())
def test_overrides(folder: Path, key: str, value: str, detects: bool) -> None:
    task = (
        ("-s", "task=detect", "-s", "data.name=coco", "-s", "data.augment=none") if detects else ()
    )
    survives(
        folder, "run", folder / "tiny.toml", "--plan", "-q", "--out", folder / "none", *task, "-s",
        f"{key}={value}",
    )  # fmt: skip


BROKEN_KEYS = ("", "=", "a", "data", "data.", ".", "data..path", "[x]", "\x1b")


@fuzzed(20)
@given(key=st.sampled_from(BROKEN_KEYS), value=st.sampled_from(("", "=", "=1")))
def test_overrides_that_are_none(folder: Path, key: str, value: str) -> None:
    outcome = survives(
        folder,
        "run",
        folder / "tiny.toml",
        "--plan",
        "-q",
        "--out",
        folder / "none",
        "-s",
        key + value,
    )
    assert outcome.code == 2
