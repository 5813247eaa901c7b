"""Every key of an experiment, and the cases in which it has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hwnas.config import IMAGE_LABELS
from hwnas.config.tasks import TASKS, network_kind
from hwnas.devices.device import find_device
from hwnas.search import SHRINK_METRICS
from hwnas.unused.case import STUDIES, VERBS, Case, Holds, Situation

HAS_MOMENTUM = {
    "sgd": True,
    "momentum": True,
    "rmsprop": True,
    "rmsproptf": True,
    "adam": False,
    "adamw": False,
}
"""The usual optimisers of timm, so that it need not be imported for them."""

OF_ANY_OPTIMIZER = (
    "name",
    "lr",
    "weight_decay",
    "options",
    "warmup",
    "schedule",
    "layer_decay",
    "clip_norm",
)
"""Keys of an optimiser that every optimiser reads."""


def _always(situation: Situation) -> bool:
    return True


def _lacks_momentum(table: Literal["search", "train"]) -> Holds:
    """The optimiser of a table has no momentum."""

    def holds(situation: Situation) -> bool:
        name = getattr(situation.experiment, table).optimizer.name
        return not has_momentum(name)

    return holds


def has_momentum(name: str) -> bool:
    """Whether an optimiser of timm has a momentum, or is unknown: an unknown name is
    reported later, with the known ones.
    """
    if name in HAS_MOMENTUM:
        return HAS_MOMENTUM[name]
    # Imported here: timm imports PyTorch, and most commands do not need it.
    from timm.optim import get_optimizer_info, list_optimizers

    return name not in list_optimizers() or bool(get_optimizer_info(name).has_momentum)


def _no_metric(attribute: str) -> Holds:
    """No metric of ``shrink.metrics`` has the attribute."""

    def holds(situation: Situation) -> bool:
        return not any(
            getattr(SHRINK_METRICS.get(name), attribute)
            for name in situation.experiment.shrink.metrics
        )

    return holds


def _is_int8(format_name: str) -> bool:
    return "int8" in format_name


# --- the architecture: with train.arch, nothing is profiled or searched

ARCH_GIVEN = Case(
    lambda situation: situation.experiment.train.arch is not None,
    why="train.arch = {e.train.arch!r} is trained without a search",
    by=("train.arch",),
    verbs=("run",),
    file="warn",
)
ARCH_OUTSIDE_SPACE = Case(
    lambda situation: situation.has_own_arch,
    why="train.arch = {e.train.arch!r} is a network of its own, not one of the space",
    by=("train.arch",),
    verbs=("run", "train"),
    file="warn",
)
ARCH_DOCUMENT = Case(
    lambda situation: (
        situation.experiment.train.arch is not None
        and Path(situation.experiment.train.arch).suffix == ".json"
    ),
    why="train.arch = {e.train.arch!r} has the widths of its document",
    by=("train.arch",),
    verbs=("run", "train"),
    file="warn",
)
# --- profile

TABLE_GIVEN = Case(
    lambda situation: situation.experiment.search.table is not None,
    why="search.table = {e.search.table!r} is used instead of a profile",
    by=("search.table",),
    verbs=("run",),
    file="warn",
)
COUNTED_BUDGET = Case(
    lambda situation: not situation.experiment.search.by_table,
    why="search.budget.kind = {e.search.budget.kind!r} is counted, so nothing is profiled",
    by=("search.budget",),
    verbs=("run",),
    file="warn",
)
PROFILES_OPS = Case(
    lambda situation: situation.experiment.profile.mode == "ops",
    why="profile.mode = 'ops' measures ops and does not start from other tables",
    by=("profile.mode",),
    verbs=("run", "profile"),
    fix="set profile.mode = 'networks', or remove it",
)
NUMBER_FOR_OPS = Case(
    lambda situation: (
        situation.experiment.profile.mode == "ops"
        and isinstance(situation.experiment.profile.networks, int)
    ),
    why=(
        "profile.mode = 'ops' takes only names of networks; it samples fit_networks + test_networks"
    ),
    by=("profile.mode",),
    verbs=("run", "profile"),
    fix="set profile.mode = 'networks', or profile.fit_networks",
)
PROFILES_NETWORKS = Case(
    lambda situation: situation.experiment.profile.mode == "networks",
    why="profile.mode = 'networks' fits the table to profile.networks",
    by=("profile.mode",),
    verbs=("run", "profile"),
)
SIMULATED_DEVICE = Case(
    lambda situation: find_device(situation.experiment.device.name).connection == "simulated",
    why="device.name = {e.device.name!r} is a formula without cores",
    by=("device.name",),
    verbs=("run", "profile", "validate"),
)
# --- search

TARGET_GIVEN = Case(
    lambda situation: situation.experiment.search.target_ms is not None,
    why="search.target_ms = {e.search.target_ms:g} is the budget",
    by=("search.target_ms",),
    verbs=("run", "search"),
    fix="remove one of them",
    # To override the range of a file, search.target_ms must be enough.
    overridden="quiet",
    both="warn",
)
BUDGET_HAS_NUMBER = Case(
    lambda situation: (
        situation.experiment.search.budget is not None
        and situation.experiment.search.budget.most is not None
    ),
    why="search.budget has its own number",
    by=("search.budget",),
    verbs=("run", "search"),
    fix="remove one of them",
    overridden="quiet",
    both="warn",
)
SUPERNET_GIVEN = Case(
    lambda situation: situation.experiment.search.weights is not None,
    why="search.weights = {e.search.weights!r} is a trained super-net",
    by=("search.weights",),
    verbs=("run", "search"),
    file="warn",
    # The usual case: the file that the super-net was trained with.
    overridden="quiet",
)
NO_SHARED_WEIGHTS = Case(
    lambda situation: not situation.strategy.shares_weights,
    why="strategy {e.search.strategy.name!r} trains networks that share no weights",
    by=("search.strategy",),
    verbs=("run", "search"),
    overridden="quiet",
)
NO_FINDER = Case(
    lambda situation: not situation.strategy.shares_weights,
    why="strategy {e.search.strategy.name!r} chooses among the networks that it trained",
    by=("search.strategy",),
    verbs=("run", "search"),
    overridden="refuse",
)
# --- task

DETECTS = Case(
    lambda situation: network_kind(situation.experiment.task) == "detect",
    why="task = 'detect' has no image labels and no top-1",
    by=("task",),
)
CLASSIFIES = Case(
    lambda situation: network_kind(situation.experiment.task) == "classify",
    why="task = 'classify' has no boxes",
    by=("task",),
    verbs=(*VERBS, *STUDIES),
)
METRIC_HAS_TOLERANCES = Case(
    lambda situation: situation.experiment.task in TASKS.builtin,
    why="the metric of task = {e.task!r} has its own tolerance keys",
    by=("task",),
    overridden="refuse",
)
ARCH_HAS_DETECTOR = Case(
    lambda situation: situation.arch_detects,
    why="train.arch = {e.train.arch!r} has its own detector",
    by=("train.arch",),
    verbs=("run", "train", "export"),
)
NOT_SSDLITE = Case(
    lambda situation: situation.experiment.detector.head != "ssdlite",
    why="detector.head = {e.detector.head!r} has neither extra layers nor a choice of scores",
    by=("detector.head",),
)
NOT_FCOS = Case(
    lambda situation: situation.experiment.detector.head != "fcos",
    why="detector.head = {e.detector.head!r} has no neck",
    by=("detector.head",),
    fix="remove it, or set detector.head = 'fcos'",
)
# --- optimisers

NO_SEARCH_MOMENTUM = Case(
    _lacks_momentum("search"),
    why="search.optimizer.name = {e.search.optimizer.name!r} takes no momentum",
    by=("search.optimizer.name",),
    verbs=("run", "search", *STUDIES),
    fix="remove it, or set its betas in search.optimizer.options",
)
NO_TRAIN_MOMENTUM = Case(
    _lacks_momentum("train"),
    why="train.optimizer.name = {e.train.optimizer.name!r} takes no momentum",
    by=("train.optimizer.name",),
    verbs=("run", "train"),
    fix="remove it, or set its betas in train.optimizer.options",
)
NO_TEACHER = Case(
    lambda situation: situation.experiment.train.teacher is None,
    why="no teacher is configured",
    by=("train.teacher",),
    verbs=("run", "train"),
    fix="set train.teacher, or remove it",
)
NOT_PROGRESSIVE = Case(
    lambda situation: situation.experiment.train.progressive.start == 1,
    why="train.progressive.start = 1 has the full resolution from the start",
    by=("train.progressive.start",),
    verbs=("run", "train"),
    fix="set train.progressive.start below 1, or remove it",
)
ALL_WEIGHTS_USED = Case(
    _always,
    why="training uses every weight in every step",
    by=(),
    fix="remove it; search.optimizer.inactive_weights is for super-nets",
)
NO_MOSAIC = Case(
    lambda situation: situation.experiment.train.augmentation.mosaic == 0,
    why="train.augmentation.mosaic = 0 makes no mosaics",
    by=("train.augmentation.mosaic",),
    verbs=("run", "train"),
    fix="remove it, or set train.augmentation.mosaic",
)
# --- data, export, validation

DIGITS_DATA = Case(
    lambda situation: situation.experiment.data.name == "digits",
    why="data.name = 'digits' ships with scikit-learn",
    by=("data.name",),
    verbs=(*VERBS, *STUDIES),
    fix="remove it, or set data.name = 'npz', 'folder' or 'cifar10'",
    overridden="quiet",
)
NO_IMAGE_FILES = Case(
    lambda s: s.experiment.data.name in ("digits", "npz", "cifar10"),
    "data.name = {e.data.name!r} has no files of single images",
    ("data.name",),
    (*VERBS, *STUDIES),
    overridden="quiet",
)
NO_NAMED_IMAGES = Case(
    lambda s: s.experiment.data.name in IMAGE_LABELS,
    "data.name = {e.data.name!r} has no annotation files that name images",
    ("data.name",),
    (*VERBS, *STUDIES),
    overridden="quiet",
)
NO_INT8_FILE = Case(
    lambda situation: not any(map(_is_int8, situation.formats)),
    why="export.formats has no int8 file",
    by=("export.formats",),
    verbs=("run", "export", "validate"),
)
NO_TFLITE_FILE = Case(
    lambda situation: not any(name.startswith("tflite") for name in situation.formats),
    why="export.formats has no TFLite file, whose metadata would contain it",
    by=("export.formats",),
    verbs=("run", "export"),
)
NO_FLOAT_FILE = Case(
    lambda situation: all(map(_is_int8, situation.formats)),
    why="export.formats has no float file",
    by=("export.formats",),
    verbs=("run", "export", "validate"),
)
# At the score of an app, NMS is timed a second time, because it has less to do than for AP.
APP_SCORE_BELOW_NMS = Case(
    lambda situation: (
        network_kind(situation.experiment.task) == "detect"
        and situation.experiment.validation.app_score
        <= situation.experiment.detector.post_processing.min_score
    ),
    why=(
        "detector.post_processing.min_score = {e.detector.post_processing.min_score:g} drops all"
        " lower scores anyway"
    ),
    by=("detector.post_processing",),
    verbs=("run", "validate"),
    fix="set it higher, or remove it",
)
# --- studies

NOT_A_STUDY = Case(_always, why="only 'hwnas study' reads it", by=(), verbs=VERBS, file="quiet")
NOT_RANK = Case(
    _always, why="'hwnas study rank' does not read it", by=(), verbs=("study rank",), file="quiet"
)
NOT_COMPARE = Case(
    _always,
    why="'hwnas study compare' does not read it",
    by=(),
    verbs=("study compare",),
    file="quiet",
)
NOT_SHRINK = Case(
    _always,
    why="'hwnas study shrink' does not read it",
    by=(),
    verbs=("study shrink",),
    file="quiet",
)
NO_ANGLE_SCORE = Case(
    lambda situation: "angle" not in situation.experiment.study.scores,
    why="it only affects the score 'angle', which study.scores does not contain",
    by=("study.scores",),
    verbs=("study rank",),
)
MACS_BUDGET = Case(
    lambda situation: situation.experiment.study.compare.max_macs is not None,
    why="study.compare.max_macs = {e.study.compare.max_macs} is the budget",
    by=("study.compare.max_macs",),
    verbs=("study compare",),
    overridden="quiet",
)
NO_CLUSTER = Case(
    lambda situation: situation.experiment.study.ray_address is None,
    why="no cluster is configured",
    by=("study.ray_address",),
    verbs=STUDIES,
    fix="set study.ray_address, or remove it",
)
ON_CLUSTER = Case(
    lambda situation: situation.experiment.study.ray_address is not None,
    why=(
        "study.ray_address = {e.study.ray_address!r} runs as many training runs as fit on the"
        " cluster"
    ),
    by=("study.ray_address",),
    verbs=STUDIES,
)
DROPS_PER_CHOICE = Case(
    lambda situation: situation.experiment.shrink.drop == "each",
    why="shrink.drop = 'each' drops one operator of every choice",
    by=("shrink.drop",),
    verbs=("study shrink",),
)
NO_EVALUATING_METRIC = Case(
    _no_metric("evaluates"),
    why="no metric of shrink.metrics evaluates architectures on images",
    by=("shrink.metrics",),
    verbs=("study shrink",),
)
NO_MAGNITUDE_METRIC = Case(
    _no_metric("alphas"),
    why="only the metric magnitude uses it",
    by=("shrink.metrics",),
    verbs=("study shrink",),
)
NO_ANGLE_METRIC = Case(
    lambda situation: "angle" not in situation.experiment.shrink.metrics,
    why="only the metric angle uses it",
    by=("shrink.metrics",),
    verbs=("study shrink",),
)
NO_TRAINING_METRIC = Case(
    _no_metric("trains"),
    why="no metric of shrink.metrics trains a super-net",
    by=("shrink.metrics",),
    verbs=("study shrink",),
)

ALWAYS_READ: tuple[Case, ...] = ()
"""For keys that are always read when their stage runs, or that this stage checks itself
with a specific message.
"""

_PROFILE = (ARCH_GIVEN, TABLE_GIVEN, COUNTED_BUDGET)
_SHARED = (ARCH_GIVEN, NO_SHARED_WEIGHTS)
_TRAINED = (ARCH_GIVEN, SUPERNET_GIVEN)
_RANKED = (ARCH_GIVEN, NOT_RANK, NOT_SHRINK)
_STUDIED = (NOT_A_STUDY,)
_RANK_ONLY = (NOT_A_STUDY, NOT_COMPARE, NOT_SHRINK)
_RANK_AND_COMPARE = (NOT_A_STUDY, NOT_SHRINK)
_COMPARE_ONLY = (NOT_A_STUDY, NOT_RANK, NOT_SHRINK)
_SHRINK_ONLY = (NOT_A_STUDY, NOT_RANK, NOT_COMPARE)

KEYS: dict[str, tuple[Case, ...]] = {
    **dict.fromkeys(("name", "task", "seed", "checkpoint_seconds"), ALWAYS_READ),
    "space.name": ALWAYS_READ,  # with train.arch, the report still shows it
    "space.act": (ARCH_OUTSIDE_SPACE,),
    "space.restrict": (ARCH_OUTSIDE_SPACE,),
    "space.width": (ARCH_DOCUMENT,),  # also scales published networks
    # Spaces without a number of cells refuse it when they are created.
    "space.layers": (ARCH_OUTSIDE_SPACE,),
    **dict.fromkeys(
        ("device.name", "device.runtime", "device.dtype", "device.threads"), ALWAYS_READ
    ),
    "device.cores": (SIMULATED_DEVICE,),
    "data.path": (DIGITS_DATA,),
    **dict.fromkeys(("data.unreadable", "data.skip"), (NO_IMAGE_FILES,)),
    "data.allow_outside": (NO_NAMED_IMAGES,),
    **dict.fromkeys(
        (
            "data.name",
            "data.resolution",
            "data.channels",
            "data.classes",
            "data.mean",
            "data.std",
            "data.augment",
            "data.workers",
        ),
        ALWAYS_READ,
    ),
    # Without a search, int8 ranges still come from the training images not held out.
    "data.held_out": ALWAYS_READ,
    "profile.mode": _PROFILE,
    "profile.networks": (*_PROFILE, NUMBER_FOR_OPS),
    "profile.prior": (*_PROFILE, PROFILES_OPS),
    "profile.fit_networks": (*_PROFILE, PROFILES_NETWORKS),
    "profile.test_networks": (*_PROFILE, PROFILES_NETWORKS),
    **dict.fromkeys(
        (
            "profile.rounds",
            "profile.max_rounds",
            "profile.max_spread",
            "profile.min_ms",
            "profile.min_runs",
        ),
        _PROFILE,
    ),
    "search.strategy": (*_TRAINED, NOT_COMPARE),
    "search.objective": (ARCH_GIVEN,),
    "search.target_ms": (ARCH_GIVEN, MACS_BUDGET, NOT_SHRINK),
    "search.budget": (ARCH_GIVEN, MACS_BUDGET, NOT_SHRINK),
    "search.target_range": (ARCH_GIVEN, TARGET_GIVEN, BUDGET_HAS_NUMBER, MACS_BUDGET, NOT_SHRINK),
    "search.tolerance": (ARCH_GIVEN, NOT_SHRINK),
    # With train.arch, the table predicts the latency that validation compares with.
    "search.table": (NOT_SHRINK,),
    "search.allow_uncalibrated": (ARCH_GIVEN, NOT_SHRINK),
    "search.epochs": (*_TRAINED, NOT_SHRINK),
    "search.batch_size": (ARCH_GIVEN,),
    **{f"search.optimizer.{key}": _TRAINED for key in OF_ANY_OPTIMIZER},
    "search.optimizer.momentum": (*_TRAINED, NO_SEARCH_MOMENTUM),
    "search.optimizer.inactive_weights": (*_TRAINED, NO_SHARED_WEIGHTS),
    "search.label_smoothing": (*_TRAINED, DETECTS),
    # Contradictions to a space of cells or to a trained super-net have their own errors.
    **dict.fromkeys(
        (
            "search.supernet.sharing",
            "search.supernet.kernels",
            "search.supernet.channels",
            "search.supernet.operation_on",
            "search.supernet.wsbn",
            "search.supernet.initialisation",
            "search.supernet.bn_affine",
            "search.supernet.bn_track",
            "search.supernet.dropout",
            "search.supernet.path_dropout",
            "search.supernet.proxy_depth",
            "search.supernet.proxy_width",
            "search.supernet.proxy_resolution",
            "search.supernet.full_resolution",
            "search.supernet.remat",
        ),
        _SHARED,
    ),
    "search.data_portion": _TRAINED,
    "search.weights": (ARCH_GIVEN,),
    "search.backbone": (ARCH_GIVEN,),
    "search.pretrained": (ARCH_GIVEN,),
    "search.pretrained_model": (ARCH_GIVEN,),
    "search.quality": (ARCH_GIVEN,),
    "search.finder": (ARCH_GIVEN, NO_FINDER, NOT_RANK, NOT_SHRINK),
    "search.limits": (ARCH_GIVEN,),
    "search.candidates": _RANKED,
    "search.recalibration_images": (ARCH_GIVEN,),
    # Without a finder, the random architectures of the report are scored on these images.
    "search.evaluation_images": (ARCH_GIVEN,),
    "search.random_samples": (ARCH_GIVEN, NO_SHARED_WEIGHTS, NOT_RANK, NOT_COMPARE, NOT_SHRINK),
    "detector.head": (CLASSIFIES, ARCH_HAS_DETECTOR),
    "detector.extras": (CLASSIFIES, ARCH_HAS_DETECTOR, NOT_SSDLITE),
    "detector.scores": (CLASSIFIES, ARCH_HAS_DETECTOR, NOT_SSDLITE),
    "detector.channels": (CLASSIFIES, ARCH_HAS_DETECTOR, NOT_FCOS),
    "detector.post_processing": (CLASSIFIES,),
    "recipe": ALWAYS_READ,
    **dict.fromkeys(
        (
            "train.arch",
            "train.weights",
            "train.backbone",
            "train.pretrained",
            "train.pretrained_model",
            "train.teacher",
            "train.teacher_model",
            "train.loss",
            "train.drop_path",
            "train.freeze",
            "train.freeze_bn",
            "train.epochs",
            "train.batch_size",
        ),
        ALWAYS_READ,
    ),
    **{f"train.optimizer.{key}": ALWAYS_READ for key in OF_ANY_OPTIMIZER},
    "train.optimizer.momentum": (NO_TRAIN_MOMENTUM,),
    "train.optimizer.inactive_weights": (ALL_WEIGHTS_USED,),
    "train.bn_momentum": ALWAYS_READ,
    **dict.fromkeys(("train.teacher_share", "train.teacher_temperature"), (NO_TEACHER,)),
    "train.label_smoothing": (DETECTS,),
    # refused for detectors, and the mosaic for classifiers
    **{
        f"train.augmentation.{key}": ALWAYS_READ
        for key in ("auto", "erasing", "mixup", "cutmix", "cutout", "repeats", "mosaic")
    },
    "train.progressive.start": ALWAYS_READ,
    "train.progressive.stages": (NOT_PROGRESSIVE,),
    "train.augmentation.mosaic_off": (NO_MOSAIC,),
    "train.dropout": (DETECTS,),
    "train.ema_decay": ALWAYS_READ,
    # DataConfig refuses contradictions.
    **dict.fromkeys(("data.resize", "data.crop_fraction", "data.interpolation"), ALWAYS_READ),
    "train.validate_every": ALWAYS_READ,
    "export.formats": ALWAYS_READ,
    # Experiment refuses softmax for detectors.
    **dict.fromkeys(("export.input", "export.softmax"), ALWAYS_READ),
    "export.score_calibration": (DETECTS, NO_TFLITE_FILE),
    "export.calibration_images": (NO_INT8_FILE,),
    "export.parity_images": ALWAYS_READ,
    # Read if there is a table, which an earlier profile may have left.
    "validate.latency_tolerance": ALWAYS_READ,
    "validate.max_drift": ALWAYS_READ,
    "validate.parity_tolerance": (NO_FLOAT_FILE,),
    "validate.accuracy_tolerance": (DETECTS, NO_FLOAT_FILE),
    "validate.int8_accuracy_tolerance": (DETECTS, NO_INT8_FILE),
    "validate.app_score": (CLASSIFIES, APP_SCORE_BELOW_NMS),
    "validate.ap_tolerance": (CLASSIFIES, NO_FLOAT_FILE),
    "validate.int8_ap_tolerance": (CLASSIFIES, NO_INT8_FILE),
    "validate.tolerances": (METRIC_HAS_TOLERANCES,),
    **dict.fromkeys(("validate.images", "validate.rounds", "validate.max_spread"), ALWAYS_READ),
    "study.truth": _STUDIED,
    "study.accuracies": _STUDIED,
    **dict.fromkeys(
        (
            "study.architectures",
            "study.supernets",
            "study.scores",
            "study.combinations",
            "study.threshold",
            "study.top_k",
        ),
        _RANK_ONLY,
    ),
    "study.base_epochs": (*_RANK_ONLY, NO_ANGLE_SCORE),
    **dict.fromkeys(
        (
            "study.seeds",
            "study.bootstrap",
            "study.confidence",
            "study.threads",
            "study.ray_address",
        ),
        _RANK_AND_COMPARE,
    ),
    "study.processes": (*_RANK_AND_COMPARE, ON_CLUSTER),
    "study.ray_gpus": (*_RANK_AND_COMPARE, NO_CLUSTER),
    **{
        f"study.compare.{key}": _COMPARE_ONLY
        for key in ("methods", "max_macs", "standalone_epochs", "standalone_images")
    },
    **{
        f"shrink.{key}": _SHRINK_ONLY
        for key in ("metrics", "samples", "tries", "max_macs", "sampling", "drop", "keep", "until")
    },
    "shrink.dropped": (*_SHRINK_ONLY, DROPS_PER_CHOICE),
    "shrink.evaluated_samples": (*_SHRINK_ONLY, NO_EVALUATING_METRIC),
    **{
        f"shrink.{key}": (*_SHRINK_ONLY, NO_TRAINING_METRIC)
        for key in ("first_epochs", "epochs", "operation_on")
    },
    **{
        f"shrink.{key}": (*_SHRINK_ONLY, NO_ANGLE_METRIC)
        for key in ("base_epochs", "refresh_after")
    },
    **{
        f"shrink.{key}": (*_SHRINK_ONLY, NO_MAGNITUDE_METRIC) for key in ("alpha_lr", "alpha_every")
    },
}
"""Key -> the cases in which it has no effect; the first that applies is reported."""
