"""What a bundle says of its input: an app that reads the JSON alone, with Pillow and
NumPy, gets the tensors of the data loader.
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


def of_an_app(said: dict[str, Any], image: Image.Image) -> np.ndarray:
    """A photograph as float32 [H, W, C], by what ``preprocessing`` of a ``bundle.json`` says."""
    size, filters = (
        said["resolution"],
        {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC},
    )
    image = image.convert({1: "L", 3: "RGB"}[said["channels"]])
    if said["mode"] == "squash":
        width = height = size
    elif said["mode"] == "crop":
        width, height = (side * said["shorter_side"] // min(image.size) for side in image.size)
    else:
        width, height = (side * size // max(image.size) for side in image.size)
    scaled = image.resize((width, height), filters[said["interpolation"]])
    colour = tuple(said.get("padding", (0,) * said["channels"]))
    framed = Image.new(image.mode, (size, size), colour if len(colour) > 1 else colour[0])
    framed.paste(scaled, (round((size - width) / 2), round((size - height) / 2)))
    pixels = np.asarray(framed, dtype=np.float32).reshape(size, size, said["channels"])
    return (pixels / 255 - np.float32(said["mean"])) / np.float32(said["std"])


def drawn(width: int, height: int) -> Image.Image:
    """A picture with edges, slopes and colours."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 5, width // 2, height // 2), fill=(220, 40, 30))
    draw.rectangle(
        (width // 2, height // 3, width - 9, height - 20), outline=(20, 90, 250), width=5
    )
    return image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files that are not square: two that are drawn and, where there are shared
    data, some of COCO's.
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


def says(config: DataConfig, images: Images) -> dict[str, Any]:
    """What is in the file."""
    found: dict[str, Any] = json.loads(preprocessing(config, images).model_dump_json())
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_app_makes_the_input_of_a_classifier(
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
                x.permute(1, 2, 0).numpy() - of_an_app(says(config, test), Image.open(path))
            ).max()
            < 1e-5
        )


@pytest.mark.parametrize(
    "geometry", [each for each in GEOMETRIES if each["resize"] != "crop"], ids=str
)
def test_an_app_makes_the_input_of_a_detector(
    photographs: Path, tmp_path: Path, geometry: dict[str, Any]
) -> None:
    """The loader resizes tensors here, whose arithmetic is another: a grey level apart at most."""
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
            - of_an_app(says(config, test), Image.open(tmp_path / "val" / name))
        )
        assert (differences * config.std).max() < 1.01 / 255


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_app_makes_the_input_from_arrays(tmp_path: Path, geometry: dict[str, Any]) -> None:
    """Pillow rounds to grey levels between rows and columns, too, which bicubic
    weights, some of them negative, make more of.
    """
    levels = 2.01 if geometry.get("interpolation") == "bicubic" else 1.01
    pictures = [drawn(90, 60), drawn(90, 60).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    np.savez(
        tmp_path / "test.npz",
        x=np.stack([np.asarray(each) for each in pictures]),
        y=np.array([0, 1]),
    )
    config = DataConfig(name="npz", path=str(tmp_path), resolution=48, classes=2, **geometry)
    test = load_images(config, "test")
    x_NCHW, _ = test.__getitems__([(0, 0), (1, 0)])
    for x, picture in zip(x_NCHW, pictures, strict=True):
        differences = (
            np.abs(x.permute(1, 2, 0).numpy() - of_an_app(says(config, test), picture)) * config.std
        )
        assert differences.max() < levels / 255
        assert differences.mean() < 0.3 / 255


def test_it_is_said_in_words_and_in_numbers(tmp_path: Path) -> None:
    drawn(20, 30).save(tmp_path / "a.png")
    for part in ("train/a", "val/a", "val/b", "train/b"):
        (tmp_path / part).mkdir(parents=True)
        shutil.copy(tmp_path / "a.png", tmp_path / part)
    config = DataConfig(name="folder", path=str(tmp_path), resolution=224, classes=2)
    found = {}
    for augment, resize in (("imagenet", None), ("crop_flip", None), ("crop_flip", "pad")):
        changed = config.model_copy(update={"augment": augment, "resize": resize})
        said = says(changed, load_images(changed, "test"))
        assert {name: said.pop(name) for name in ("resolution", "channels")} == {
            "resolution": 224,
            "channels": 3,
        }
        del said["mean"], said["std"]
        found[augment, resize] = said
    assert found == {
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
    """Two black images of a data set that knows nothing of geometries."""

    def __init__(self) -> None:
        self.labels, self.names, self.resizing = np.array([0, 1]), ("a", "b"), "by hand"

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        return torch.zeros(len(requests), 3, 8, 8), torch.tensor([index for index, _ in requests])


def test_a_plug_in_says_it_in_its_own_words() -> None:
    config = DataConfig(name="of_a_plug_in", resolution=8, classes=2)
    for images in (OfAPlugIn(), Portion(OfAPlugIn(), 0.5)):
        assert says(config, images) == {
            "resolution": 8, "channels": 3, "resize": "by hand", "mean": list(config.mean), "std": list(config.std)
        }  # fmt: skip


def test_what_an_older_bundle_says_stays_as_it_is() -> None:
    """Its hash is of its JSON, in which there is nothing new."""
    older = {
        "resolution": 32,
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "resize": "to 32 x 32, bilinear with antialiasing",
    }
    assert json.loads(Preprocessing.model_validate(older).model_dump_json()) == older
