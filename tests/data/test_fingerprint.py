"""Fingerprints: what they cover, and what they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwnas.config import DataConfig
from hwnas.data import fingerprint as module
from hwnas.data.fingerprint import Part, fingerprint
from hwnas.data.images import Images
from hwnas.errors import DataError
from tests.data.scenes import coco_config, write_coco, write_json


def write_folder(folder: Path, per_class: int = 3) -> DataConfig:
    """Two classes of grey images in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder_config(folder)


def folder_config(folder: Path, **changes: object) -> DataConfig:
    settings = {"name": "folder", "path": str(folder), "classes": 2, "channels": 1, "resolution": 8}
    return DataConfig.model_validate({**settings, **changes})


@pytest.fixture(autouse=True)
def _each_test_lists_its_own_images() -> None:
    module._KNOWN.clear()


def both(config: DataConfig) -> tuple[str, str]:
    """The fingerprints of both parts, as another process finds them."""
    module._KNOWN.clear()
    return fingerprint(config, "train"), fingerprint(config, "test")


def append(path: Path) -> Callable[[], None]:
    """A change of a file's size."""
    return lambda: path.write_bytes(path.read_bytes() + b"x") and None


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda data: append(data / "train/cat/0.png"), ("train",)),
        (lambda data: (data / "train/cat/0.png").unlink, ("train",)),
        (lambda data: append(data / "val/dog/1.png"), ("test",)),
        (lambda data: lambda: (data / "val/dog/1.png").rename(data / "val/dog/x.png"), ("test",)),
        (lambda data: lambda: (data / "notes.txt").write_text("stray"), ()),
        (lambda data: lambda: (data / "train/cat/notes.txt").write_text("stray"), ()),
        (lambda data: lambda: (data / "train/cat/._0.png").write_bytes(b"macOS"), ()),
        (lambda data: (data / "train/.ipynb_checkpoints").mkdir, ()),
        (lambda data: lambda: (data / "test").mkdir(), ()),
    ],
    ids=["size", "removed", "val", "renamed", "stray", "in a class", "._", ".ipynb", "other"],
)
def test_a_part_of_a_folder_counts_for_itself_and_stray_files_do_not(
    change: Callable[[Path], Callable[[], object]], changed: tuple[Part, ...], tmp_path: Path
) -> None:
    config = write_folder(tmp_path)
    before = dict(zip(("train", "test"), both(config), strict=True))
    change(tmp_path)()
    after = dict(zip(("train", "test"), both(config), strict=True))
    assert tuple(part for part in before if before[part] != after[part]) == changed


def test_neither_the_spelling_of_the_path_nor_the_place_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = both(write_folder(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    assert both(folder_config(Path("data"))) == before
    assert both(folder_config(tmp_path / "data/../data")) == before
    monkeypatch.setenv("HOME", str(tmp_path))
    assert both(folder_config(Path("~/data"))) == before
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert both(folder_config(tmp_path / "moved")) == before


def test_the_classes_of_training_count_for_the_test_images_too(tmp_path: Path) -> None:
    """Labels are positions in the list of classes."""
    config = write_folder(tmp_path)
    before = fingerprint(config, "test")
    shutil.copytree(tmp_path / "train/cat", tmp_path / "train/bird")
    assert fingerprint(config, "test") != before


def test_of_a_skipped_image_only_the_name_counts(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config = folder_config(tmp_path, skip=["train/cat/1.png"])
    before = both(config)
    assert before[0] != fingerprint(folder_config(tmp_path), "train")
    append(tmp_path / "train/cat/1.png")()
    assert both(config) == before
    (tmp_path / "train/cat/1.png").unlink()
    assert both(config) == before


def test_arrays_count_by_content(tmp_path: Path) -> None:
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).write_bytes(name.encode())
    config = DataConfig(name="npz", path=str(tmp_path))
    before = both(config)
    (tmp_path / "test.npz").write_bytes(b"TEST.npz")
    after = both(config)
    assert after[0] == before[0] and after[1] != before[1]


def test_batches_of_cifar10_count_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "test_batch", "readme.html"):
        (folder / name).write_bytes(name.encode())
    config = DataConfig(name="cifar10", path=str(tmp_path))
    before = both(config)
    (folder / "readme.html").write_bytes(b"README.html")
    assert both(config) == before
    (folder / "data_batch_2").write_bytes(b"DATA_batch_2")
    after = both(config)
    assert after[0] != before[0] and after[1] == before[1]


def test_annotations_count_by_content_and_the_images_that_they_name_by_size(
    tmp_path: Path,
) -> None:
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    for part in ("train", "val"):
        path = write_coco(tmp_path, {"0.png": pixels}, [(0, 3, [2, 2, 9, 9])], part)
    config = coco_config(tmp_path)
    before = both(config)
    (tmp_path / "train/unnamed.png").write_bytes(b"x")
    (tmp_path / "annotations/notes.json").write_text("{}")
    assert both(config) == before
    append(tmp_path / "train/0.png")()
    resized = both(config)
    assert resized[0] != before[0] and resized[1] == before[1]
    content = path.read_text()
    write_json(tmp_path, {**json.loads(content), "info": {"year": 2026}}, "val")
    assert both(config)[1] != before[1]


def test_all_files_of_a_plug_in_count(tmp_path: Path) -> None:
    config = DataConfig(name="of_a_plug_in", path=str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    before = both(config)
    (tmp_path / "more.txt").write_text("x")
    after = both(config)
    assert after[0] != before[0] and after[1] != before[1]


def test_digits_have_one_fingerprint() -> None:
    assert both(DataConfig()) == both(DataConfig(workers=2))


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(module, "file_sha256", lambda path: reads.append(path) or "0" * 64)
    (tmp_path / "train.npz").write_bytes(b"once")
    config = DataConfig(name="npz", path=str(tmp_path))
    for _ in range(3):
        fingerprint(config, "train")
    assert len(reads) == 1
    (tmp_path / "train.npz").write_bytes(b"twice")
    fingerprint(config, "train")
    assert len(reads) == 2


def test_a_part_is_listed_once_unless_files_come_or_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200,000 images take seconds to list."""
    listings = []
    load = module.DATASETS.get("folder")

    def counting(config: DataConfig, split: str, augment: bool) -> Images:
        listings.append(split)
        images: Images = load(config, split, augment)
        return images

    monkeypatch.setattr(module.DATASETS, "get", lambda name: counting)
    config = write_folder(tmp_path)
    before = [(fingerprint(config, "train"), fingerprint(config, "test")) for _ in range(3)]
    assert len(set(before)) == 1 and listings == ["all", "test"]

    (tmp_path / "val/dog/1.png").unlink()
    assert fingerprint(config, "train") == before[0][0] and listings == ["all", "test"]
    assert fingerprint(config, "test") != before[0][1] and listings[2:] == ["test"]
    (tmp_path / "train/dog/more").mkdir()
    shutil.copy(tmp_path / "train/cat/0.png", tmp_path / "train/dog/more/0.png")
    assert fingerprint(config, "train") != before[0][0] and listings[3:] == ["all"]


def test_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a (folder|directory)"):
        fingerprint(folder_config(tmp_path / "gone"), "train")
