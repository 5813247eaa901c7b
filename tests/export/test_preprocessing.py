"""A bundle's description of its input: an app that has only the JSON, Pillow and NumPy
gets the tensors of the data loader.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hwnas.config import DataConfig
from hwnas.data.images import Batch, Images, Portion, Request, load_images
from hwnas.export.bundle import Preprocessing, preprocessing
from tests.data.scenes import coco_config, write_coco

torch.set_num_threads(1)

GEOMETRIES: list[dict[str, Any]] = [
    {"resize": "squash"},
    {"resize": "squash", "interpolation": "bicubic"},
    {"resize": "crop"},
    {"resize": "crop", "interpolation": "bicubic", "crop_fraction": 0.7},
    {"resize": "pad"},
    {"resize": "pad", "interpolation": "bicubic"},
]


def app_input(description: dict[str, Any], image: Image.Image) -> np.ndarray:
    """A photograph as float32 [H, W, C], made as ``preprocessing`` in a ``bundle.json``
    describes it.
    """
    size, filters = (
        description["resolution"],
        {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC},
    )
    image = image.convert({1: "L", 3: "RGB"}[description["channels"]])
    if description["mode"] == "squash":
        width = height = size
    elif description["mode"] == "crop":
        width, height = (
            side * description["shorter_side"] // min(image.size) for side in image.size
        )
    else:
        width, height = (side * size // max(image.size) for side in image.size)
    scaled = image.resize((width, height), filters[description["interpolation"]])
    colour = tuple(description.get("padding", (0,) * description["channels"]))
    framed = Image.new(image.mode, (size, size), colour if len(colour) > 1 else colour[0])
    framed.paste(scaled, (round((size - width) / 2), round((size - height) / 2)))
    pixels = np.asarray(framed, dtype=np.float32).reshape(size, size, description["channels"])
    return (pixels / 255 - np.float32(description["mean"])) / np.float32(description["std"])


def drawn(width: int, height: int) -> Image.Image:
    """A picture with edges, gradients and colours."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 5, width // 2, height // 2), fill=(220, 40, 30))
    draw.rectangle(
        (width // 2, height // 3, width - 9, height - 20), outline=(20, 90, 250), width=5
    )
    return image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files that are not square: two drawn ones and, if the shared data are
    available, some of COCO's.
    """
    folder = tmp_path_factory.mktemp("photographs")
    drawn(301, 187).save(folder / "wide.jpg", quality=90)
    drawn(150, 333).save(folder / "high.jpg", quality=90)
    source = os.environ.get("HWNAS_TEST_DATA")
    if source:
        unpacked = tmp_path_factory.mktemp("coco")
        subprocess.run(
            [sys.executable, str(Path(source) / "unpack.py"), str(unpacked), "coco128"], check=True
        )
        for path in sorted((unpacked / "coco128" / "val2017").glob("*.jpg"))[:6]:
            shutil.copy(path, folder)
    return folder


def described(config: DataConfig, images: Images) -> dict[str, Any]:
    """The description as stored in the file."""
    content: dict[str, Any] = json.loads(preprocessing(config, images).model_dump_json())
    return content


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_app_reproduces_the_input_of_a_classifier(
    photographs: Path, tmp_path: Path, geometry: dict[str, Any], channels: int
) -> None:
    for part in ("train", "val"):
        for name in ("one", "other"):
            shutil.copytree(photographs, tmp_path / part / name)
    normal = {
        "channels": channels,
        "mean": (0.45, 0.4, 0.3)[:channels],
        "std": (0.2, 0.25, 0.3)[:channels],
    }
    config = DataConfig(
        name="folder", path=str(tmp_path), resolution=96, classes=2, **normal, **geometry
    )
    test = load_images(config, "test")
    files = sorted((tmp_path / "val" / "one").iterdir())
    x_NCHW, _ = test.__getitems__([(index, 0) for index in range(len(files))])
    for x, path in zip(x_NCHW, files, strict=True):
        assert (
            np.abs(
                x.permute(1, 2, 0).numpy() - app_input(described(config, test), Image.open(path))
            ).max()
            < 1e-5
        )


@pytest.mark.parametrize(
    "geometry", [geometry for geometry in GEOMETRIES if geometry["resize"] != "crop"], ids=str
)
def test_an_app_reproduces_the_input_of_a_detector(
    photographs: Path, tmp_path: Path, geometry: dict[str, Any]
) -> None:
    """Here the loader resizes tensors: results differ by at most one grey level."""
    pictures = {path.name: Image.open(path) for path in sorted(photographs.iterdir())}
    write_coco(tmp_path, pictures, [(0, 3, [10, 10, 40, 40])], "val")
    config = coco_config(
        tmp_path, resolution=128, **{**geometry, "mean": (0.45, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    )
    test = load_images(config, "test")
    x_NCHW, _ = test.__getitems__([(index, 0) for index in range(len(pictures))])
    for x, name in zip(x_NCHW, pictures, strict=True):
        differences = np.abs(
            x.permute(1, 2, 0).numpy()
            - app_input(described(config, test), Image.open(tmp_path / "val" / name))
        )
        assert (differences * config.std).max() < 1.01 / 255


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_app_reproduces_the_input_from_arrays(tmp_path: Path, geometry: dict[str, Any]) -> None:
    """Pillow also rounds to grey levels between its passes over rows and columns, and
    bicubic weights, some of them negative, amplify that.
    """
    levels = 2.01 if geometry.get("interpolation") == "bicubic" else 1.01
    pictures = [drawn(90, 60), drawn(90, 60).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    np.savez(
        tmp_path / "test.npz",
        x=np.stack([np.asarray(drawing) for drawing in pictures]),
        y=np.array([0, 1]),
    )
    config = DataConfig(name="npz", path=str(tmp_path), resolution=48, classes=2, **geometry)
    test = load_images(config, "test")
    x_NCHW, _ = test.__getitems__([(0, 0), (1, 0)])
    for x, picture in zip(x_NCHW, pictures, strict=True):
        differences = (
            np.abs(x.permute(1, 2, 0).numpy() - app_input(described(config, test), picture))
            * config.std
        )
        assert differences.max() < levels / 255
        assert differences.mean() < 0.3 / 255


def test_the_description_is_in_words_and_in_numbers(tmp_path: Path) -> None:
    drawn(20, 30).save(tmp_path / "a.png")
    for part in ("train/a", "val/a", "val/b", "train/b"):
        (tmp_path / part).mkdir(parents=True)
        shutil.copy(tmp_path / "a.png", tmp_path / part)
    config = DataConfig(name="folder", path=str(tmp_path), resolution=224, classes=2)
    by_setting = {}
    for augment, resize in (("imagenet", None), ("crop_flip", None), ("crop_flip", "pad")):
        changed = config.model_copy(update={"augment": augment, "resize": resize})
        description = described(changed, load_images(changed, "test"))
        assert {name: description.pop(name) for name in ("resolution", "channels")} == {
            "resolution": 224,
            "channels": 3,
        }
        del description["mean"], description["std"]
        by_setting[augment, resize] = description
    assert by_setting == {
        ("imagenet", None): {
            "resize": (
                "shorter side to 256, the longer one in proportion (rounded down), bicubic with"
                " antialiasing; then the middle 224 x 224"
            ),
            "mode": "crop",
            "interpolation": "bicubic",
            "antialias": True,
            "crop_fraction": 0.875,
            "shorter_side": 256,
        },
        ("crop_flip", None): {
            "resize": "to 224 x 224 without keeping the aspect ratio, bilinear with antialiasing",
            "mode": "squash",
            "interpolation": "bilinear",
            "antialias": True,
        },
        ("crop_flip", "pad"): {
            "resize": (
                "longer side to 224, the shorter one in proportion (rounded down), bilinear with"
                " antialiasing; then in the middle of 224 x 224 pixels of the colour 124, 116, 104"
            ),
            "mode": "pad",
            "interpolation": "bilinear",
            "antialias": True,
            "padding": [124, 116, 104],
        },
    }


class OfAPlugIn(Images):
    """Two black images of a data set that does not know of resize modes."""

    def __init__(self) -> None:
        self.labels, self.names, self.resizing = np.array([0, 1]), ("a", "b"), "by hand"

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        return torch.zeros(len(requests), 3, 8, 8), torch.tensor([index for index, _ in requests])


def test_a_plug_in_describes_its_images_in_its_own_words() -> None:
    config = DataConfig(name="of_a_plug_in", resolution=8, classes=2)
    for images in (OfAPlugIn(), Portion(OfAPlugIn(), 0.5)):
        assert described(config, images) == {
            "resolution": 8, "channels": 3, "resize": "by hand", "mean": list(config.mean), "std": list(config.std)
        }  # fmt: skip


def test_the_description_in_an_older_bundle_stays_unchanged() -> None:
    """A bundle's hash is that of its JSON, so reading one must not add keys."""
    older = {
        "resolution": 32,
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "resize": "to 32 x 32, bilinear with antialiasing",
    }
    assert json.loads(Preprocessing.model_validate(older).model_dump_json()) == older
