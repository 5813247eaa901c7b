"""The experiment: one TOML file, one table per stage, every key typed.

    seed = 0
    [space]    name = "mobile32"
    [device]   name = "host"      # where it is measured and must run
    [data]     name = "digits"
    [search]   target_ms = 1.5
               strategy = {name = "tunas"}

Unknown keys are errors that name the nearest known one. ``-s search.target_ms=1.5`` sets one key from the command line. The
resolved configuration, defaults included, is written into the run folder. Each field's description is its documentation.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwnas.core.detector import PostProcessing, Scores
from hwnas.core.limits import Limit
from hwnas.core.objective import AbsoluteObjective, Objective
from hwnas.core.ssdlite import EXTRAS
from hwnas.document import explain, merged
from hwnas.errors import ConfigError
from hwnas.share import share_folder


class Section(BaseModel):
    """Base of all configuration tables: frozen, typed, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Plugin(BaseModel):
    """A plug-in by name with options of its own, which the plug-in's ``Config`` checks when it is looked up."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value  # -s search.strategy=fbnet

    def options(self, config: type[BaseModel]) -> Any:
        """The plug-in's own options as its ``config`` model. Raises ConfigError naming the wrong one."""
        try:
            return config.model_validate(self.model_extra or {})
        except ValidationError as error:
            raise ConfigError(f"options of {self.name!r}: {explain(error, config)}") from error


class SpaceConfig(Section):
    """What is searched."""

    name: str = Field("mobile32", description="a built-in space, or the path of a space document (.json)")
    act: str | None = Field(None, description="activation, where the space leaves it open")
    restrict: dict[str, tuple[str | int, ...]] = Field({}, description="options that are kept, by choice: {resolution = [224]}")
    width: float = Field(1.0, gt=0, description="multiplier of all widths, rounded to multiples of 8")


class DeviceConfig(Section):
    """Where latency is measured."""

    name: str = Field("host", description="'host': this computer; or the path of a device document (.json)")
    runtime: Literal["litert", "onnxruntime"] = "litert"
    dtype: Literal["fp32", "int8"] = "fp32"
    threads: int = Field(1, ge=1)
    cores: tuple[int, ...] | None = Field(None, description="cores to pin to; default: the device's last `threads` cores")

    @model_validator(mode="after")
    def _enough_cores(self) -> Self:
        if self.cores is not None and len(set(self.cores)) < self.threads:
            raise ValueError(f"device.cores names {len(set(self.cores))} cores for {self.threads} threads; name one per thread")
        return self


IMAGE_LABELS = ("digits", "npz", "cifar10", "folder")
"""Our data sets that have one label per image; plug-ins may be of either kind."""


class DataConfig(Section):
    """Images and labels. ``classes``, ``channels`` and ``resolution`` also shape the network."""

    name: str = Field("digits", description="digits, npz, cifar10, folder, coco (detection), or a plug-in")
    path: str | None = Field(None, description="file or folder of the images; ~ and relative paths are understood")
    resolution: int = Field(32, ge=8, description="input height = width in pixels")
    channels: Literal[1, 3] = 3
    classes: int = Field(10, ge=1, description="of images, at least 2; of objects, at least 1: the background is not counted")
    held_out: float = Field(0.2, gt=0, lt=1, description="part of the training images kept for the search's rewards and rankings")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, images scaled to 0..1")
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), description="per channel, images scaled to 0..1")
    augment: Literal["none", "crop", "crop_flip", "imagenet", "ssd", "ssdlite"] = Field(
        "crop_flip", description="imagenet: for folder; ssd, ssdlite: for coco, torchvision's presets, the latter also MobileDet's"
    )
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")

    @model_validator(mode="after")
    def _per_channel(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"data.{name} has {len(getattr(self, name))} values for {self.channels} channels; give one per channel")
        if min(self.std) <= 0:
            raise ValueError(f"data.std has {min(self.std):g}; give standard deviations above 0")
        return self

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        of_boxes = self.augment in ("ssd", "ssdlite")
        if self.name in IMAGE_LABELS and of_boxes:
            raise ValueError(f"data.augment = {self.augment!r} is for boxes; choose crop, crop_flip or none for {self.name!r}")
        if self.name in IMAGE_LABELS and self.classes < 2:
            raise ValueError(f"data.classes = {self.classes} leaves {self.name!r} nothing to tell apart; give 2 or more")
        if self.name == "coco" and not of_boxes and self.augment != "none":
            raise ValueError(f"data.augment = {self.augment!r} is for images without boxes; choose ssd, ssdlite or none for 'coco'")
        return self

    def at(self, resolution: int) -> DataConfig:
        """The same data at another input size: that of an architecture whose space searches it."""
        return self if resolution == self.resolution else self.model_copy(update={"resolution": resolution})


