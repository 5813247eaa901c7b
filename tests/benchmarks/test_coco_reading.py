"""How long an annotation file of COCO's size takes to read, and how much memory: 118,000
images with 860,000 objects and their outlines, 450 MB of JSON.

pytest tests/benchmarks/test_coco_reading.py --benchmark-only -s

On two cores of a virtual machine that were shared with six to eight busy processes: 11 to
15 s of processor time and a peak of 1.11 GB, of which Python with PyTorch takes 0.68.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

IMAGES, OBJECTS, CLASSES = 118_000, 860_000, 80
CORNERS = 20
"""Corners of an outline; with COCO's other fields, the file becomes as large as COCO's."""

MOST_SECONDS, MOST_BYTES = 15, 1.5e9

READING = """
import json, resource, sys, time
from hwnas.config import DataConfig
from hwnas.data.images import load_images

config = DataConfig(name="coco", path=sys.argv[1], classes=int(sys.argv[2]))
begun_at = time.process_time()
images = load_images(config, "all")
seconds = time.process_time() - begun_at
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = {"seconds": seconds, "bytes": peak_kb * 1024, "images": len(images)}
print(json.dumps({**figures, "objects": len(images.labels)}))
"""
"""A fresh process, whose peak includes the interpreter and PyTorch (0.7 GB). Its time is
that of the processor, because others may be at work.
"""


def write_coco_sized(folder: Path) -> None:
    """A file like COCO's instances_train2017.json, and empty files as the images."""
    rng = np.random.default_rng(0)
    images = folder / "train2017"
    images.mkdir(parents=True)
    annotations = folder / "annotations" / "instances_train2017.json"
    annotations.parent.mkdir()
    with annotations.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        file.write(", ".join(image_entries(images)))
        file.write('], "annotations": [')
        for number, entry in enumerate(object_entries(rng)):
            file.write(f", {entry}" if number else entry)
        categories = [{"id": key, "name": f"class {key}"} for key in range(1, CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def image_entries(folder: Path) -> Iterator[str]:
    for number in range(IMAGES):
        name = f"{number:012d}.jpg"
        (folder / name).touch()
        yield json.dumps(
            {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                "id": number,
            }
        )


def object_entries(rng: np.random.Generator) -> Iterator[str]:
    owners = rng.integers(0, IMAGES, OBJECTS).tolist()
    categories = rng.integers(1, CLASSES + 1, OBJECTS).tolist()
    boxes = (rng.random((OBJECTS, 4)) * [500, 400, 100, 80] + [0, 0, 1, 1]).round(2).tolist()
    # one outline does for many objects: what counts is that there is one
    outlines = [(rng.random(2 * CORNERS) * 640).round(2).tolist() for _ in range(100)]
    for number in range(OBJECTS):
        yield json.dumps(
            {
                "segmentation": [outlines[number % len(outlines)]],
                "area": boxes[number][2] * 7.25,
                "iscrowd": 0,
                "image_id": owners[number],
                "bbox": boxes[number],
                "category_id": categories[number],
                "id": number,
            }
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``write_coco_sized``."""
    path = tmp_path_factory.mktemp("coco")
    write_coco_sized(path)
    return path


def test_an_annotation_file_of_cocos_size_is_read_in_seconds(benchmark: Any, folder: Path) -> None:
    def read() -> Any:
        command = [sys.executable, "-c", READING, str(folder), str(CLASSES)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    figures = benchmark.pedantic(read, rounds=1, iterations=1)
    size = (folder / "annotations" / "instances_train2017.json").stat().st_size
    print(
        f"\n{figures['images']:,} images with {figures['objects']:,} objects, {size / 1e6:.0f} MB:"
        f" {figures['seconds']:.1f} s, peak of {figures['bytes'] / 1e9:.2f} GB"
    )
    assert (figures["images"], figures["objects"]) == (IMAGES, OBJECTS)
    assert figures["seconds"] < MOST_SECONDS
    assert figures["bytes"] < MOST_BYTES
