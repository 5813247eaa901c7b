"""The kinds of ops, one registered class each. See ``base`` for what an op is and for
the format of its key.
"""

from hwnas.core.ops.base import ACTIVATIONS, Op, OpKey, check_key, kinds, register, source_files
from hwnas.core.ops.blocks import SE_GATES, Classifier, Conv, DSConv, Head, MBConv, separable
from hwnas.core.ops.cells import (
    AvgPool,
    DilConv,
    FactorizedReduce,
    MaxPool,
    Norm,
    Pool,
    ReLUConvBN,
    ResidualReduce,
    SepConv,
)
from hwnas.core.ops.detector import (
    ExtraLayer,
    FCOSPredictor,
    Predictor,
    SeparableLayer,
    SSDPredictor,
    Upsample,
)
from hwnas.core.ops.fused import Fused
from hwnas.core.ops.uib import UIB

__all__ = [
    "ACTIVATIONS",
    "SE_GATES",
    "UIB",
    "AvgPool",
    "Classifier",
    "Conv",
    "DSConv",
    "DilConv",
    "ExtraLayer",
    "FCOSPredictor",
    "FactorizedReduce",
    "Fused",
    "Head",
    "MBConv",
    "MaxPool",
    "Norm",
    "Op",
    "OpKey",
    "Pool",
    "Predictor",
    "ReLUConvBN",
    "ResidualReduce",
    "SSDPredictor",
    "SepConv",
    "SeparableLayer",
    "Upsample",
    "check_key",
    "kinds",
    "register",
    "separable",
    "source_files",
]
