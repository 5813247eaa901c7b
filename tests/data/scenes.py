"""Small data sets in COCO's layout, with objects that can be found in the pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hwnas.config import DataConfig
from hwnas.data.coco import CocoImages
from hwnas.data.images import load_images

PLAIN: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def coco_config(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{
            "name": "coco",
            "path": str(folder),
            "resolution": 64,
            "classes": 2,
            "augment": "none",
            **PLAIN,
            **changes,
        }
    )


def load(config: DataConfig, split: str = "all", *, augment: bool = False) -> CocoImages:
    images = load_images(config, split, augment=augment)
    assert isinstance(images, CocoImages)
    return images


def write_coco(
    folder: Path,
    images: dict[str, Any],
    objects: Sequence[tuple[int, int, Sequence[float]]],
    part: str = "train",
    **keys: Any,
) -> Path:
    """Write images (id = position + 5, with little or no loss) and objects (position of
    the image, category 3 or 8, box) in COCO's layout.
    """
    (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, image) in enumerate(images.items()):
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(
            folder / part / name,
            **({"quality": 95, "subsampling": 0} if name.endswith("jpg") else {}),
        )
        rows.append(
            {"id": number + 5, "file_name": name, "width": picture.width, "height": picture.height}
        )
    content = {
        "images": rows,
        "annotations": [
            {
                "id": number,
                "image_id": image + 5,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, category, box) in enumerate(objects)
        ],
        "categories": [{"id": 8, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    return write_json(folder, {**content, **keys}, part)


def write_json(folder: Path, content: Any, part: str = "train") -> Path:
    path = folder / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def scene(
    width: int, height: int, *rectangles: tuple[tuple[int, int, int], list[int]]
) -> np.ndarray:
    """Rectangles (colour, [x, y, width, height]) on black."""
    image = np.zeros((height, width, 3), np.uint8)
    for colour, (x, y, w, h) in rectangles:
        image[y : y + h, x : x + w] = colour
    return image


RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def write_scenes(folder: Path) -> None:
    """Write a wide image with a red cat, a green dog and a crowd, a tall one with a
    dog, and one without objects.
    """
    cat, dog = [10, 20, 40, 30], [120, 60, 50, 30]
    images = {
        "both.png": scene(200, 100, (RED, cat), (GREEN, dog)),
        "dog.png": scene(60, 120, (GREEN, [20, 60, 30, 40])),
        "none.png": scene(80, 80),
    }
    objects = [(0, 8, dog), (1, 8, [20, 60, 30, 40]), (0, 3, cat), (0, 3, [0, 0, 200, 100])]
    path = write_coco(folder, images, objects)
    content = json.loads(path.read_text())
    content["annotations"][3]["iscrowd"] = 1
    write_json(folder, content)
