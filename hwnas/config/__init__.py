"""The configuration of an experiment: a TOML file with one table per stage and typed
keys.

    seed = 0
    [space]    name = "mobile32"
    [device]   name = "host"      # where latency is measured
    [data]     name = "digits"
    [search]   target_ms = 1.5
               strategy = {name = "tunas"}

An unknown key is an error that names the most similar known key. ``-s
search.target_ms=1.5`` sets one key on the command line. The resolved configuration,
including defaults, is written to the run folder. The description of each field is its
documentation.
"""

from hwnas.config.base import Plugin, Section
from hwnas.config.experiment import Experiment, all_keys, keys_given, load_experiment, resolve_path
from hwnas.config.formats import FORMATS, NMS_FORMATS, TARGETS, Format
from hwnas.config.old_keys import with_new_keys
from hwnas.config.search import OperationOn, OptimizerConfig, SearchConfig, SupernetConfig
from hwnas.config.study import (
    FIXED_BY_THE_STUDY,
    CompareConfig,
    MethodConfig,
    ScoreName,
    ShrinkConfig,
    StudyConfig,
)
from hwnas.config.tables import (
    IMAGE_LABELS,
    DataConfig,
    DetectorConfig,
    DeviceConfig,
    ExportConfig,
    Interpolation,
    ProfileConfig,
    Resize,
    SpaceConfig,
    ValidateConfig,
)
from hwnas.config.training import AugmentationConfig, ProgressiveConfig, TrainConfig

__all__ = [
    "FIXED_BY_THE_STUDY",
    "FORMATS",
    "IMAGE_LABELS",
    "NMS_FORMATS",
    "TARGETS",
    "AugmentationConfig",
    "CompareConfig",
    "DataConfig",
    "DetectorConfig",
    "DeviceConfig",
    "Experiment",
    "ExportConfig",
    "Format",
    "Interpolation",
    "MethodConfig",
    "OperationOn",
    "OptimizerConfig",
    "Plugin",
    "ProfileConfig",
    "ProgressiveConfig",
    "Resize",
    "ScoreName",
    "SearchConfig",
    "Section",
    "ShrinkConfig",
    "SpaceConfig",
    "StudyConfig",
    "SupernetConfig",
    "TrainConfig",
    "ValidateConfig",
    "all_keys",
    "keys_given",
    "load_experiment",
    "resolve_path",
    "with_new_keys",
]