class ProfileConfig(Section):
    """How the device is measured. See devices/profile.py for the procedure."""

    mode: Literal["ops", "networks"] = Field(
        "ops", description="ops: every op of the space; networks: whole networks alone, to which the entries are fitted"
    )
    networks: int = Field(40, ge=3, description="mode networks: how many are measured")
    prior: tuple[str, ...] = Field(
        (), description="mode networks: other devices' tables of the space, beside a roofline, as where the fit starts"
    )
    rounds: int = Field(7, ge=1, description="shuffled passes over everything; medians are taken over their medians")
    max_rounds: int = Field(15, ge=1, description="noisy entries are measured again up to this many rounds, then flagged")
    max_spread: float = Field(0.10, gt=0, description="spread between rounds (interquartile range / median) above which an entry is noisy")
    min_ms: float = Field(20.0, gt=0, description="time one model for at least this long per round ...")
    min_runs: int = Field(5, ge=1, description="... and at least this many runs")
    fit_networks: int = Field(12, ge=0, description="whole networks that the calibration is fitted on")
    test_networks: int = Field(8, ge=0, description="whole networks that judge it, never seen in the fit")


class OptimizerConfig(Section):
    """Optimiser of network weights, by timm's name (its ``sgd`` is Nesterov's; plain: ``momentum``).

    The defaults are TuNAS's: rmsproptf, rate 0.165 per 256 images, momentum and decay 0.9, eps 1.
    """

    name: str = "rmsproptf"
    lr: float = Field(0.165, gt=0, description="per 256 images; scaled linearly with the batch")
    momentum: float = 0.9
    weight_decay: float = Field(4e-5, ge=0, description="gradient term wd * w; TuNAS writes the same as l2(wd / 2)")
    options: dict[str, float] | None = Field(None, description="further arguments; default for rmsproptf: alpha 0.9, eps 1 (TuNAS)")
    warmup: float = Field(0.025, ge=0, lt=1, description="part of the steps with linearly rising rate; then cosine to 0")
    clip_norm: float | None = Field(None, description="clip the gradient's global norm")
    unused: Literal["rest", "move"] = Field(
        "rest", description="weights that a step does not use: rest as they are (SPOS), or move on by momentum and decay (NAS-Bench-201)"
    )


OperationOn = Literal["node", "edge", "op"]
"""What a slot's weights belong to, the most shared first."""


