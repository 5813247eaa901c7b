"""The built-in spaces of cells.

=====================  ==============================================================================================
``nasbench201``        NAS-Bench-201 (Dong, Yang, ICLR 2020, arXiv 2001.00326): 6 edges of 5 options, all 15,625 trained
``darts``              DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055): 20 cells of 36 channels on CIFAR-10
``nasbench101``        NAS-Bench-101 (Ying et al., ICML 2019, arXiv 1902.09635): cells as graphs, 423,624 trained; to decode and
                       to train, see ``hwnas.core.nasbench101``
``darts_imagenet``     the same cells 14 deep and 48 channels wide, with the stem for 224 pixels
``nds_darts``          the same cells in NDS's networks (Radosavovic et al., ICCV 2019, arXiv 1905.13214): choose how many, and how wide
=====================  ==============================================================================================

The spaces of DARTS's cells take ``layers``, the number of cells in all. DARTS searches
on 8 cells of 16 channels: ``search.supernet = {proxy_depth = 2, proxy_width = 0.444}``
here. P-DARTS brings its own depths.

*Differences from the papers' code*: DARTS's auxiliary classifier, which only training
has, is left out, as the papers' own parameter counts leave it out.
"""

from __future__ import annotations

from itertools import combinations
from typing import Unpack

from hwnas.core.cell_plan import KEPT, NONE, SKIP_CONNECT, edge_key, inputs_key
from hwnas.core.cells import CellSpace
from hwnas.core.families import Shape
from hwnas.core.nasbench101 import NASBench101Space
from hwnas.errors import SpaceError

NASBENCH201_OPTIONS = (NONE, SKIP_CONNECT, "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""In the benchmark's order."""
DARTS_OPTIONS = (
    NONE,
    "max_pool_3x3",
    "avg_pool_3x3",
    SKIP_CONNECT,
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""In the order of DARTS's code."""
DARTS_CELLS = ("normal", "reduce")


def nasbench201(**shape: Unpack[Shape]) -> CellSpace:
    """NAS-Bench-201: three stages of five cells with 16, 32 and 64 channels; nodes 0 to
    3, every earlier one joined to every later.
    """
    edges = {
        edge_key("c", source, node): NASBENCH201_OPTIONS
        for node in range(1, 4)
        for source in range(node)
    }
    return _space(
        Shape(name="nasbench201") | shape,
        skeleton="nasbench201",
        channels=16,
        cells=(5, 5, 5),
        nodes=4,
        edges=edges,
    )


def darts(
    *, channels: int = 36, layers: int = 20, stem: str = "small", **shape: Unpack[Shape]
) -> CellSpace:
    """DARTS's cells: nodes 0 and 1 are the cells before, each of nodes 2 to 5 keeps two
    of its edges.

    ``layers`` are cells in all, at least 3; those after a third and two thirds of them
    are reductions.

    Example:
        >>> [darts(layers=layers).cells for layers in (4, 8, 20)]
        [(1, 0, 1), (2, 2, 2), (6, 6, 6)]
    """
    if layers < 3:
        raise SpaceError(
            "DARTS's networks have two reductions behind other cells: layers is at least 3, got"
            f" {layers}."
        )
    first, second = layers // 3, 2 * layers // 3
    cells = (first, second - first - 1, layers - second - 1)
    nodes = range(2, 6)
    edges = {
        edge_key(cell, source, node): DARTS_OPTIONS
        for cell in DARTS_CELLS
        for node in nodes
        for source in range(node)
    }
    inputs = {
        inputs_key(cell, node): tuple(
            "+".join(map(str, pair)) for pair in combinations(range(node), KEPT)
        )
        for cell in DARTS_CELLS
        for node in nodes[1:]
    }
    return _space(
        Shape(name="darts") | shape,
        skeleton="darts",
        stem=stem,
        channels=channels,
        cells=cells,
        nodes=6,
        edges=edges,
        inputs=inputs,
    )


def darts_imagenet(*, layers: int = 14, **shape: Unpack[Shape]) -> CellSpace:
    """DARTS's network for ImageNet: 14 cells, 48 channels."""
    return darts(
        channels=48,
        layers=layers,
        stem="imagenet",
        **Shape(name="darts_imagenet", resolution=224, classes=1000) | shape,
    )


def nds_darts(*, layers: int = 20, **shape: Unpack[Shape]) -> CellSpace:
    """One shape of NDS's networks of DARTS's cells; by itself the largest, 20 cells of 32 channels.

    NDS has ``layers`` of 4, 8, 12, 16 and 20, and 16, 24 and 32 channels (``width``
    0.5, 0.75 and 1), as in NNI's model hub. Each of the 15 shapes is a space of its own
    here, in which the cells are searched.

    Example:
        >>> [nds_darts(layers=4, width=width).channels for width in (0.5, 0.75, 1.0)]
        [16, 24, 32]
    """
    return darts(channels=32, layers=layers, **Shape(name="nds_darts") | shape)


def nasbench101(**shape: Unpack[Shape]) -> NASBench101Space:
    """NAS-Bench-101: nine cells of 128, 256 and 512 channels. Its activation is always ReLU."""
    if shape.pop("act", "relu") != "relu":
        raise SpaceError("space nasbench101 has no other activation than relu: leave act out.")
    channels = round(128 * shape.pop("width", 1.0))
    return NASBench101Space.model_validate(
        {"name": "nasbench101", "resolution": 32, "classes": 10, **shape, "channels": channels}
    )


def _space(shape: Shape, *, channels: int, **fields: object) -> CellSpace:
    width = shape.pop("width", 1.0)
    small = Shape(resolution=32, classes=10, bn_eps=1e-5) | shape
    return CellSpace.model_validate(
        {**fields, **small, "channels": max(2, 2 * round(channels * width / 2))}
    )
