"""The built-in cell-based search spaces.

=====================  ================================================================
``nasbench201``        NAS-Bench-201 (Dong, Yang, ICLR 2020, arXiv 2001.00326): 6 edges
                       with 5 options, 15,625 cells, all trained by the benchmark
``darts``              DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055): 20
                       cells of 36 channels on CIFAR-10
``nasbench101``        NAS-Bench-101 (Ying et al., ICML 2019, arXiv 1902.09635): cells
                       as graphs, 423,624 trained by the benchmark; no super-net, see
                       ``hwnas.core.nasbench101``
``darts_imagenet``     14 DARTS cells of 48 channels, with the stem for 224 pixels
``nds_darts``          DARTS cells in the networks of NDS (Radosavovic et al., ICCV
                       2019, arXiv 1905.13214), with a choice of depth and width
=====================  ================================================================

The DARTS spaces take ``layers``, the total number of cells. DARTS itself searches on 8
cells of 16 channels, which is ``search.supernet = {proxy_depth = 2, proxy_width =
0.444}`` here. P-DARTS sets its own depths.

*Difference from the papers' code*: DARTS's auxiliary classifier, which exists only
during training, is left out. The papers' parameter counts leave it out as well.
"""

from __future__ import annotations

from typing import Unpack

from hwnas.core.cell_steps import NONE, SKIP_CONNECT, edge_key, input_pairs, inputs_key
from hwnas.core.cells import CellSpace
from hwnas.core.families import Shape
from hwnas.core.nasbench101 import NASBench101Space
from hwnas.errors import SpaceError

NASBENCH201_OPTIONS = (NONE, SKIP_CONNECT, "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The options of an edge, in the order of the benchmark."""
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
"""The options of an edge, in the order of DARTS's code."""
DARTS_CELLS = ("normal", "reduce")
"""The kinds of cells."""


def nasbench201(**shape: Unpack[Shape]) -> CellSpace:
    """NAS-Bench-201: three stages of five cells with 16, 32 and 64 channels. A cell has
    nodes 0 to 3 and an edge from every node to every later one.
    """
    edges: dict[str, tuple[str, ...]] = {}
    for node in range(1, 4):
        for source in range(node):
            edges[edge_key("c", source, node)] = NASBENCH201_OPTIONS
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
    """DARTS: nodes 0 and 1 of a cell are the outputs of the two preceding cells, and
    each of the nodes 2 to 5 keeps two of its edges.

    ``layers`` is the total number of cells; the cells after one third and two thirds of
    them are reductions. Raises SpaceError if ``layers`` is below 3.

    Example:
        >>> [darts(layers=layers).cells for layers in (4, 8, 20)]
        [(1, 0, 1), (2, 2, 2), (6, 6, 6)]
    """
    if layers < 3:
        raise SpaceError(
            "networks of the DARTS spaces begin with a normal cell and have two reductions:"
            f" layers must be at least 3, got {layers}."
        )

    # positions of the two reductions, as in DARTS's code; they do not count as cells
    first, second = layers // 3, 2 * layers // 3
    cells = (first, second - first - 1, layers - second - 1)

    edges: dict[str, tuple[str, ...]] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for cell in DARTS_CELLS:
        for node in range(2, 6):
            for source in range(node):
                edges[edge_key(cell, source, node)] = DARTS_OPTIONS
            if node > 2:  # node 2 has just two edges and keeps both
                inputs[inputs_key(cell, node)] = input_pairs(node)
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
    """DARTS's network for ImageNet: 14 cells of 48 channels."""
    return darts(
        channels=48,
        layers=layers,
        stem="imagenet",
        **Shape(name="darts_imagenet", resolution=224, classes=1000) | shape,
    )


def nds_darts(*, layers: int = 20, **shape: Unpack[Shape]) -> CellSpace:
    """NDS's networks of DARTS cells at one depth and width; by default the largest, 20
    cells of 32 channels.

    NDS has 4, 8, 12, 16 and 20 ``layers``, and 16, 24 and 32 channels (``width`` 0.5,
    0.75 and 1), as in NNI's model hub. Each of the 15 combinations is a separate space
    here, in which the cells are searched.

    Example:
        >>> [nds_darts(layers=4, width=width).channels for width in (0.5, 0.75, 1.0)]
        [16, 24, 32]
    """
    return darts(channels=32, layers=layers, **Shape(name="nds_darts") | shape)


def nasbench101(**shape: Unpack[Shape]) -> NASBench101Space:
    """NAS-Bench-101: nine cells of 128, 256 and 512 channels. Raises SpaceError if
    ``act`` is not ReLU.
    """
    if shape.pop("act", "relu") != "relu":
        raise SpaceError("space nasbench101 supports no activation except relu: leave act out.")
    channels = round(128 * shape.pop("width", 1.0))
    usual = Shape(name="nasbench101", resolution=32, classes=10)
    return NASBench101Space.model_validate({**usual, **shape, "channels": channels})


def _space(shape: Shape, *, channels: int, **fields: object) -> CellSpace:
    """A cell space with the overrides of ``shape``; by default for CIFAR-10."""
    width = shape.pop("width", 1.0)
    cifar = Shape(resolution=32, classes=10, bn_eps=1e-5) | shape
    # even: the ImageNet stem and factorised reductions halve the channels
    scaled = max(2, 2 * round(channels * width / 2))
    return CellSpace.model_validate({**fields, **cifar, "channels": scaled})