class SupernetConfig(Section):
    """How the super-net shares its weights. The defaults are TuNAS's.

    The 14 heuristics of Yu, Ranftl, Salzmann, "How to Train Your Super-Net" (arXiv 2003.04276), by name. Mapping of weights:
    ``channels`` (dynamic channelling), ``kernels`` (OFA kernel), ``wsbn``, ``dropout`` (global), ``path_dropout``, ``operation_on``;
    low fidelity: ``proxy_depth`` (layers), ``proxy_width`` (channels), ``search.data_portion`` and ``search.batch_size``, and, ours,
    ``proxy_resolution`` (pixels); protocol:
    ``bn_affine`` and ``bn_track``, ``search.optimizer.lr`` with ``search.epochs``, ``search.optimizer.weight_decay``, and
    the sampling of paths (``sampling`` of the strategy spos). Options of cells share no weights, so of the mapping they have ``dropout``.
    """

    sharing: Literal["auto", "collapsed", "separate"] = Field(
        "auto",
        description="collapsed: options share expansion and projection (TuNAS); separate: own weights; auto: as in the method's paper",
    )
    kernels: Literal["auto", "own", "ofa", "ofa_transform"] = Field(
        "auto",
        description="own: weights per kernel size; ofa: the centre of the largest; ofa_transform: times a learned matrix; auto: as above",
    )
    channels: Literal["first", "chunk", "random", "interpolation"] = Field(
        "first", description="which channels a narrower layer uses: the first; random ones in a row; any random ones; averages"
    )
    operation_on: OperationOn = Field(
        "node", description="edge: own weights per slot that the input comes from; op: per slot and option that it comes from"
    )
    wsbn: bool = Field(False, description="own BN per slot that the input comes from (with operation_on = 'op', and per option)")
    initialisation: Literal["auto", "he", "torch"] = Field(
        "auto", description="he: normal by fan-in (TuNAS); torch: PyTorch's own, a sixth of its variance; auto: torch for cells, else he"
    )
    bn_affine: bool = Field(True, description="BN with scale and shift")
    bn_track: bool = Field(False, description="BN keeps running statistics, and scores with them")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")
    path_dropout: float = Field(0.0, ge=0, lt=1, description="of residual branches, at the last layer at the end; rises with both (NAO)")
    proxy_depth: int | None = Field(None, ge=1, description="train with only so many slots, or cells, per stage; default all")
    proxy_width: float = Field(1.0, gt=0, le=1, description="train with widths scaled down")
    proxy_resolution: int | None = Field(None, ge=8, description="train on images scaled down to so many pixels; default none (ours)")
    full_resolution: float = Field(0.0, ge=0, le=1, description="proxy_resolution: this last part of the steps is on images as they are")
    remat: bool = Field(True, description="recompute a mixture's options in the backward pass; single paths never need it")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bn_track and self.channels in ("random", "interpolation"):
            raise ValueError(f"bn_track needs channels in a row; set channels = 'first' or 'chunk', not {self.channels!r}")
        if self.full_resolution and self.proxy_resolution is None:
            raise ValueError(f"full_resolution = {self.full_resolution:g} says when a proxy_resolution ends; set proxy_resolution, too")
        return self


