"""The kinds of ops: one registered class each. See ``base`` for what an op is and how it is written."""

from hwnas.core.ops import base, blocks, cells, detector
from hwnas.core.ops.base import ACTIVATIONS, Op, OpKey, kinds, register
from hwnas.core.ops.blocks import SE_GATES, Classifier, Conv, DSConv, Head, MBConv, separable
from hwnas.core.ops.cells import AvgPool, DilConv, FacReduce, MaxPool, Norm, Pool, PreConv, ResReduce, SepConv
from hwnas.core.ops.detector import SSD, Extra

__all__ = [
    "ACTIVATIONS",
    "MODULES",
    "SE_GATES",
    "SSD",
    "AvgPool",
    "Classifier",
    "Conv",
    "DSConv",
    "DilConv",
    "Extra",
    "FacReduce",
    "Head",
    "MBConv",
    "MaxPool",
    "Norm",
    "Op",
    "OpKey",
    "Pool",
    "PreConv",
    "ResReduce",
    "SepConv",
    "kinds",
    "register",
    "separable",
]

MODULES = (base, blocks, cells, detector)
"""Where the kinds are written."""
