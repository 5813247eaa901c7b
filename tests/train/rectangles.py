"""A small detection training: a network of four blocks that finds coloured rectangles
on noise after a hundred steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from tests.data.scenes import write_coco

COLOURS = ((220, 40, 40), (40, 60, 220))
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 8, "name": "blue"}]
BLOCKS = (
    "conv-h48-i3-o16-k3-s2-relu6",
    "mbconv-h24-i16-o24-m48-k3-s2-relu6",
    "mbconv-h12-i24-o24-m48-k3-relu6-id",
    "mbconv-h12-i24-o32-m72-k3-s2-relu6",
    "conv-h6-i32-o48-relu6",
    "classifier-h6-i48-o10",
)


def classifier() -> Architecture:
    """A classifier. A detector has all of its blocks but the last two."""
    return Architecture(name="small", blocks=tuple(Op.parse(key) for key in BLOCKS))


def write_rectangles(
    folder: Path, *, images: int = 24, test_images: int = 8, classes: int = 2, empty: int = 0
) -> Path:
    """Write images of 64 x 48 pixels with one or two rectangles; the first ``empty``
    training images have none.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", images), ("val", test_images)):
        drawn, objects = {}, []
        for number in range(count):
            pixels = rng.integers(90, 160, (48, 64, 3), dtype=np.uint8)
            for _ in range(0 if part == "train" and number < empty else int(rng.integers(1, 3))):
                label = int(rng.integers(classes))
                w, h = (int(value) for value in rng.integers(14, 30, 2))
                x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
                pixels[y : y + h, x : x + w] = COLOURS[label]
                objects.append(
                    (number, int(CATEGORIES[label]["id"]), [float(x), float(y), float(w), float(h)])
                )
            drawn[f"{number}.png"] = pixels
        write_coco(folder, drawn, objects, part, categories=CATEGORIES[:classes])
    return folder


def settings(folder: Path, *, classes: int = 2, **train: Any) -> dict[str, Any]:
    """The settings of a training, after writing its data and the network's document to
    ``folder``.
    """
    write_rectangles(folder / "data", classes=classes)
    classifier().save(folder / "small.json")
    return {
        "name": "rectangles",
        "task": "detect",
        "checkpoint_seconds": 1e9,
        "data": {
            "name": "coco",
            "path": str(folder / "data"),
            "resolution": 48,
            "classes": classes,
            "augment": "none",
        },
        "detector": {"extras": [48, 32]},
        "train": {
            "arch": str(folder / "small.json"),
            "epochs": 2,
            "batch_size": 8,
            "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.01, "warmup": 0.1},
            **train,
        },
    }


def experiment(folder: Path, **changes: Any) -> Experiment:
    """The experiment of ``settings``."""
    return Experiment.model_validate(settings(folder, **changes))
