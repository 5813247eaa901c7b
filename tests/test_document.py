"""Documents: they read back as written, broken ones are refused in one sentence, and a
failed write changes nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from hwnas.core.arch import Architecture
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobile32, proxylessnas, published
from hwnas.document import (
    Document,
    content_sha256,
    file_sha256,
    merged,
    nearest,
    read_bytes,
    user_path,
    write_atomic,
)
from hwnas.errors import DocumentError, StorageError, UserError
from hwnas.printable import one_line, printable, quoted


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = 0.0
    kind: Literal["a", "b"] = "a"


class Sheet(Document):
    SCHEMA: ClassVar[str] = "test.sheet"
    VERSION: ClassVar[int] = 3

    title: str
    count: int = 0
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = {}
    maybe: Part | None = None

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        if version < 3:
            content["title"] = content.pop("name")
        return content


def stored(**changes: object) -> str:
    return json.dumps({"schema": "test.sheet/3", "title": "t", **changes})


PARTS = st.builds(
    Part, weight=st.floats(allow_nan=False, allow_infinity=False), kind=st.sampled_from(("a", "b"))
)
SHEETS = st.builds(
    Sheet,
    title=st.text(),
    count=st.integers(),
    parts=st.lists(PARTS, max_size=3).map(tuple),
    named=st.dictionaries(st.text(), PARTS, max_size=3),
    maybe=st.none() | PARTS,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(SHEETS)
def test_what_is_written_reads_back_in_the_same_bytes(sheet: Sheet) -> None:
    read = Sheet.parse(sheet.to_json())
    assert read == sheet
    assert read.to_json() == sheet.to_json()
    assert read.sha256 == sheet.sha256


def test_documents_read_back_from_files(tmp_path: Path) -> None:
    for name, document in {"space": proxylessnas(), "arch": published("mnasnet_b1")}.items():
        path = tmp_path / "deep" / "down" / f"{name}.json"
        document.save(path)
        assert type(document).load(path) == document
        assert file_sha256(path) == document.sha256
        assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_the_bytes_are_canonical_and_the_hash_is_theirs() -> None:
    a = Sheet.parse(
        '{"schema": "test.sheet/3", "count": 2, "title": "Ü", "named": {"y": {}, "x": {"weight":'
        " 1}}}"
    )
    b = Sheet.parse(
        '{"named": {"x": {"kind": "a", "weight": 1.0}, "y": {}}, "title": "\\u00dc", "parts": [],'
        ' "count": 2, "schema": "test.sheet/3"}'
    )
    part = ' {{\n   "kind": "a",\n   "weight": {}\n  }}'
    text = (
        '{\n "count": 2,\n "maybe": null,\n "named": {\n  "x":' + part.format("1.0") + ',\n  "y":' + part.format("0.0") + "\n },\n"
        ' "parts": [],\n "schema": "test.sheet/3",\n "title": "Ü"\n}\n'
    )  # fmt: skip
    assert a.to_json() == b.to_json() == text
    assert a.sha256 == b.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_copy_with_changes_has_its_own_hash_and_choices() -> None:
    space = mobile32()
    before = (space.sha256, space.choices, space.slots)
    changed = space.model_copy(update={"stages": space.stages[:2], "name": "short"})
    assert changed.sha256 == hashlib.sha256(changed.to_json().encode()).hexdigest() != before[0]
    assert len(changed.slots) == 2
    assert changed == MacroSpace.parse(changed.to_json())
    assert (space.sha256, space.choices, space.slots) == before


def test_hashes_of_values_do_not_depend_on_the_order_of_keys() -> None:
    assert content_sha256({"a": 1, "b": [1, {"d": 2, "c": None}]}) == content_sha256(
        {"b": [1, {"c": None, "d": 2}], "a": 1}
    )
    assert content_sha256({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert content_sha256([1, 2]) != content_sha256([2, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (stored(cuont=1), "unknown key 'cuont'; did you mean 'count'"),
        (stored(parts=[{}, {"wieght": 1}]), r"unknown key 'parts\.1\.wieght'; did you mean 'weight'"),
        (stored(named={"title": {"wieght": 1}}), r"unknown key 'named\.title\.wieght'; did you mean 'weight'"),
        (stored(maybe={"knd": "a"}), r"unknown key 'maybe\.knd'; did you mean 'kind'"),
        (stored(zzzzzzz=1), "unknown key 'zzzzzzz'; known: count, maybe, named, parts, title"),
        (stored(count="3"), "count = '3': input should be a valid integer"),
        (stored(count=1.5), "count = 1.5: "),
        (stored(count=None), "count = None: "),
        (stored(parts=[{"kind": "c"}]), r"parts\.0\.kind = 'c': input should be 'a' or 'b'"),
        (stored(parts=[{"weight": True}]), r"parts\.0\.weight = True"),
        ('{"schema": "test.sheet/3"}', "key 'title' is missing; add it"),
        (stored(schema="hwnas.space/1"), r"has schema 'hwnas\.space/1', but a test\.sheet/3 document is needed here"),
        (stored(schema="test.sheet"), r"has schema 'test\.sheet', but"),
        (stored(schema="test.sheet/x"), "but a test.sheet/3 document is needed"),
        (stored(schema="test.sheet/²"), "but a test.sheet/3 document is needed"),
        (stored(schema="test.sheet/-1"), "but a test.sheet/3 document is needed"),
        (stored(schema="test.sheet/0"), "but a test.sheet/3 document is needed"),
        (stored(schema="test.sheet/01"), "but a test.sheet/3 document is needed"),
        (stored(schema="test.sheet/" + "9" * 5000), "but a test.sheet/3 document is needed"),
        (stored(schema=["test.sheet/3"]), "but a test.sheet/3 document is needed"),
        (stored(schema=3), "has schema 3, but"),
        ('{"title": "t"}', "has schema None, but"),
        (stored(schema="test.sheet/4"), r"has schema test\.sheet/4, newer than this hwnas can read \(3\): upgrade hwnas"),
        ("[]", r"holds a JSON list, not a test\.sheet document"),
        ("null", "holds a JSON NoneType"),
        ("", "is not valid JSON .*: it is corrupt or was cut off; create it again"),
        ("{'title': 3}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (stored(title="\ud800"), "source"),
        ('{"schema": "test.sheet/3", "title": "t", "count": ' + "9" * 5000 + "}", r"an integer of 5000 digits \(9{20}\.\.\.\)"),
        ('{"schema": "test.sheet/3", "title": "t", "title": "u"}', "has the key 'title' twice: remove one of them"),
        (stored(named={}).replace("{}", '{"x": {}, "x": {"weight": 1}}'), "has the key 'x' twice"),
        (stored(parts=[{"weight": float("nan")}]), "holds NaN, where a finite number is needed"),
        (stored(parts=[{"weight": float("-inf")}]), "holds -Infinity, where a finite number is needed"),
        (stored(parts=[{"weight": 1}]).replace(": 1}", ": 1e999}"), "holds 1e999, where a finite number is needed"),
        (stored(**{"x" * 5000: 1}), r"unknown key 'x{77}\.\.\.'"),
    ],
)  # fmt: skip
def test_wrong_documents_are_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        Sheet.parse(text, "source")
    assert str(caught.value).startswith("source")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_older_versions_are_migrated() -> None:
    assert Sheet.parse('{"schema": "test.sheet/2", "name": "old", "count": 4}') == Sheet(
        title="old", count=4
    )
    with pytest.raises(DocumentError, match="unknown key 'name'"):
        Sheet.parse('{"schema": "test.sheet/3", "name": "old", "title": "t"}')


@pytest.mark.parametrize(
    "document", [mobile32(), published("mobilenet_v2")], ids=["space", "architecture"]
)
def test_a_truncated_file_is_a_document_error_wherever_it_was_cut(
    document: Document, tmp_path: Path
) -> None:
    path = tmp_path / "cut.json"
    content = document.to_json().encode()
    for length in range(0, len(content.rstrip()), 37):
        path.write_bytes(content[:length])
        with pytest.raises(DocumentError, match=r"cut\.json is not valid JSON"):
            type(document).load(path)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.data())
def test_a_damaged_file_is_a_document_error_or_still_a_document(data: st.DataObject) -> None:
    document = Architecture(name="á", blocks=published("mobilenet_v2").blocks[:2])
    content = bytearray(document.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Architecture.parse(bytes(content))
    except DocumentError:
        return
    assert Architecture.parse(read.to_json()) == read


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=60))
def test_noise_is_a_document_error(noise: bytes) -> None:
    with pytest.raises(DocumentError):
        Sheet.parse(noise)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    st.dictionaries(st.sampled_from(("title", "count", "parts", "named", "maybe", "other")), JSON)
)
def test_any_json_is_a_document_or_a_document_error(content: dict[str, Any]) -> None:
    try:
        read = Sheet.parse(json.dumps({**content, "schema": "test.sheet/3"}))
    except DocumentError as error:
        assert "\n" not in str(error).replace(repr(content), "")
        return
    assert read.title == content["title"]


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"absent\.json does not exist: check the path"):
        Sheet.load(tmp_path / "absent.json")
    with pytest.raises(DocumentError, match=r"cannot be read \(Is a directory\)"):
        read_bytes(tmp_path)


def test_a_file_that_is_too_large_for_its_kind_is_not_read_to_its_end() -> None:
    with pytest.raises(DocumentError, match=r"/dev/zero has more than 1 MiB, too much for a file"):
        read_bytes("/dev/zero", at_most=2**20)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_names_that_no_file_can_have_are_document_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(DocumentError, match="check the path") as caught:
        Sheet.load(tmp_path / name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("~nobody-at-all/x", "begins with the home folder of a user who does not exist"),
        ("x" * 5000, r"cannot be opened \(File name too long\): check the path"),
        ("a\0b", r"is not a path \(embedded null byte\): correct it"),
    ],
)
def test_what_cannot_be_a_path_is_said_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^search.table = .*{message}") as caught:
        user_path(text, "search.table")
    assert len(str(caught.value)) < 300


def test_paths_of_users_may_lead_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/tables/x.json", "search.table") == tmp_path / "tables" / "x.json"
    (tmp_path / "file").write_text("")
    assert user_path(f"{tmp_path}/file/x", "search.table") == tmp_path / "file" / "x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \N{LATIN SMALL LETTER U WITH DIAERESIS}\t\n", None),
        ("\x1b[2J", "\\u001b[2J"),
        ("a\rb\x7f\x9b", "a\\u000db\\u007f\\u009b"),
        ("\u202egnp\u2066\u200f", "\\u202egnp\\u2066\\u200f"),
        ("\ud800", "\\ud800"),
    ],
)
def test_characters_that_control_a_terminal_are_shown_as_escapes(
    text: str, shown: str | None
) -> None:
    assert printable(text) == (text if shown is None else shown)
    # the escapes are those of JSON
    stored_text = json.dumps({"name": text}, ensure_ascii=False)
    assert json.loads(printable(stored_text)) == {"name": text}


def test_one_line_is_short_whatever_it_names() -> None:
    assert one_line("a\nb") == "a b"
    assert len(one_line("x" * 100_000)) < 2100


def test_values_are_quoted_in_short() -> None:
    assert quoted("x" * 100) == "'" + "x" * 56 + "..."
    assert quoted(10**5000) == "a number of thousands of digits"


def test_hints() -> None:
    assert nearest("mobilnet", ["mobilenet", "mnasnet"]) == "did you mean 'mobilenet'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b."
    assert nearest("x", []) == "known: none."


def test_merging_is_deep_and_later_values_win() -> None:
    first = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merged(first, {"b": {"d": {"f": 4}, "c": 5}, "a": {"g": 6}}) == {
        "a": {"g": 6},
        "b": {"c": 5, "d": {"e": 3, "f": 4}},
    }
    assert first == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_a_renamed_plug_in_does_not_inherit_options() -> None:
    old = {"strategy": {"name": "tunas", "rl_lr": 1}}
    assert merged(old, {"strategy": {"name": "random"}}, replace=("strategy",)) == {
        "strategy": {"name": "random"}
    }
    assert merged(old, {"strategy": {"entropy": 2}}, replace=("strategy",)) == {
        "strategy": {"name": "tunas", "rl_lr": 1, "entropy": 2}
    }


# ---- writing


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


def test_written_files_have_the_permissions_of_any_other_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", b"")
    (tmp_path / "theirs").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


# A limit on the size of files stands in for a full disk, and needs no root.
FULL_DISK = """
import resource, sys
from pathlib import Path
from hwnas.document import write_atomic
from hwnas.errors import StorageError
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(path, b"x" * 100_000)
except StorageError as error:
    print(error)
