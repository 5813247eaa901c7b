"""Where the images of an annotation file are: whose names come from other computers, and
whose lead elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from hwnas.data.coco_paths import image_paths
from hwnas.errors import DataError


def made(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"pixels")


def found(
    folder: Path, *names: str, skip: Sequence[str] = (), allow_outside: bool = False
) -> list[str]:
    return image_paths(
        names, folder, Path("notes.json"), skip=frozenset(skip), allow_outside=allow_outside
    )


def refused(folder: Path, *names: str, skip: Sequence[str] = ()) -> str:
    with pytest.raises(DataError) as caught:
        found(folder, *names, skip=skip)
    message = str(caught.value)
    assert message.startswith("notes.json ")
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "a.png"),
        ("sub/b.png", "sub/b.png"),
        ("./sub//b.png", "sub/b.png"),
        ("sub/../a.png", "a.png"),
        ("sub\\b.png", "sub/b.png"),
        (".\\sub\\b.png", "sub/b.png"),
        ("white%20space.png", "white space.png"),
        ("sub%2Fb.png", "sub/b.png"),
        ("sub\\white%20space.png", "sub/white space.png"),
        ("%E7%8C%AB.png", "猫.png"),
        # what exists is not decoded
        ("50%25.png", "50%25.png"),
        ("back\\slash.png", "back\\slash.png"),
        # the folder itself, as seen from elsewhere
        ("train/a.png", "a.png"),
        ("data/train/sub/b.png", "sub/b.png"),
        ("C:\\data\\train\\sub\\b.png", "sub/b.png"),
        ("/home/somebody/train/white%20space.png", "white space.png"),
        ("../train/a.png", "a.png"),
        ("train/train/a.png", "a.png"),
        # such a folder inside takes precedence
        ("train/c.png", "train/c.png"),
    ],
)
def test_names_are_read_as_they_were_meant(tmp_path: Path, name: str, expected: str) -> None:
    folder = tmp_path / "train"
    made(folder, "a.png", "sub/b.png", "white space.png", "sub/white space.png", "猫.png")
    made(folder, "50%25.png", "50%.png", "back\\slash.png", "back/slash.png")
    made(folder, "c.png", "train/c.png")
    assert found(folder, name) == [f"train/{expected}"]


def test_absolute_names_of_this_computer_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    made(folder, "sub/b.png")
    assert found(folder, str(folder / "sub" / "b.png")) == ["train/sub/b.png"]


def test_an_image_in_skip_need_not_exist(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    made(folder, "a.png")
    assert found(folder, "a.png", "sub\\b.png", skip=["train/sub/b.png"]) == [
        "train/a.png",
        "train/sub/b.png",
    ]
    assert "of which 1 are not in" in refused(folder, "a.png", "b.png", skip=["train/c.png"])


def test_a_link_in_the_folder_may_lead_out_of_it(tmp_path: Path) -> None:
    """The user made it, not the annotation file."""
    folder = tmp_path / "train"
    made(tmp_path / "elsewhere", "a.png", "deep/b.png")
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.png").symlink_to(tmp_path / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    names = ["a.png", "link/deep/b.png"]
    assert found(folder, *names) == ["train/a.png", "train/link/deep/b.png"]
    for name in ("broken.png", "loop", "loop/a.png", "link/../a.png/b.png"):
        assert "of which 1 are not in" in refused(folder, name)


@pytest.mark.parametrize(
    "name", ["../val/a.png", "/etc/passwd", "sub/../../val/a.png", "..\\val\\a.png", "..", "%2e%2e"]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Whether there is such a file or not."""
    folder = tmp_path / "train"
    made(folder, "a.png")
    made(tmp_path, "val/a.png")
    message = refused(folder, "a.png", name)
    assert f"has file names that lead out of {folder} (1 of 2, first: {name!r})" in message
    assert "data.allow_outside = true" in message


def test_names_that_lead_out_of_the_folder_are_read_if_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    made(folder, "a.png")
    made(tmp_path, "val/b.png")
    inside, outside = "a.png", str(tmp_path / "val" / "b.png")
    paths = found(folder, inside, "../val/b.png", "..\\val\\b.png", outside, allow_outside=True)
    assert paths[0] == "train/a.png"
    assert paths[3] == outside
    assert {os.path.realpath(tmp_path / path) for path in paths[1:]} == {outside}
    with pytest.raises(DataError, match="of which 1 are not in"):
        found(folder, "../val/c.png", allow_outside=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.png", "add them there, or remove them from the file."),
        ("images\\gone.png", "its file names have backslashes, and no file is there with slashes"),
        ("images\\a.png", "'a.png' is there, so take the folders out of the file names"),
        ("data/upload/1/a.png", "'a.png' is there, so take the folders out of the file names"),
        ("", "add them there"),
        ("\0", "add them there"),
        ("a" * 5_000, "add them there"),
        ("\ud800", "add them there"),
        ("a.png/b.png", "add them there"),
        ("\x1b[2Ja.png", "'\\x1b[2Ja.png'"),
    ],
)
def test_what_is_missing_has_the_right_cure(tmp_path: Path, name: str, words: str) -> None:
    folder = tmp_path / "train"
    made(folder, "a.png")
    message = refused(folder, "a.png", name)
    assert f"names 2 images, of which 1 are not in {folder} (first: " in message
    assert words in message
    assert len(message) < 800


def test_a_folder_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    assert "of which 2 are not in" in refused(tmp_path / "train", "a.png", "sub/b.png")


def test_directories_are_listed_instead_of_asking_for_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, the images of COCO would take seconds on a network drive."""
    folder = tmp_path / "train"
    names = [f"{directory}/{number}.png" for directory in ("a", "b") for number in range(20)]
    made(folder, *names)
    listed: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scan(path))
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail("asked for one file"))
    assert found(folder, *names) == [f"train/{name}" for name in names]
    assert sorted(listed) == [str(folder / "a"), str(folder / "b")]
