"""Every setting, and the cases in which it does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hwnas.config.tasks import TASKS, network_kind
from hwnas.devices.device import find_device
from hwnas.search import SHRINK_METRICS
from hwnas.unused.case import STUDIES, VERBS, Case, Holds, Situation


def _all(situation: Situation) -> bool:
    return True


def _lacks_momentum(table: Literal["search", "train"]) -> Holds:
    def holds(situation: Situation) -> bool:
        from timm.optim import list_optimizers

        name = getattr(situation.experiment, table).optimizer.name
        return name in list_optimizers() and not _has_momentum(name)

    return holds


def _has_momentum(name: str) -> bool:
    from timm.optim import get_optimizer_info

    return bool(get_optimizer_info(name).has_momentum)


def _no_metric(attribute: str) -> Holds:
    """No metric of the shrinking has the attribute."""

    def holds(situation: Situation) -> bool:
        return not any(
            getattr(SHRINK_METRICS.get(name), attribute)
            for name in situation.experiment.shrink.metrics
        )

    return holds


def _is_int8(format_name: str) -> bool:
    return "int8" in format_name


# What is trained is named, so nothing is profiled or searched.
NAMED = Case(
    lambda s: s.experiment.train.arch is not None,
    "train.arch = {e.train.arch!r} is trained without a search",
    ("train.arch",),
    ("run",),
    file="warn",
)
APART = Case(
    lambda s: s.has_own_arch,
    "train.arch = {e.train.arch!r} is a network by itself, not one of the space",
    ("train.arch",),
    ("run", "train"),
    file="warn",
)
WRITTEN = Case(
    lambda s: (
        s.experiment.train.arch is not None and Path(s.experiment.train.arch).suffix == ".json"
    ),
    "train.arch = {e.train.arch!r} has the widths that the document says",
    ("train.arch",),
    ("run", "train"),
    file="warn",
)
# profile
TABLE = Case(
    lambda s: s.experiment.search.table is not None,
    "search.table = {e.search.table!r} is used instead of a profile",
    ("search.table",),
    ("run",),
    file="warn",
)
COUNTED = Case(
    lambda s: not s.experiment.search.by_table,
    "search.budget.kind = {e.search.budget.kind!r} is counted, so nothing is profiled",
    ("search.budget",),
    ("run",),
    file="warn",
)
OPS = Case(
    lambda s: s.experiment.profile.mode == "ops",
    "profile.mode = 'ops' measures ops, and no table or number of networks begins it",
    ("profile.mode",),
    ("run", "profile"),
    fix="set profile.mode = 'networks', or remove it",
)
A_NUMBER = Case(
    lambda s: s.experiment.profile.mode == "ops" and isinstance(s.experiment.profile.networks, int),
    "profile.mode = 'ops' takes names of networks, and the number of sampled ones is fit_networks +"
    " test_networks",
    ("profile.mode",),
    ("run", "profile"),
    fix="set profile.mode = 'networks', or profile.fit_networks",
)
NETWORKS = Case(
    lambda s: s.experiment.profile.mode == "networks",
    "profile.mode = 'networks' fits the table to profile.networks",
    ("profile.mode",),
    ("run", "profile"),
)
SIMULATED = Case(
    lambda s: find_device(s.experiment.device.name).connection == "simulated",
    "device.name = {e.device.name!r} is a formula without cores",
    ("device.name",),
    ("run", "profile", "validate"),
)
# search
TARGETED = Case(
    lambda s: s.experiment.search.target_ms is not None,
    "search.target_ms = {e.search.target_ms:g} is the budget",
    ("search.target_ms",),
    ("run", "search"),
    fix="remove one of them",
    overridden="quiet",  # one override of a file with a range is enough
    both="warn",
)
BUDGETED = Case(
    lambda s: (
        s.experiment.search.budget is not None and s.experiment.search.budget.most is not None
    ),
    "search.budget has a number of its own",
    ("search.budget",),
    ("run", "search"),
    fix="remove one of them",
    overridden="quiet",
    both="warn",
)
READY = Case(
    lambda s: s.experiment.search.weights is not None,
    "search.weights = {e.search.weights!r} is a trained super-net",
    ("search.weights",),
    ("run", "search"),
    file="warn",
    overridden="quiet",  # the usual way: the file that the super-net was trained with
)
ALONE = Case(
    lambda s: not s.strategy.shares,
    "strategy {e.search.strategy.name!r} trains networks that share no weights",
    ("search.strategy",),
    ("run", "search"),
    overridden="quiet",
)
NOT_FOUND = Case(
    lambda s: not s.strategy.shares,
    "strategy {e.search.strategy.name!r} chooses among the networks that it has trained",
    ("search.strategy",),
    ("run", "search"),
    overridden="refuse",
)
# task
DETECTS = Case(
    lambda s: network_kind(s.experiment.task) == "detect",
    "task = 'detect' has no labels of whole images and no top-1",
    ("task",),
)
CLASSIFIES = Case(
    lambda s: network_kind(s.experiment.task) == "classify",
    "task = 'classify' has no boxes",
    ("task",),
    (*VERBS, *STUDIES),
)
OWN_TOLERANCES = Case(
    lambda s: s.experiment.task in TASKS.builtin,
    "the metric of task = {e.task!r} has tolerances of its own",
    ("task",),
    overridden="refuse",
)
OWN_DETECTOR = Case(
    lambda s: s.arch_detects,
    "train.arch = {e.train.arch!r} has a detector of its own",
    ("train.arch",),
    ("run", "train", "export"),
)
# optimisers
SEARCH_MOMENTUM = Case(
    _lacks_momentum("search"),
    "search.optimizer.name = {e.search.optimizer.name!r} takes no momentum",
    ("search.optimizer.name",),
    ("run", "search", *STUDIES),
    fix="remove it, or set its betas in search.optimizer.options",
)
TRAIN_MOMENTUM = Case(
    _lacks_momentum("train"),
    "train.optimizer.name = {e.train.optimizer.name!r} takes no momentum",
    ("train.optimizer.name",),
    ("run", "train"),
    fix="remove it, or set its betas in train.optimizer.options",
)
ALL_USED = Case(
    _all,
    "a training uses every weight in every step",
    (),
    fix="remove it; search.optimizer.inactive_weights is of super-nets",
)
# data, export, validation
DIGITS = Case(
    lambda s: s.experiment.data.name == "digits",
    "data.name = 'digits' ships with scikit-learn",
    ("data.name",),
    (*VERBS, *STUDIES),
    fix="remove it, or set data.name = 'npz', 'folder' or 'cifar10'",
    overridden="quiet",
)
NO_INT8 = Case(
    lambda s: not any(map(_is_int8, s.formats)),
    "export.formats has no int8 file",
    ("export.formats",),
    ("run", "export", "validate"),
)
NO_TFLITE = Case(
    lambda s: not any(name.startswith("tflite") for name in s.formats),
    "export.formats has no TFLite file, whose metadata hold it",
    ("export.formats",),
    ("run", "export"),
)
NO_FLOAT = Case(
    lambda s: all(map(_is_int8, s.formats)),
    "export.formats has no float file",
    ("export.formats",),
    ("run", "export", "validate"),
)
# NMS is timed twice where an app asks for less of it than AP.
AS_FOR_AP = Case(
    lambda s: (
        network_kind(s.experiment.task) == "detect"
        and s.experiment.validation.app_score <= s.experiment.detector.post_processing.min_score
    ),
    "detector.post_processing.min_score = {e.detector.post_processing.min_score:g} drops all scores"
    " below it anyway",
    ("detector.post_processing",),
    ("run", "validate"),
    fix="set it higher, or remove it",
)
# studies
STAGE = Case(_all, "only hwnas study reads it", (), VERBS, file="quiet")
NOT_RANK = Case(_all, "'hwnas study rank' does not read it", (), ("study rank",), file="quiet")
NOT_COMPARE = Case(
    _all, "'hwnas study compare' does not read it", (), ("study compare",), file="quiet"
)
NOT_SHRINK = Case(
    _all, "'hwnas study shrink' does not read it", (), ("study shrink",), file="quiet"
)
NO_ANGLE = Case(
    lambda s: "angle" not in s.experiment.study.scores,
    "it is where the angle starts, which study.scores does not have",
    ("study.scores",),
    ("study rank",),
)
MACS = Case(
    lambda s: s.experiment.study.compare.max_macs is not None,
    "study.compare.max_macs = {e.study.compare.max_macs} is the budget",
    ("study.compare.max_macs",),
    ("study compare",),
    overridden="quiet",
)
NO_RAY = Case(
    lambda s: s.experiment.study.ray_address is None,
    "there is no cluster",
    ("study.ray_address",),
    STUDIES,
    fix="set study.ray_address, or remove it",
)
RAY = Case(
    lambda s: s.experiment.study.ray_address is not None,
    "study.ray_address = {e.study.ray_address!r} runs as many trainings as it has room for",
    ("study.ray_address",),
    STUDIES,
)
EACH = Case(
    lambda s: s.experiment.shrink.drop == "each",
    "shrink.drop = 'each' drops one operator of every choice",
    ("shrink.drop",),
    ("study shrink",),
)
NO_EVALUATION = Case(
    _no_metric("evaluates"),
    "no metric of shrink.metrics evaluates architectures on images",
    ("shrink.metrics",),
    ("study shrink",),
)
NO_ALPHAS = Case(
    _no_metric("alphas"), "only the metric magnitude has it", ("shrink.metrics",), ("study shrink",)
)
NO_START = Case(
    lambda s: "angle" not in s.experiment.shrink.metrics,
    "only the metric angle has it",
    ("shrink.metrics",),
    ("study shrink",),
)
UNTRAINED = Case(
    _no_metric("trains"),
    "no metric of shrink.metrics trains a super-net",
    ("shrink.metrics",),
    ("study shrink",),
)

ALWAYS: tuple[Case, ...] = ()
"""Read whenever the stage runs that it belongs to, or checked by that stage with a
reason of its own.
"""

_PROFILE = (NAMED, TABLE, COUNTED)
_SHARED = (NAMED, ALONE)
_TRAINED = (NAMED, READY)
_RANKED = (NAMED, NOT_RANK, NOT_SHRINK)
_STUDIED = (STAGE,)
_RANK_ONLY = (STAGE, NOT_COMPARE, NOT_SHRINK)
_RANK_AND_COMPARE = (STAGE, NOT_SHRINK)
_COMPARE_ONLY = (STAGE, NOT_RANK, NOT_SHRINK)
_SHRINK_ONLY = (STAGE, NOT_RANK, NOT_COMPARE)

KEYS: dict[str, tuple[Case, ...]] = {
    **dict.fromkeys(("name", "task", "seed", "checkpoint_seconds"), ALWAYS),
    "space.name": ALWAYS,  # the report names it
    "space.act": (APART,),
    "space.restrict": (APART,),
    "space.width": (WRITTEN,),  # published networks are scaled
    "space.layers": (APART,),  # of other spaces it is refused where the space is made
    **dict.fromkeys(("device.name", "device.runtime", "device.dtype", "device.threads"), ALWAYS),
    "device.cores": (SIMULATED,),
    "data.path": (DIGITS,),
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
        ALWAYS,
    ),
    "data.held_out": ALWAYS,  # without a search, int8 ranges are of the other training images
    "profile.mode": _PROFILE,
    "profile.networks": (*_PROFILE, A_NUMBER),
    "profile.prior": (*_PROFILE, OPS),
    "profile.fit_networks": (*_PROFILE, NETWORKS),
    "profile.test_networks": (*_PROFILE, NETWORKS),
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
    "search.objective": (NAMED,),
    "search.target_ms": (NAMED, MACS, NOT_SHRINK),
    "search.budget": (NAMED, MACS, NOT_SHRINK),
    "search.target_range": (NAMED, TARGETED, BUDGETED, MACS, NOT_SHRINK),
    "search.tolerance": (NAMED, NOT_SHRINK),
    "search.table": (NOT_SHRINK,),  # with train.arch it predicts what validation compares with
    "search.allow_uncalibrated": (NAMED, NOT_SHRINK),
    "search.epochs": (*_TRAINED, NOT_SHRINK),
    "search.batch_size": (NAMED,),
    **{
        f"search.optimizer.{key}": _TRAINED
        for key in ("name", "lr", "weight_decay", "options", "warmup", "clip_norm")
    },
    "search.optimizer.momentum": (*_TRAINED, SEARCH_MOMENTUM),
    "search.optimizer.inactive_weights": (*_TRAINED, ALONE),
    "search.label_smoothing": (*_TRAINED, DETECTS),
    **{
        # what contradicts a space of cells or a trained super-net is refused with its own reason
        f"search.supernet.{key}": _SHARED
        for key in (
            *(
                "sharing",
                "kernels",
                "channels",
                "operation_on",
                "wsbn",
                "initialisation",
                "bn_affine",
                "bn_track",
                "dropout",
            ),
            *(
                "path_dropout",
                "proxy_depth",
                "proxy_width",
                "proxy_resolution",
                "full_resolution",
                "remat",
            ),
        )
    },
    "search.data_portion": _TRAINED,
    "search.weights": (NAMED,),
    "search.backbone": (NAMED,),
    "search.quality": (NAMED,),
    "search.finder": (NAMED, NOT_FOUND, NOT_RANK, NOT_SHRINK),
    "search.limits": (NAMED,),
    "search.candidates": _RANKED,
    "search.recalibration_images": (NAMED,),
    # without a finder, random architectures of the report are scored on so many
    "search.evaluation_images": (NAMED,),
    "search.random_samples": (NAMED, ALONE, NOT_RANK, NOT_COMPARE, NOT_SHRINK),
    "detector.extras": (CLASSIFIES, OWN_DETECTOR),
    "detector.scores": (CLASSIFIES, OWN_DETECTOR),
    "detector.post_processing": (CLASSIFIES,),
    **dict.fromkeys(
        ("train.arch", "train.weights", "train.backbone", "train.epochs", "train.batch_size"),
        ALWAYS,
    ),
    **{
        f"train.optimizer.{key}": ALWAYS
        for key in ("name", "lr", "weight_decay", "options", "warmup", "clip_norm")
    },
    "train.optimizer.momentum": (TRAIN_MOMENTUM,),
    "train.optimizer.inactive_weights": (ALL_USED,),
    "train.bn_momentum": ALWAYS,
    "train.label_smoothing": (DETECTS,),
    "train.dropout": (DETECTS,),
    "train.ema_decay": ALWAYS,
    # contradictions are refused by the data's table
    **dict.fromkeys(("data.resize", "data.crop_fraction", "data.interpolation"), ALWAYS),
    "train.validate_every": ALWAYS,
    "export.formats": ALWAYS,
    # softmax of boxes is refused by the experiment
    **dict.fromkeys(("export.input", "export.softmax"), ALWAYS),
    "export.score_calibration": (DETECTS, NO_TFLITE),
    "export.calibration_images": (NO_INT8,),
    "export.parity_images": ALWAYS,
    # wherever there is a table, which an earlier profile may have left
    "validate.latency_tolerance": ALWAYS,
    "validate.max_drift": ALWAYS,
    "validate.parity_tolerance": (NO_FLOAT,),
    "validate.accuracy_tolerance": (DETECTS, NO_FLOAT),
    "validate.int8_accuracy_tolerance": (DETECTS, NO_INT8),
    "validate.app_score": (CLASSIFIES, AS_FOR_AP),
    "validate.ap_tolerance": (CLASSIFIES, NO_FLOAT),
    "validate.int8_ap_tolerance": (CLASSIFIES, NO_INT8),
    "validate.tolerances": (OWN_TOLERANCES,),
    **dict.fromkeys(("validate.images", "validate.rounds", "validate.max_spread"), ALWAYS),
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
    "study.base_epochs": (*_RANK_ONLY, NO_ANGLE),
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
    "study.processes": (*_RANK_AND_COMPARE, RAY),
    "study.ray_gpus": (*_RANK_AND_COMPARE, NO_RAY),
    **{
        f"study.compare.{key}": _COMPARE_ONLY
        for key in ("methods", "max_macs", "standalone_epochs", "standalone_images")
    },
    **{
        f"shrink.{key}": _SHRINK_ONLY
        for key in ("metrics", "samples", "tries", "max_macs", "sampling", "drop", "keep", "until")
    },
    "shrink.dropped": (*_SHRINK_ONLY, EACH),
    "shrink.evaluated_samples": (*_SHRINK_ONLY, NO_EVALUATION),
    **{
        f"shrink.{key}": (*_SHRINK_ONLY, UNTRAINED)
        for key in ("first_epochs", "epochs", "operation_on")
    },
    **{f"shrink.{key}": (*_SHRINK_ONLY, NO_START) for key in ("base_epochs", "refresh_after")},
    **{f"shrink.{key}": (*_SHRINK_ONLY, NO_ALPHAS) for key in ("alpha_lr", "alpha_every")},
}
"""Every key of every table: the cases in which it does nothing."""
