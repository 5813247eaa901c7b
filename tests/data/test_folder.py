"""Folders of images: which files are images of which class, against torchvision, and what
happens to those in ``data.skip``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from hwnas.config import DataConfig
from hwnas.data.folder import IMAGE_SUFFIXES, FolderImages
from hwnas.data.images import Images, load_images, training_batches
from hwnas.errors import DataError

FILES = {
    "train/ant": ("0.png", "1.png", "2.png", "3.png"),
    "train/bee": ("0.png", "1.png", "2.png", "3.png"),
    "train/cat": ("0.png", "1.png", "2.png", "3.png"),
    "val/ant": ("8.png", "9.png"),
    "val/bee": ("8.png", "9.png"),
    "val/cat": ("8.png", "9.png"),
}


def write(root: Path, *files: str) -> None:
    """Images of 8 x 8 pixels, each of its own grey."""
    for file in files:
        grey = sum(file.encode()) * 37 % 256
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), grey).save(root / file, format="png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write(root, *(f"{folder}/{name}" for folder, names in FILES.items() for name in names))
    return root


def config(root: Path, **changes: Any) -> DataConfig:
    settings = {"classes": 3, "resolution": 8, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    return DataConfig(
        **{"name": "folder", "path": str(root), "augment": "none", **settings, **changes}
    )


def load(root: Path, split: str, **changes: Any) -> FolderImages:
    images = load_images(config(root, **changes), split)
    assert isinstance(images, FolderImages)
    return images


def refused(root: Path, split: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, split, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(images: Images) -> list[tuple[int, int]]:
    """Grey and label of every image."""
    x, y = images.__getitems__([(index, 0) for index in range(len(images))])
    assert y.tolist() == images.labels.tolist()
    greys = (x[:, 0, 0, 0] * 255).round().int().tolist()
    return list(zip(greys, y.tolist(), strict=True))


# which files are images


@pytest.mark.parametrize(
    "stray",
    [
        "train/.ipynb_checkpoints/0-checkpoint.png",
        "train/ant/.ipynb_checkpoints/0-checkpoint.png",
        "train/ant/._0.png",
        "train/__MACOSX/ant/0.png",
        "train/ant/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "train/lost+found/0.png",
        "train/.DS_Store",
        "train/ant/Thumbs.db",
        "val/.ipynb_checkpoints/0-checkpoint.png",
        "val/ant/._8.png",
    ],
)
def test_hidden_and_system_files_are_neither_classes_nor_images(root: Path, stray: str) -> None:
    expected = [(load(root, split).files(), load(root, split).names) for split in ("all", "test")]
    write(root, stray)
    found = [(load(root, split).files(), load(root, split).names) for split in ("all", "test")]
    assert found == expected
    assert found[0][1] == ("ant", "bee", "cat")


def test_an_empty_hidden_folder_is_no_class(root: Path) -> None:
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "val" / ".ipynb_checkpoints").mkdir()
    assert load(root, "all").names == load(root, "test").names == ("ant", "bee", "cat")


def test_data_may_lie_in_a_hidden_folder(tmp_path: Path) -> None:
    write(tmp_path / ".cache" / "data", "train/ant/0.png", "train/bee/0.png")
    assert len(load(tmp_path / ".cache" / "data", "all", classes=2)) == 2


def test_images_are_in_the_order_of_torchvision(root: Path) -> None:
    """Also those in folders below the class folders, whose names sort before or after."""
    write(root, "train/bee/a/7.png", "train/bee/a b/8.png", "train/bee/9/0.png", "train/bee/z.JPG")
    found = load(root, "all")
    expected = ImageFolder(str(root / "train"))
    assert [str(root / name) for name in found.files()] == [path for path, _ in expected.imgs]
    assert found.labels.tolist() == expected.targets
    assert list(found.names) == expected.classes


def test_images_end_in_what_torchvision_knows() -> None:
    assert IMAGE_SUFFIXES == IMG_EXTENSIONS


# the classes of val


def test_val_may_lack_a_class(root: Path) -> None:
    """The others keep the labels of training; an empty folder is like none."""
    for file in (root / "val" / "ant").iterdir():
        file.unlink()
    without = load(root, "test")
    (root / "val" / "ant").rmdir()
    absent = load(root, "test")
    for images in (without, absent):
        assert images.labels.tolist() == [1, 1, 2, 2]
        assert images.names == ("ant", "bee", "cat")
    assert contents(without) == contents(absent)


def test_a_class_that_only_val_has_is_named(root: Path) -> None:
    (root / "val" / "cow").mkdir()
    assert len(load(root, "test")) == 6
    (root / "val" / "cat" / "8.png").rename(root / "val" / "cow" / "8.png")
    said = refused(root, "test")
    assert f"{root / 'val'} has images of 'cow', but train has no such class: rename" in said
    (root / "val" / "cat" / "9.png").unlink()
    (root / "val" / "cat").rmdir()
    assert "no such class (val lacks 'cat')" in refused(root, "test")


def test_val_alone_has_its_own_classes(root: Path) -> None:
    for file in (root / "train").rglob("*.png"):
        file.unlink()
    for folder in ("train/ant", "train/bee", "train/cat", "train"):
        (root / folder).rmdir()
    assert load(root, "test").names == ("ant", "bee", "cat")


@pytest.mark.parametrize(("part", "split", "count"), [("train", "all", 12), ("val", "test", 6)])
def test_images_without_class_folders_are_called_that(
    root: Path, part: str, split: str, count: int
) -> None:
    for number, file in enumerate((root / part).rglob("*.png")):
        file.rename(root / part / f"{number}.png")
    said = refused(root, split)
    assert f"{root / part} holds {count} images directly, not in a folder per class" in said
    assert f"move them into folders, {part}/<class>/<image>." in said
    for folder in (root / part).iterdir():
        if folder.is_dir():
            folder.rmdir()
    assert refused(root, split) == said


def test_flat_training_images_do_not_stand_in_the_way_of_val(root: Path) -> None:
    """Each part has its own message, so that both can be listed."""
    for folder in ("ant", "bee", "cat"):
        for file in (root / "train" / folder).iterdir():
            file.rename(root / "train" / f"{folder}{file.name}")
        (root / "train" / folder).rmdir()
    assert "train holds 12 images directly" in refused(root, "all")
    assert load(root, "test").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_few_images_beside_the_class_folders_are_noted(root: Path) -> None:
    assert load(root, "test").notes == ()
    write(root, "val/stray.png")
    images = load(root, "test")
    assert images.notes == (f"1 image directly in {root / 'val'}, not in class folders: ignored",)
    assert len(images) == 6


def test_training_classes_need_images(root: Path) -> None:
    (root / "train" / "emu").mkdir()
    said = refused(root, "all", classes=4)
    assert f"{root / 'train'} has no images of 'emu': add some, or remove the class folders" in said


def test_missing_parts_are_told_from_files(root: Path) -> None:
    for file in (root / "val").rglob("*.png"):
        file.unlink()
    assert "val holds no class folders with images: lay the images out as" in refused(root, "test")
    (root / "val").rename(root / "else")
    assert "val does not exist: lay the images out as val/<class>/<image>" in refused(root, "test")
    (root / "val").touch()
    assert "val is not a directory" in refused(root, "test")
    (root / "val").unlink()
    (root / "annotations").mkdir()
    assert "(a folder with annotations/ is data.name = 'coco')" in refused(root, "test")


# skipped images


SKIP = ("train/bee/1.png", "train/bee/2.png", "train/cat/3.png", "val/bee/9.png")


@pytest.mark.parametrize("split", ["all", "train", "held_out"])
def test_another_image_takes_the_place_of_a_skipped_one(root: Path, split: str) -> None:
    """With its own label; the next of the split, which after the last one is the first."""
    plain, skipping = load(root, split), load(root, split, skip=SKIP)
    assert skipping.files() == plain.files()
    expected = contents(plain)
    files = plain.files()
    kept = [position for position, file in enumerate(files) if file not in SKIP]
    for position in range(len(files)):
        later = [other for other in kept if other >= position]
        assert contents(skipping)[position] == expected[(later or kept)[0]]
    assert skipping.labels_of(np.arange(len(files))).tolist() == skipping.labels.tolist()


@pytest.mark.parametrize("split", ["all", "train", "held_out"])
def test_it_makes_no_difference_whether_skipped_files_exist(root: Path, split: str) -> None:
    def seen() -> tuple[Any, ...]:
        images = load_images(config(root, skip=SKIP, augment="crop_flip"), split, augment=True)
        batches = training_batches(images, 3, seed=0, steps=range(8))
        return images.files(), images.labels.tolist(), images.names, [x for x, _ in batches]

    before = seen()
    for name in SKIP:
        (root / name).unlink()
    after = seen()
    assert before[:3] == after[:3]
    assert all(map(torch.equal, before[3], after[3]))


def test_skipped_files_in_folders_below_keep_their_places(root: Path) -> None:
    write(root, "train/bee/a/7.png", "train/bee/a b/8.png")
    before = load(root, "all").files()
    skip = ("train/bee/a/7.png", "train/ant/0.png", "train/cat/3.png")
    for name in skip:
        (root / name).unlink()
    assert load(root, "all", skip=skip).files() == before


def test_the_test_split_goes_without_skipped_images(root: Path) -> None:
    images = load(root, "test", skip=SKIP)
    assert "val/bee/9.png" not in images.files()
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    (root / "val/bee/9.png").unlink()
    assert load(root, "test", skip=SKIP).files() == images.files()


def test_skipped_names_that_are_no_images_change_nothing(root: Path) -> None:
    names = ("train/emu/0.png", "train/ant/._0.png", "train/ant/a.txt", "elsewhere/0.png", "ant")
    beyond = ("../train/ant/0.png", "/train/ant/0.png", "train/ant")
    assert load(root, "all", skip=names + beyond).files() == load(root, "all").files()


def test_something_must_be_left(root: Path) -> None:
    every = load(root, "all").files()
    assert "has no images of 'ant', 'bee', 'cat' besides those in data.skip" in refused(
        root, "all", skip=every
    )
    of_ants = tuple(name for name in every if "ant" in name)
    assert "has no images of 'ant' besides those in data.skip" in refused(root, "all", skip=of_ants)
    held_out = tuple(load(root, "held_out").files())
    assert "data.skip leaves no image of the held_out split" in refused(
        root, "held_out", skip=held_out
    )
    assert len(load(root, "train", skip=held_out)) == 10
    tested = tuple(load(root, "test").files())
    assert "data.skip leaves no image of the test split" in refused(root, "test", skip=tested)


def test_16_bit_images_train_as_the_same_images_in_8_bits(root: Path, tmp_path: Path) -> None:
    """They were all white."""
    eight = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(eight).save(root / "train/ant/0.png")
    expected, _ = load(root, "all").__getitems__([(0, 0)])
    Image.fromarray(eight * np.uint16(257)).save(root / "train/ant/0.png")
    found, _ = load(root, "all").__getitems__([(0, 0)])
    assert torch.equal(found, expected)
    assert found.std() > 0.1
