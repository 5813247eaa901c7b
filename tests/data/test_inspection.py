"""One look at all images: every problem of every part at once, what is only noted, and
that no file is decoded twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hwnas import preflight
from hwnas.config import DataConfig, load_experiment
from hwnas.data import examination, summary
from hwnas.data.decoding import Examined
from hwnas.data.examination import examine_all
from hwnas.data.inspection import Inspection, inspect, with_classes
from hwnas.errors import DataProblemsError
from hwnas.experiments import experiment_space
from hwnas.progress import Progress, ProgressBar
from tests.train.rectangles import write_rectangles

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / examination.FILE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """5 training images of each of 3 classes, 2 test images, of several sizes."""
    root = tmp_path / "data"
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (10 + number, 12 + label), (40 * number, 99, 0))
                image.save(root / part / name / f"{number}.jpg")
    return root


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"name": "folder", "path": str(root), "resolution": 8, **changes})


def look(root: Path, *, searches: bool = True, **changes: Any) -> Inspection:
    return inspect(config(root, **changes), searches=searches)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# problems


def test_good_images_are_no_problem(root: Path) -> None:
    inspection = look(root)
    inspection.check()
    assert (inspection.problems, inspection.notes, inspection.unreadable) == ([], [], {})
    train, test = inspection.parts
    assert (train.name, test.name) == ("train", "test")
    assert (len(train.images), len(test.images)) == (15, 6)
    assert train.counts == dict.fromkeys(CLASSES, 5)
    assert train.examined["train/cat/3.jpg"] == Examined("RGB", 13, 14)


def test_all_problems_of_all_parts_are_told_at_once(root: Path) -> None:
    for number in range(4):
        truncate(root / "train" / "ant" / f"{number}.jpg")
    (root / "val" / "cat" / "1.jpg").write_bytes(b"")
    inspection = look(root, classes=4)
    assert inspection.unreadable == {
        **{f"train/ant/{number}.jpg": "truncated" for number in range(4)},
        "val/cat/1.jpg": "empty",
    }
    with pytest.raises(DataProblemsError) as caught:
        inspection.check()
    assert caught.value.unreadable == inspection.unreadable
    title, *problems = str(caught.value).split("\n")
    assert title == "the data have 3 problems:"
    assert problems == [
        (
            f"  data.path '{root}' has 3 class folders in train, but data.classes = 4: set it to 3,"
            " or leave it out."
        ),
        (
            f"  4 of 15 training images in {root} do not decode: train/ant/0.jpg (truncated),"
            " train/ant/1.jpg (truncated), train/ant/2.jpg (truncated) and 1 more; replace or"
            " remove them, or set data.unreadable = 'skip'."
        ),
        (
            f"  1 of 6 test images in {root} does not decode: val/cat/1.jpg (empty); replace or"
            " remove it, or set data.unreadable = 'skip'."
        ),
    ]


def test_a_part_that_cannot_be_opened_does_not_hide_the_other(root: Path) -> None:
    truncate(root / "train" / "bee" / "0.jpg")
    (root / "val").rename(root / "test")
    flat, unreadable = look(root, classes=3).problems
    assert "val does not exist" in flat
    assert "1 of 15 training images" in unreadable


def test_labels_that_are_wrong_do_not_hide_images_that_are(root: Path) -> None:
    truncate(root / "train" / "bee" / "0.jpg")
    labels, folders, unreadable = look(root, classes=2).problems
    assert "labels 0 to 2, but data.classes = 2" in labels
    assert "has 3 class folders in train, but data.classes = 2" in folders
    assert "train/bee/0.jpg (truncated)" in unreadable


def test_the_same_problem_of_both_parts_is_told_once(tmp_path: Path) -> None:
    inspection = look(tmp_path / "absent", classes=3)
    assert inspection.problems == [
        f"data.path '{tmp_path / 'absent'}' is not a folder: check the path, or where the images"
        " were unpacked."
    ]
    with pytest.raises(DataProblemsError, match=r"^data\.path .* is not a folder"):
        inspection.check()


def test_a_search_needs_two_training_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / part / "ant" / "0.png")
    one = config(tmp_path, classes=2)  # of a space with two classes
    assert inspect(one, searches=False, exact=False).problems == []
    [problem] = inspect(one, searches=True, exact=False).problems
    assert "has one training image, but a search holds some out" in problem


def test_classes_that_cannot_be_counted_are_one_problem_of_all(root: Path) -> None:
    """The other part is looked at, too: here, where the classes are not set, and already
    where they are counted.
    """
    for path in [*root.rglob("*.jpg")]:
        path.rename(path.parents[1] / f"{path.parent.name}{path.name}")
    uncounted, val = look(root).problems
    assert uncounted.startswith("data.classes is not set and cannot be counted: ")
    assert f"{root / 'train'} holds 15 images directly" in uncounted
    assert f"{root / 'val'} holds 6 images directly" in val
    with pytest.raises(DataProblemsError) as caught:
        with_classes(config(root))
    assert str(caught.value) == f"the data have 2 problems:\n  {uncounted}\n  {val}"


def test_labels_of_any_size_are_a_problem_and_nothing_else(tmp_path: Path) -> None:
    for part, labels in (("train", [0, 10**15]), ("test", [-5, 1])):
        np.savez(tmp_path / f"{part}.npz", x=np.zeros((2, 8, 8, 3), np.uint8), y=labels)
    inspection = look(tmp_path, name="npz", classes=3)
    assert [problem.partition(",")[0] for problem in inspection.problems] == [
        "data 'npz' has labels 0 to 1000000000000000",
        "data 'npz' has labels -5 to 1",
    ]


# what is left out, and what is only noted


def test_unreadable_images_can_be_skipped(root: Path) -> None:
    truncate(root / "train" / "bee" / "0.jpg")
    truncate(root / "val" / "bee" / "0.jpg")
    inspection = look(root, unreadable="skip")
    inspection.check()
    assert inspection.unreadable == dict.fromkeys(("train/bee/0.jpg", "val/bee/0.jpg"), "truncated")
    assert inspection.notes == [
        (
            f"1 of 15 training images in {root} does not decode: train/bee/0.jpg (truncated); left"
            " out."
        ),
        f"1 of 6 test images in {root} does not decode: val/bee/0.jpg (truncated); left out.",
    ]
    again = look(root, unreadable="skip", skip=tuple(inspection.unreadable))
    assert (again.problems, again.unreadable) == ([], {})
    assert again.notes == ["2 images left out (data.skip)."]
    assert "train/bee/0.jpg" not in again.parts[0].examined


def test_skipping_must_leave_images_of_every_class(root: Path) -> None:
    for path in (root / "train" / "bee").iterdir():
        truncate(path)
    [problem] = look(root, unreadable="skip").problems
    assert "has no images of 'bee' besides those in data.skip" in problem


def test_classes_without_test_images_are_noted(root: Path) -> None:
    for name in CLASSES[:2]:
        for path in (root / "val" / name).iterdir():
            path.unlink()
    inspection = look(root)
    inspection.check()
    assert inspection.notes == ["2 of 3 classes have no test images: 'ant', 'bee'."]


# objects


def test_images_that_do_not_fit_their_boxes_are_found(tmp_path: Path) -> None:
    """Also when the images are known and only the annotations have changed."""
    root = write_rectangles(tmp_path / "boxes", images=4, test_images=2)
    options = {"name": "coco", "classes": 2, "augment": "ssdlite"}
    assert look(root, **options).problems == []
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for image in content["images"][:2]:
        image["width"] += 40
    file.write_text(json.dumps(content))
    (root / "val" / "0.png").write_bytes(b"")
    misfit, unreadable = look(root, **options).problems
    assert misfit.startswith("2 training images do not fit their labels, first: image ")
    assert "is 64 x 48 pixels as stored, but" in misfit
    assert "1 of 2 test images" in unreadable
    assert "val/0.png (empty)" in unreadable


# what is remembered


class Counting(Progress):
    """Counts the files that are decoded."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        assert description == "check images"
        self.counts.append(total)
        yield ProgressBar()


