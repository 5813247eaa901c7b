"""Test images with a detector's results."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from hwnas.report.charts import FULL
from hwnas.report.style import LIGHT, canvas, inline_svg
from hwnas.tasks.pictures import Box, Picture

COLUMNS = 4


def detections(pictures: Sequence[Picture]) -> Markup:
    """A grid of images: ground-truth boxes are dashed, detected boxes are solid, with
    class and score.
    """
    rows = math.ceil(len(pictures) / COLUMNS)
    with canvas(FULL, rows * FULL / COLUMNS + 24) as figure:
        grid = figure.subplots(rows, COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, picture in zip(grid.flat, pictures, strict=False):
            _draw(axes, picture)
        figure.legend(
            handles=[
                Rectangle(
                    (0, 0),
                    1,
                    1,
                    fill=False,
                    edgecolor=LIGHT["green"],
                    ls=(0, (3, 2)),
                    lw=1.6,
                    label="in the annotations",
                ),
                Rectangle(
                    (0, 0), 1, 1, fill=False, edgecolor=LIGHT["orange"], lw=1.6, label="found"
                ),
            ],
            loc="outside upper left",
            ncols=2,
        )
        return inline_svg(figure, "detections", describe(pictures))


def describe(pictures: Sequence[Picture]) -> str:
    """A description of the pictures, for readers who cannot see them."""
    annotated = sum(len(picture.truth) for picture in pictures)
    detected = sum(len(picture.found) for picture in pictures)
    return (
        f"{len(pictures)} test images with the {annotated} boxes of their annotations and"
        f" {detected} boxes that the network found."
    )


def _draw(axes: Axes, picture: Picture) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture.jpeg)))
    # without interpolation, the SVG contains the image's own pixels
    axes.imshow(pixels, interpolation="none")
    height, width = pixels.shape[:2]
    for boxes, colour, style in (
        (picture.truth, "green", (0, (3, 2))),
        (picture.found, "orange", "solid"),
    ):
        for box in boxes:
            x1, y1, x2, y2 = np.array(box.corners) * (width, height, width, height)
            axes.add_patch(
                Rectangle(
                    (x1, y1),
                    x2 - x1,
                    y2 - y1,
                    fill=False,
                    edgecolor=LIGHT[colour],
                    lw=1.6,
                    ls=style,
                )
            )
    for box in picture.found:
        _label(axes, box, width, height)


def _label(axes: Axes, box: Box, width: int, height: int) -> None:
    x1, y1, _, _ = box.corners
    axes.text(
        x1 * width,
        y1 * height,
        f"{box.label} {box.score:.2f}",
        # inside the box if there is no room above it
        va="bottom" if y1 > 0.1 else "top",
        size=9.5,
        color=LIGHT["paper"],
        bbox={"facecolor": LIGHT["orange"], "edgecolor": "none", "pad": 1.5},
        clip_on=True,
    )
