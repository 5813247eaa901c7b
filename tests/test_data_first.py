"""Data are looked at first: what people's folders hold, from the command line.

Each of these was reported by somebody: checkpoints of Jupyter that became a class, files of
macOS that became images, 16-bit images that were white, ImageNet's validation images as
downloaded, and photographs that were cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import digits_space, write_tiny
from tests.fuzz.driving import run as run_here

Hwnas = Callable[..., tuple[int, str, str]]

ARCH = "train.arch='0 0 0'"


@pytest.fixture
def hwnas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hwnas:
    """Run a verb on the images in ``data``: exit code, standard output, standard error."""
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    experiment = write_tiny(tmp_path / "experiment")
    space = digits_space().model_copy(update={"classes": 2})
    space.save(tmp_path / "experiment" / "space.json")

    def run(verb: str, *arguments: object, data: Path = tmp_path / "data") -> tuple[int, str, str]:
        settings = ["-s", "data.name=folder", "-s", f"data.path={data}"]
        outcome = run_here(verb, experiment, *settings, *arguments)
        assert "Traceback" not in outcome.err
        return outcome.code, outcome.out, outcome.err

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bright and dark 8 x 8 images: 16 training and 6 test images of each class."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 6)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (8, 8), dtype=np.uint8) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{number}.png")
    return root


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def refused(hwnas: Hwnas, verb: str, *arguments: object) -> str:
    """The message that a verb is refused with; nothing was written."""
    code, out, err = hwnas(verb, *arguments)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    return err


# case 01, 12


@pytest.mark.slow
@pytest.mark.parametrize("stray", [".ipynb_checkpoints/0-checkpoint.png", "cat/._0.png"])
def test_files_that_people_do_not_see_change_nothing(
    hwnas: Hwnas, root: Path, tmp_path: Path, stray: str
) -> None:
    for part in ("train", "val"):
        (root / part / stray).parent.mkdir(exist_ok=True)
        (root / part / stray).write_bytes(b"\0\5\x16\7")
        (root / part / "cat" / ".DS_Store").touch()
        (root / part / "cat" / "Thumbs.db").touch()
    code, out, _ = hwnas("data")
    assert code == 0
    assert "training     32 images of 2 classes\n  per class  16\n" in out
    code, _, err = hwnas("train", "--out", tmp_path / "run", "-s", ARCH)
    assert code == 0, err


def test_a_folder_with_nothing_but_hidden_files_is_empty(hwnas: Hwnas, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "data" / part / ".ipynb_checkpoints").mkdir(parents=True)
    said = refused(hwnas, "train", "--out", tmp_path / "run", "-s", ARCH)
    assert "train holds no class folders with images: lay the images out as" in said
    assert "val holds no class folders with images" in said


# case 02


@pytest.mark.slow
def test_16_bit_images_train_like_the_same_images_in_8_bits(
    hwnas: Hwnas, root: Path, tmp_path: Path
) -> None:
    """To the last bit of every loss; they were all white."""
    metrics = []
    for run in ("8", "16"):
        code, _, err = hwnas("train", "--out", tmp_path / run, "-s", ARCH)
        assert code == 0, err
        metrics.append((tmp_path / run / "train" / "metrics.jsonl").read_text())
        for path in root.rglob("*.png"):
            wide = np.asarray(Image.open(path)).astype(np.uint16) * 257
            Image.fromarray(wide.astype(np.uint16)).save(path)
    assert "I;16" in hwnas("data")[1]
    assert metrics[0] == metrics[1]


# case 04


def test_validation_images_as_downloaded_are_found_before_the_work(
    hwnas: Hwnas, root: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        for path in (root / "val" / name).iterdir():
            path.rename(root / "val" / f"{name}{path.name}")
        (root / "val" / name).rmdir()
    said = refused(hwnas, "run", "--out", tmp_path / "run")
    assert "val holds 12 images directly, not in a folder per class" in said
    assert not (tmp_path / "run").exists()
    code, out, _ = hwnas("data")
    assert code == 2
    assert "problem      " in out
    assert "training     32 images of 2 classes" in out
    for path in (root / "val").glob("*.png"):
        (root / "val" / path.name[:3]).mkdir(exist_ok=True)
        path.rename(root / "val" / path.name[:3] / path.name[3:])
    assert hwnas("data")[0] == 0


# case 13


def test_cut_off_images_are_all_found_before_the_work(
    hwnas: Hwnas, root: Path, tmp_path: Path
) -> None:
    for name in ("train/cat/3.png", "train/dog/1.png", "val/dog/1.png"):
        cut(root / name)
    said = refused(hwnas, "run", "--out", tmp_path / "run")
    assert "2 of 32 training images" in said
    assert "1 of 12 test images" in said
    for name in ("train/cat/3.png", "train/dog/1.png", "val/dog/1.png"):
        assert f"{name} (truncated)" in said
        (root / name).unlink()
    assert not (tmp_path / "run").exists()
    assert hwnas("data")[0] == 0


@pytest.mark.slow
def test_cut_off_images_can_be_left_out(hwnas: Hwnas, root: Path, tmp_path: Path) -> None:
    """The training is the same as if they were gone."""
    for name in ("train/cat/3.png", "val/dog/1.png"):
        cut(root / name)
    skip = ("-s", "data.unreadable=skip", "-s", ARCH)
    code, out, _ = hwnas("data", "-s", "data.unreadable=skip")
    assert code == 0
    assert "1 of 32 training images" in out
    code, _, err = hwnas("train", "--out", tmp_path / "skipped", *skip)
    assert code == 0, err
    assert "train/cat/3.png (truncated); left out" in err
    metrics = (tmp_path / "skipped" / "train" / "metrics.jsonl").read_text()
    names = json.dumps(["train/cat/3.png", "val/dog/1.png"])
    (root / "train/cat/3.png").unlink()
    code, _, err = hwnas(
        "train", "--out", tmp_path / "named", "-s", f"data.skip={names}", "-s", ARCH
    )
    assert code == 0, err
    assert (tmp_path / "named" / "train" / "metrics.jsonl").read_text() == metrics


# the verb


def test_the_verb_prints_text_or_json_or_only_errors(hwnas: Hwnas, root: Path) -> None:
    code, out, err = hwnas("data")
    assert (code, out.splitlines()[0]) == (0, f"data         folder in {root}")
    assert "check images: 44 of 44" in err
    code, out, err = hwnas("data", "--json")
    assert (code, json.loads(out)["parts"]["train"]["classes"], err) == (
        0,
        {"cat": 16, "dog": 16},
        "",
    )
    assert hwnas("data", "-q") == (0, "", "")
    cut(root / "train" / "cat" / "3.png")
    code, out, _ = hwnas("data", "--json")
    assert code == 2
    assert json.loads(out)["unreadable"] == {"train/cat/3.png": "truncated"}
    code, out, err = hwnas("data", "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: 1 of 32 training images")


def test_a_plan_decodes_no_image(hwnas: Hwnas, root: Path, tmp_path: Path) -> None:
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    code, out, err = hwnas("run", "--out", tmp_path / "run", "--plan", "-q")
    assert (code, err) == (0, "")
    assert "data: folder in" in out