def decoded(root: Path, **changes: Any) -> int:
    """How many images a look at all of them decodes."""
    progress = Counting()
    inspect(config(root, **changes), searches=True, progress=progress).check()
    return sum(progress.counts)


def test_each_image_is_decoded_once(root: Path) -> None:
    assert decoded(root) == 21
    assert decoded(root) == 0
    moved = root.with_name("link")
    moved.symlink_to(root)
    assert decoded(moved) == 0
    assert decoded(root, channels=1, mean=(0.5,), std=(0.5,)) == 21


def test_a_changed_file_is_decoded_again(root: Path) -> None:
    decoded(root)
    victim = root / "train" / "ant" / "1.jpg"
    time_ns = victim.stat().st_mtime_ns
    os.utime(victim, ns=(time_ns, time_ns + 1))
    assert decoded(root) == 1
    time_ns = victim.stat().st_mtime_ns
    truncate(victim)
    os.utime(victim, ns=(time_ns, time_ns))  # now only its size tells
    inspection = look(root)
    assert inspection.unreadable == look(root).unreadable == {"train/ant/1.jpg": "truncated"}
    victim.unlink()
    assert decoded(root) == 0


def test_a_damaged_cache_is_replaced_without_a_word(root: Path, cache: Path) -> None:
    decoded(root)
    whole = cache.read_bytes()
    rng = np.random.default_rng(0)
    for content in (
        b"",
        b"no database",
        whole[: len(whole) // 2],
        whole[:100] + rng.bytes(len(whole) - 100),
        rng.bytes(len(whole)),
    ):
        cache.write_bytes(content)
        assert decoded(root) == 21
        assert decoded(root) == 0


def test_damaged_values_in_the_cache_are_not_used(root: Path, cache: Path) -> None:
    decoded(root)
    with sqlite3.connect(cache) as database:
        database.execute("UPDATE images SET width = x'00' WHERE image = ?", (b"val/ant/0.jpg",))
    database.close()
    assert decoded(root) == 1


def test_the_cache_is_private_and_not_needed(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(root)
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    cache.unlink()
    cache.mkdir()
    assert [decoded(root), decoded(root)] == [21, 21]
    monkeypatch.setenv("HWNAS_CACHE", str(root / "val" / "ant" / "0.jpg"))
    assert [decoded(root), decoded(root)] == [21, 21]


def test_a_locked_cache_is_not_waited_for_forever(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(root)
    monkeypatch.setattr(examination, "LOCKED_SECONDS", 0.05)
    with sqlite3.connect(cache) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert decoded(root) == 21
        other.rollback()
    other.close()
    assert decoded(root) == 0


def test_an_interrupted_look_continues(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = examination.examine

    def interrupted(folder: Path, image: str, channels: int) -> Examined:
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.append(image)
        return whole(folder, image, channels)

    monkeypatch.setattr(examination, "_cores", lambda: 1)
    monkeypatch.setattr(examination, "CHUNK", 4)
    with monkeypatch.context() as patched:
        patched.setattr(examination, "examine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            look(root)
    assert decoded(root) == 21 - 8


def test_names_that_are_not_text_are_remembered(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("L", (3, 4)).save(tmp_path / name)
    for count in ([1], []):
        progress = Counting()
        assert examine_all(tmp_path, [name], 3, progress) == {name: Examined("L", 3, 4)}
        assert progress.counts == count


# before a run


def test_a_run_looks_at_all_images_before_it_begins(root: Path) -> None:
    """And reports what it notes; a profile needs no images."""
    notes: list[str] = []

    class Listening(Progress):
        def info(self, message: str) -> None:
            notes.append(message)

    overrides = ["data.name=folder", f"data.path={root}", "data.classes=3"]
    experiment = load_experiment(None, [*overrides, "search.target_ms=1"])
    space = experiment_space(experiment)
    (root / "val" / "bee" / "0.jpg").unlink()
    (root / "val" / "bee" / "1.jpg").unlink()
    inspection = preflight.check(experiment, space, ["search", "train"], Listening())
    assert inspection is not None
    assert inspection.parts[1].counts["bee"] == 0
    assert notes == ["note: 1 of 3 classes have no test images: 'bee'."]
    assert preflight.check(experiment, space, ["profile"]) is None
    truncate(root / "train" / "ant" / "0.jpg")
    with pytest.raises(DataProblemsError, match=r"train/ant/0\.jpg \(truncated\)"):
        preflight.check(experiment, space, ["train"])


# as text


def test_the_summary_fits_a_terminal(root: Path) -> None:
    (root / "train" / "ant" / "0.jpg").unlink()
    Image.new("L", (30, 5)).save(root / "train" / "cat" / "9.png")
    (root / "val" / "cat" / "1.jpg").write_bytes(b"")
    inspection = look(root)
    lines = summary.as_text(inspection, config(root)).splitlines()
    assert lines[0] == f"data         folder in {root}"
    assert lines[1:9] == [
        "training     15 images of 3 classes",
        "  per class  4 (ant) to 6 (cat)",
        "  sizes      10 x 13 to 14 x 14 px, median 12 x 13",
        "  modes      RGB 14, L 1",
        "test         6 images of 3 classes",
        "  per class  2",
        "  sizes      10 x 12 to 11 x 13 px, median 11 x 12",
        "  modes      RGB 5",
    ]
    assert lines[9].startswith("problem      1 of 6 test images")
    assert all(line.startswith(" " * 13) for line in lines[10:])
    assert all(len(line) <= 80 or str(root) in line for line in lines)
    numbers = summary.as_json(inspection, config(root))
    assert json.loads(json.dumps(numbers)) == {
        "data": "folder",
        "path": str(root),
        "parts": {
            "train": {
                "images": 15,
                "classes": {"ant": 4, "bee": 5, "cat": 6},
                "sizes": {"smallest": [10, 13], "median": [12, 13], "largest": [14, 14]},
                "modes": {"RGB": 14, "L": 1},
            },
            "test": {
                "images": 6,
                "classes": dict.fromkeys(CLASSES, 2),
                "sizes": {"smallest": [10, 12], "median": [11, 12], "largest": [11, 13]},
                "modes": {"RGB": 5},
            },
        },
        "notes": [],
        "problems": inspection.problems,
        "unreadable": {"val/cat/1.jpg": "empty"},
    }


def test_boxes_and_arrays_have_summaries(tmp_path: Path) -> None:
    root = write_rectangles(tmp_path / "boxes", images=4, test_images=2)
    boxes = config(root, name="coco", classes=2, augment="ssdlite")
    text = summary.as_text(inspect(boxes, searches=False), boxes)
    file = root / "annotations" / "instances_train.json"
    count = len(json.loads(file.read_text())["annotations"])
    assert f"training     4 images with {count} boxes of 2 classes" in text
    assert "  sizes      64 x 48 px\n" in text
    digits = DataConfig(name="digits", resolution=8)
    lines = summary.as_text(inspect(digits, searches=True), digits).splitlines()
    assert lines[:2] == ["data         digits", "training     1,438 images of 10 classes"]
    assert lines[2].startswith("  per class  ")
    assert len(lines) == 5