class SearchConfig(Section):
    """How the space is searched."""

    strategy: Plugin = Plugin(name="tunas")
    objective: Objective = Field(AbsoluteObjective(), discriminator="name")
    target_ms: float | None = Field(None, gt=0, description="latency budget in milliseconds")
    target_range: float | None = Field(
        None, ge=0, le=1, description="where target_ms is not set: the budget between the space's fastest (0) and slowest (1) architecture"
    )
    tolerance: float = Field(0.02, gt=0, lt=1, description="the searched network's predicted latency is within this part of the target")
    table: str | None = Field(None, description="a latency table to use instead of profiling")
    allow_uncalibrated: bool = False
    epochs: float = Field(20, gt=0)
    batch_size: int = Field(64, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    supernet: SupernetConfig = SupernetConfig()
    data_portion: float = Field(1.0, gt=0, le=1, description="part of the training images that the super-net sees")
    weights: str | None = Field(
        None, description="the search folder of an earlier run: its trained super-net is used as it is, and only the finder runs"
    )
    backbone: str | None = Field(
        None, description="detection: the search folder of a classification run, whose super-net's backbone weights this one begins with"
    )
    detection_quality: Literal["ap", "loss"] = Field(
        "ap", description="detection: what architectures are judged by on held-out images: AP, or 1 / (1 + loss) where they are few"
    )
    finder: Plugin | None = Field(None, description="how architectures are found; default: the strategy's own way")
    limits: tuple[Limit, ...] = Field(
        (), description="further constraints, one [[search.limits]] each: other tables, macs, params, size_bytes, activation_bytes"
    )
    candidates: int = Field(8, ge=1, description="proposals of the strategy that are ranked by recalibrated held-out accuracy (or AP)")
    recalibration_images: int = Field(
        1024, ge=0, description="training images that re-estimate BN statistics before any ranking; 0: tracked ones (supernet.bn_track)"
    )
    evaluation_images: int = Field(1000, ge=1, description="held-out images that a finder judges on; the last ranking is on all of them")
    random_samples: int = Field(8, ge=0, description="random architectures scored for the report's comparison")

    @model_validator(mode="after")
    def _statistics(self) -> Self:
        if self.recalibration_images < 2 and not (self.recalibration_images == 0 and self.supernet.bn_track):
            raise ValueError(
                f"recalibration_images is {self.recalibration_images}; give 2 or more, or 0 with supernet.bn_track = true for tracked ones"
            )
        if self.backbone is not None and self.weights is not None:
            raise ValueError("search.backbone and search.weights both say what the super-net begins with; remove one of them")
        return self


class DetectorConfig(Section):
    """The detector that is put on an architecture that has none, and how its outputs become detections (all detectors').

    The defaults are torchvision's SSDLite. MobileDet's are ``scores = "sigmoid"`` and ``post_processing = {min_score = 1e-8,
    candidates = 100, nms_iou = 0.6, detections = 100}``; its whole recipe is configs/experiments/coco.toml.
    """

    extras: tuple[Annotated[int, Field(ge=2)], ...] = Field(EXTRAS, description="output channels of the layers after the backbone")
    scores: Scores = Field(
        "softmax", description="softmax: over classes and background, by SSD's loss with hard negatives; sigmoid: per class, by focal loss"
    )
    post_processing: PostProcessing = PostProcessing()


class TrainConfig(Section):
    """How the winner is trained."""

    arch: str | None = Field(None, description="an architecture document, or a published network's name, instead of searching")
    weights: Literal["scratch", "supernet"] = "scratch"
    backbone: str | None = Field(
        None, description="detection: the run folder of a trained classifier, or its train folder, whose weights the backbone begins with"
    )
    epochs: float = Field(30, gt=0)
    batch_size: int = Field(64, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    bn_momentum: float = Field(
        0.1, gt=0, le=1, description="part of a new batch in BN's running statistics; torchvision's SSDLite and MobileDet: 0.03"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of a classifier's labels")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier; TuNAS: 0.15 for 360 epochs, 0 below 150")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="exponential moving average of the weights; 0: none")


Format = Literal["tflite-fp32", "tflite-int8", "onnx", "onnx-nms", "tflite-fp32-tasks", "tflite-int8-tasks"]
FORMATS: tuple[Format, ...] = ("tflite-fp32", "tflite-int8", "onnx")
"""What every network is exported to."""
NMS_FORMATS: tuple[Format, ...] = ("onnx-nms", "tflite-fp32-tasks", "tflite-int8-tasks")
"""Detectors with post-processing in the graph."""


class ExportConfig(Section):
    """Which files are made."""

    formats: tuple[Format, ...] | None = Field(
        None,
        min_length=1,
        description="default: tflite-fp32, tflite-int8 and onnx; of detectors also those with NMS in the graph: onnx-nms, "
        "tflite-fp32-tasks and tflite-int8-tasks (TFLite_Detection_PostProcess)",
    )
    calibration_images: int = Field(128, ge=1, description="training images that set the int8 ranges")
    parity_images: int = Field(64, ge=1, description="test images that each file's outputs are compared on, kept in the bundle")


class ValidateConfig(Section):
    """When an exported file counts as fast and accurate as promised."""

    latency_tolerance: float = Field(
        0.05, gt=0, description="measured against predicted latency, for files of the table's runtime and dtype"
    )
    max_drift: float = Field(0.25, gt=0, description="a device this much faster or slower than when profiled fails: profile it again")
    parity_tolerance: float = Field(
        1e-4,
        gt=0,
        description="outputs of float files against PyTorch's, relative to the largest; of detectors, in parts of the image or of a score",
    )
    accuracy_tolerance: float = Field(0.002, ge=0, description="top-1 of float files against PyTorch")
    int8_accuracy_tolerance: float = Field(0.02, ge=0, description="top-1 of int8 files against PyTorch")
    ap_tolerance: float = Field(0.005, ge=0, description="AP of a detector's float files against PyTorch")
    int8_ap_tolerance: float = Field(0.03, ge=0, description="AP of a detector's int8 files against PyTorch")
    images: int | None = Field(None, ge=1, description="test images to use; default all")
    rounds: int = Field(7, ge=1, description="interleaved passes over the files; up to twice as many while they are noisy")
    max_spread: float = Field(0.10, gt=0, description="spread between rounds above which a file is measured again")


ScoreName = Literal[
    "accuracy", "loss", "unrecalibrated", "angle", "macs", "params", "grad_norm", "snip", "synflow"
]  # fmt: skip
"""What ``hwnas study rank`` scores architectures by; see study/scores.py."""


FIXED_BY_THE_STUDY = ("objective", "table", "target_ms", "target_range", "tolerance", "limits", "allow_uncalibrated", "weights", "backbone")
"""Keys of ``search`` that all methods of a comparison share, or that would give one of them a start."""


class MethodConfig(Section):
    """A method of ``hwnas study compare``: a strategy, and what it changes in ``search``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what it is called; default: its strategy's name")
    strategy: Plugin
    search: dict[str, Any] = Field({}, description="keys of [search] that are others for this method: epochs, finder, supernet, ...")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        value = {"strategy": value} if isinstance(value, str) else value
        if isinstance(value, dict) and "name" not in value and "strategy" in value:
            strategy = value["strategy"]
            name = strategy.get("name") if isinstance(strategy, dict) else getattr(strategy, "name", strategy)
            return {**value, "name": name}
        return value

    @model_validator(mode="after")
    def _same_task(self) -> Self:
        fixed = [key for key in self.search if key in (*FIXED_BY_THE_STUDY, "strategy")]
        if fixed:
            raise ValueError(f"method {self.name!r} sets search.{fixed[0]}, which all methods of a study share; set it in [search]")
        return self


class CompareConfig(Section):
    """``hwnas study compare``: which methods, under which budget, and what training alone costs. The rest is as in ``search``."""

    methods: tuple[MethodConfig, ...] = Field((), description="names of strategies, or tables of strategy, name and search")
    max_macs: int | None = Field(
        None,
        gt=0,
        description="budget in multiply-accumulates, where search.table is not set: architectures of at most so many, and of at least "
        "(1 - tolerance) / (1 + tolerance) of them, which is search.tolerance on either side of the target",
    )
    standalone_epochs: float = Field(50, gt=0, description="of each training that the truth is from; NAS-Bench-Macro: 50 ...")
    standalone_images: int = Field(50_000, ge=1, description="... of CIFAR-10's 50,000 images")

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        names = [method.name for method in self.methods]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"study.compare.methods has {twice[0]!r} twice; give one of them another name")
        return self


class StudyConfig(Section):
    """``hwnas study rank`` and ``hwnas study compare``: do super-nets rank architectures right, and do methods beat random search?

    The super-nets and their images are those of ``search``.
    """

    truth: str | None = Field(None, description="file of architectures with stand-alone accuracies (.csv or .json); see study/truth.py")
    accuracies: tuple[str, ...] = Field((), description="its columns of repeated trainings; default: all that look like accuracies")
    architectures: int = Field(300, ge=2, description="random ones of the file that are scored; a larger number keeps those of a smaller")
    seeds: tuple[int, ...] = Field((), description="one super-net is trained for each; default: that of the experiment")
    supernets: tuple[str, ...] = Field((), description="instead: search folders of earlier runs, whose trained super-nets are used")
    scores: tuple[ScoreName, ...] = Field(("accuracy", "loss", "unrecalibrated", "angle", "macs", "params"), min_length=1)
    combinations: tuple[tuple[ScoreName, ...], ...] = Field((), description="scores whose ranks are added up, such as accuracy and angle")
    threshold: float = Field(0.001, gt=0, lt=1, description="bins of the true accuracy in the sparse Kendall tau; 0.001: 0.1 %")
    base_epochs: float = Field(
        0, ge=0, description="the angle is from the weights after so many epochs; 0: from the initialisation (AngleNAS on NAS-Bench-201: 1)"
    )
    top_k: int = Field(10, ge=1, description="of regret, P@k and the comparison with random search")
    bootstrap: int = Field(1000, ge=10, description="resamples of the architectures, for the intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    compare: CompareConfig = CompareConfig()
    processes: int = Field(1, ge=1, description="trainings at a time on this computer; one: in the command's own process")
    threads: int | None = Field(
        None, ge=1, description="of each training; they decide the last bits. Default: one, or all where a study has a single training"
    )
    ray_address: str | None = Field(None, description="HOST:PORT of a Ray cluster that trains instead, or 'auto' on a machine of it")
    ray_gpus: float = Field(0, ge=0, description="GPUs that a training takes of the cluster")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seeds and self.supernets:
            raise ValueError("study.seeds trains super-nets and study.supernets takes trained ones; remove one of them")
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise ValueError(f"study.seeds has {twice[0]} twice; give each seed once")
        if self.top_k >= self.architectures:
            raise ValueError(f"study.top_k = {self.top_k} are not fewer than study.architectures = {self.architectures}; lower it")
        for each in self.combinations:
            missing = [name for name in each if name not in self.scores]
            if missing or len(each) < 2:
                raise ValueError(f"study.combinations has {list(each)}; give two or more of study.scores: {', '.join(self.scores)}")
        return self


class ShrinkConfig(Section):
    """``hwnas study shrink``: the operators that a metric finds worst leave the space, stage by stage. See search/shrinking.py.

    The defaults are those of angle-based shrinking (arXiv 2004.13431) on SPOS's space, where they are not said to be ours. The
    super-net, its images and its optimiser are those of ``search``.
    """

    metrics: tuple[str, ...] = Field(("angle",), min_length=1, description="what finds operators bad: angle, accuracy, magnitude, random")
    samples: int = Field(1000, ge=1, description="sampled architectures that contain each operator, at least, where there are as many")
    judged_samples: int | None = Field(
        None, ge=1, description="the same of metrics that judge each on images, such as accuracy (ours); default: samples"
    )
    tries: int = Field(100, ge=1, description="at most so many times as many are drawn")
    max_macs: float | None = Field(None, gt=0, description="only architectures up to these multiply-accumulates are sampled")
    sampling: Literal["architectures", "depths"] = Field(
        "depths", description="architectures: uniform; depths: the number of skipped slots is uniform, then the rest (SPOS)"
    )
    drop: Literal["lowest", "each"] = Field("lowest", description="lowest: of the whole space; each: the lowest of every choice (FairNAS)")
    dropped: int = Field(7, ge=1, description="operators that leave at each stage, with drop = 'lowest'")
    keep: int = Field(1, ge=1, description="options that every choice keeps")
    until: int = Field(1_000_000, ge=1, description="stop when the space is no larger")
    first_epochs: float = Field(100, gt=0, description="of training before the first drop, which all metrics share")
    epochs: float = Field(5, gt=0, description="of training before each further drop")
    base_epochs: float = Field(0, ge=0, description="W0 is of so many epochs into the first training (AngleNAS on DARTS's cells: 5)")
    refresh_after: int | None = Field(50, ge=0, description="W0 becomes the present weights, once, when more operators are dropped")
    operation_on: tuple[OperationOn, ...] = Field(
        (), description="search.supernet.operation_on of each stage, the last for all later ones: fewer operators, less sharing (PWSNAS)"
    )
    alpha_lr: float = Field(3e-4, gt=0, description="magnitude: Adam's rate (DARTS)")
    alpha_every: int = Field(1, ge=1, description="magnitude: steps of the weights for each of alpha (ours)")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.base_epochs >= self.first_epochs:
            raise ValueError(f"shrink.base_epochs = {self.base_epochs:g} is no part of first_epochs = {self.first_epochs:g}; lower it")
        twice = [name for name in self.metrics if self.metrics.count(name) > 1]
        if twice:
            raise ValueError(f"shrink.metrics has {twice[0]!r} twice; give each metric once")
        levels = [get_args(OperationOn).index(level) for level in self.operation_on]
        if levels != sorted(levels):
            raise ValueError(f"shrink.operation_on = {list(self.operation_on)} shares more again; only go from node to edge to op")
        return self


class Experiment(Section):
    """A whole experiment: what ``hwnas run`` needs to know."""

    name: str = "experiment"
    task: Literal["classify", "detect"] = Field("classify", description="one label per image, or boxes with labels")
    seed: int = Field(0, ge=0, lt=2**31)
    checkpoint_seconds: float = Field(20.0, ge=0, description="how often a running search or training saves its state")
    space: SpaceConfig = SpaceConfig()
    device: DeviceConfig = DeviceConfig()
    data: DataConfig = DataConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    detector: DetectorConfig = DetectorConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    study: StudyConfig = StudyConfig()
    shrink: ShrinkConfig = ShrinkConfig()

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if self.task == "detect" and self.data.name in IMAGE_LABELS:
            raise ValueError(f"task = 'detect' needs boxes, and data.name = {self.data.name!r} has none; choose data.name = 'coco'")
        if self.task == "classify" and self.data.name == "coco":
            raise ValueError("data.name = 'coco' has boxes instead of one label per image; set task = 'detect'")
        if self.task == "classify" and self.train.backbone is not None:
            raise ValueError("train.backbone begins a detector; remove it, or set task = 'detect'")
        of_boxes = [name for name in self.export.formats or () if name in NMS_FORMATS and self.task == "classify"]
        if of_boxes:
            raise ValueError(f"export.formats has {of_boxes[0]!r}, which is for boxes; remove it, or set task = 'detect'")
        if self.task == "classify" and self.search.backbone is not None:
            raise ValueError("search.backbone begins a super-net of detectors; remove it, or set task = 'detect'")
        if self.task == "detect" and self.search.supernet.dropout > 0:
            raise ValueError("search.supernet.dropout is before a classifier, and a detector has none; remove it")
        if self.train.backbone is not None and self.train.weights != "scratch":
            raise ValueError("train.backbone and train.weights = 'supernet' both say what to begin with; remove one of them")
        return self

    @property
    def export_formats(self) -> tuple[Format, ...]:
        """The configured formats, else all of the task's."""
        return self.export.formats or (FORMATS if self.task == "classify" else (*FORMATS, *NMS_FORMATS))


def load_experiment(path: str | Path | None, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment from TOML; ``overrides`` are ``key.path=value`` strings. Raises ConfigError in one sentence."""
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(located(Path(path)).read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"configuration {path} does not exist: check the path, or see 'hwnas run --help'.") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"configuration {path} is not valid TOML: {error}.") from error
    set_content = content
    for override in overrides or []:
        set_content = merged(set_content, _override(override), replace=("strategy", "objective", "optimizer"))
    try:
        return Experiment.model_validate(set_content)
    except ValidationError as error:
        source = str(path) if _is_wrong(content, error) else ", ".join(f"-s {text}" for text in _to_blame(overrides or [], error))
        raise ConfigError(f"{source}: {explain(error, Experiment)}") from error


def _is_wrong(content: dict[str, Any], error: ValidationError) -> bool:
    """Whether a configuration has an error by itself, without what the command line sets."""
    try:
        Experiment.model_validate(content)
    except ValidationError as own:
        first = error.errors()[0]
        alike = [each for each in own.errors() if (each["loc"], each["msg"]) == (first["loc"], first["msg"])]
        return any(each["input"] == first["input"] or isinstance(first["input"], dict) for each in alike)  # tables hold other keys, too
    return False


def _to_blame(overrides: list[str], error: ValidationError) -> list[str]:
    """The override whose value is wrong; where a rule of a whole table is broken, all that set something in it."""
    place = [str(part) for part in error.errors()[0]["loc"]]
    keys = {text: text.partition("=")[0].strip().split(".") for text in overrides}
    of_value = [text for text, key in keys.items() if all(part in place for part in key)]  # tags of unions stand between the parts
    return of_value[-1:] or [text for text, key in keys.items() if key[: len(place)] == place] or overrides


def located(path: Path) -> Path:
    """The path itself, or, for ``configs/...`` where there is no checkout, the one that ships with the package."""
    if path.exists() or path.parts[:1] != ("configs",):
        return path
    return share_folder("configs").joinpath(*path.parts[1:])


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {text!r} is not KEY=VALUE; write for instance -s search.target_ms=1.5.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    out: Any = parsed
    for part in reversed(key.strip().split(".")):
        out = {part: out}
    return dict(out)