"""


def test_a_write_without_space_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout
        == f"{path} cannot be written (File too large): free some space or choose another --out"
        " folder.\n"
    )
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system with only a few kilobytes of space."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_only_the_old_file(full_disk: Path) -> None:
    path = full_disk / "table.json"
    write_atomic(path, b"old")
    with pytest.raises(
        StorageError, match=r"cannot be written \(No space left on device\): free some space"
    ):
        write_atomic(path, b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert [file.name for file in full_disk.iterdir()] == ["table.json"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written to, with one file in it. This holds for root too,
    where the file system supports immutable folders.
    """
    folder = tmp_path / "fixed"
    folder.mkdir()
    (folder / "old.json").write_bytes(b"old")
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    try:
        immutable = (
            subprocess.run(
                ["chattr", "+i", str(folder)], capture_output=True, check=False
            ).returncode
            == 0
        )
    except FileNotFoundError:
        immutable = False
    if not immutable:
        pytest.skip("root writes everywhere, and this file system has no immutable folders")
    yield folder
    subprocess.run(["chattr", "-i", str(folder)], check=True)


def test_a_read_only_folder_is_a_storage_error(read_only: Path) -> None:
    for path in (read_only / "new.json", read_only / "old.json", read_only / "sub" / "new.json"):
        with pytest.raises(
            StorageError, match=r"cannot be written \((Operation not permitted|Permission denied)\)"
        ):
            mobile32().save(path)
    assert {file.name: file.read_bytes() for file in read_only.iterdir()} == {"old.json": b"old"}


def test_a_path_below_a_file_or_onto_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "file" / "x.json",
        tmp_path / "file" / "y" / "x.json",
        tmp_path / "folder",
        tmp_path / ("n" * 300),
    ):
        with pytest.raises(StorageError, match="choose another --out folder") as caught:
            write_atomic(path, b"new")
        assert isinstance(caught.value, UserError)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_garbage_is_collected_again_after_a_document_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "sheet.json"
    Sheet(title="a").save(path)
    assert gc.isenabled()
    Sheet.load(path)
    assert gc.isenabled()
    path.write_text("{")
    with pytest.raises(DocumentError):
        Sheet.load(path)
    assert gc.isenabled()
