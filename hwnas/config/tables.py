"""The tables of the stages: space, device, data, profile, detector, train, export, validate."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from hwnas.config.base import Section, with_usual
from hwnas.config.formats import Format, known_dtype, known_runtime
from hwnas.config.search import OptimizerConfig
from hwnas.core.detector import PostProcessing, Scores
from hwnas.core.ssdlite import EXTRAS


class SpaceConfig(Section):
    """What is searched."""

    name: str = Field(
        "mobile32", description="a built-in space, or the path of a space document (.json)"
    )
    act: str | None = Field(None, description="activation, where the space leaves it open")
    restrict: dict[str, tuple[str | int, ...]] = Field(
        {}, description="options that are kept, by choice: {resolution = [224]}"
    )
    width: float = Field(
        1.0, gt=0, description="multiplier of all widths, rounded to multiples of 8"
    )
    layers: int | None = Field(
        None, ge=3, description="cells in all, where the space is of DARTS's cells"
    )


class DeviceConfig(Section):
    """Where latency is measured."""

    name: str = Field(
        "host", description="'host': this computer; or the path of a device document (.json)"
    )
    runtime: Annotated[str, AfterValidator(known_runtime)] = Field(
        "litert", description="litert, onnxruntime, or that of a target plug-in"
    )
    dtype: Annotated[str, AfterValidator(known_dtype)] = Field(
        "fp32", description="fp32, int8 (litert), or that of a target plug-in"
    )
    threads: int = Field(1, ge=1)
    cores: tuple[int, ...] | None = Field(
        None, description="cores to pin to; default: the device's last `threads` cores"
    )

    @model_validator(mode="after")
    def _enough_cores(self) -> Self:
        if self.cores is not None and len(set(self.cores)) < self.threads:
            raise ValueError(
                f"device.cores names {len(set(self.cores))} cores for {self.threads} threads; name"
                " one per thread"
            )
        return self


Resize: TypeAlias = Literal["squash", "crop", "pad"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]

IMAGE_LABELS = ("digits", "npz", "cifar10", "folder")
"""Our data sets that have one label per image; plug-ins may be of either kind."""


ARRAYS = ("digits", "npz", "cifar10")
"""Those of them that are arrays in memory, all images of one size."""

GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""ImageNet's mean and standard deviation, averaged over the colours (as timm does for
one channel).
"""


class DataConfig(Section):
    """Images and labels. ``classes``, ``channels`` and ``resolution`` also shape the network."""

    name: str = Field(
        "digits", description="digits, npz, cifar10, folder, coco (detection), or a plug-in"
    )
    path: str | None = Field(
        None, description="file or folder of the images; ~ and relative paths are understood"
    )
    resolution: int = Field(32, ge=8, description="input height = width in pixels")
    channels: Literal[1, 3] = 3
    classes: int = Field(
        10,
        ge=1,
        description=(
            "default: counted in the training images; of images, at least 2; of objects, at least"
            " 1: the background is not counted"
        ),
    )
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="part of the training images kept for the search's rewards and rankings",
    )
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406),
        description=(
            "per channel, images scaled to 0..1; default: ImageNet's, of grey images their mean"
        ),
    )
    std: tuple[float, ...] = Field(
        (0.229, 0.224, 0.225),
        description="per channel, images scaled to 0..1; default as of the mean",
    )
    augment: Literal["none", "crop", "crop_flip", "imagenet", "ssd", "ssdlite"] = Field(
        "crop_flip",
        description=(
            "imagenet: for folder; ssd, ssdlite: for coco, torchvision's presets, the latter also"
            " MobileDet's; default: crop_flip, for coco ssdlite"
        ),
    )
    resize: Resize | None = Field(
        None,
        description=(
            "how an image becomes the network's size, in training and in evaluation. squash"
            " (default): both sides to the resolution, as MediaPipe and ML Kit do; crop (default of"
            " augment = 'imagenet'): the middle of a larger one, not for boxes; pad: all of it, on"
            " a border of the mean colour"
        ),
    )
    crop_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description=(
            "resize crop: part of the shorter side that is kept; default 0.875 (224 of 256 pixels)"
        ),
    )
    interpolation: Interpolation | None = Field(
        None,
        description=(
            "of the resizing, with antialiasing; default: bilinear, with augment = 'imagenet'"
            " bicubic"
        ),
    )
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")

    @model_validator(mode="wrap")
    @classmethod
    def _usual(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The defaults that depend on what else is given. They do not count as given."""
        known = given if isinstance(given, dict) else {}
        usual: dict[str, Any] = {"augment": "ssdlite"} if known.get("name") == "coco" else {}
        if known.get("channels") == 1:
            usual |= {"mean": GREY_MEAN, "std": GREY_STD}
        return with_usual(given, usual, handler)

    @property
    def resize_mode(self) -> Resize:
        """``resize``, or what it is by default."""
        usual: Resize = "crop" if self.augment == "imagenet" else "squash"
        return self.resize or usual

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set of the geometry, so that run folders from before it
        could be chosen stay up to date.
        """
        unset = [
            name
            for name in ("resize", "crop_fraction", "interpolation")
            if getattr(self, name) is None
        ]
        return {name: value for name, value in handler(self).items() if name not in unset}

    @model_validator(mode="after")
    def _one_geometry(self) -> Self:
        if self.crop_fraction is not None and self.resize_mode != "crop":
            raise ValueError(
                f"data.crop_fraction is of data.resize = 'crop', and this is {self.resize_mode!r};"
                " remove it, or choose 'crop'"
            )
        if self.resize == "crop" and (self.name == "coco" or self.augment in ("ssd", "ssdlite")):
            raise ValueError(
                "data.resize = 'crop' would cut objects off at the edges; choose squash or pad for"
                " boxes"
            )
        if self.resize == "pad" and self.augment == "imagenet":
            raise ValueError(
                "data.resize = 'pad' shows borders that no crop of data.augment = 'imagenet' has;"
                " choose crop or squash"
            )
        return self

    @model_validator(mode="after")
    def _per_channel(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"data.{name} has {len(getattr(self, name))} values for {self.channels}"
                    " channels; give one per channel"
                )
        if min(self.std) <= 0:
            raise ValueError(f"data.std has {min(self.std):g}; give standard deviations above 0")
        return self

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        of_boxes = self.augment in ("ssd", "ssdlite")
        if self.name in IMAGE_LABELS and of_boxes:
            raise ValueError(
                f"data.augment = {self.augment!r} is for boxes; choose crop, crop_flip or none for"
                f" {self.name!r}"
            )
        if self.name in ARRAYS and self.augment == "imagenet":
            raise ValueError(
                "data.augment = 'imagenet' needs a folder of images; choose crop_flip, crop or none"
                " here"
            )
        if self.name in IMAGE_LABELS and self.classes < 2:
            raise ValueError(
                f"data.classes = {self.classes} leaves {self.name!r} nothing to tell apart; give 2"
                " or more"
            )
        if self.name == "coco" and not of_boxes and self.augment != "none":
            raise ValueError(
                f"data.augment = {self.augment!r} is for images without boxes; choose ssd, ssdlite"
                " or none for 'coco'"
            )
        return self

    def at(self, resolution: int) -> DataConfig:
        """The same data at another input size: that of an architecture whose space searches it."""
        return (
            self
            if resolution == self.resolution
            else self.model_copy(update={"resolution": resolution})
        )


SAMPLED = 40
"""Networks that mode ``networks`` measures where no number is given."""


class ProfileConfig(Section):
    """How the device is measured. See hwnas/profile for the procedure."""

    mode: Literal["ops", "networks"] = Field(
        "ops",
        description=(
            "ops: every op of the space; networks: whole networks alone, to which the entries are"
            " fitted"
        ),
    )
    networks: Annotated[int, Field(ge=3)] | tuple[str, ...] = Field(
        SAMPLED,
        description=(
            "a number, mode networks: how many sampled ones are measured; names, as in train.arch:"
            " networks whose blocks are measured, too (mode ops), or that are measured beside 40"
            " sampled ones (mode networks), and whose latency is then predicted"
        ),
    )
    prior: tuple[str, ...] = Field(
        (),
        description=(
            "mode networks: other devices' tables of the space, beside a roofline, as where the fit"
            " starts"
        ),
    )
    rounds: int = Field(
        7, ge=1, description="shuffled passes over everything; medians are taken over their medians"
    )
    max_rounds: int = Field(
        15,
        ge=1,
        description="noisy entries are measured again up to this many rounds, then flagged",
    )
    max_spread: float = Field(
        0.10,
        gt=0,
        description=(
            "spread between rounds (interquartile range / median) above which an entry is noisy"
        ),
    )
    min_ms: float = Field(
        20.0, gt=0, description="time one model for at least this long per round ..."
    )
    min_runs: int = Field(5, ge=1, description="... and at least this many runs")
    fit_networks: int = Field(
        12, ge=0, description="whole networks that the calibration is fitted on"
    )
    test_networks: int = Field(
        8, ge=0, description="whole networks that judge it, never seen in the fit"
    )

    @field_validator("networks", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # -s profile.networks=mobilenet_v2

    @property
    def sampled(self) -> int:
        """How many networks mode ``networks`` draws from the space."""
        return self.networks if isinstance(self.networks, int) else SAMPLED


class DetectorConfig(Section):
    """The detector that is put on an architecture that has none, and how its outputs
    become detections (all detectors').

    The defaults are torchvision's SSDLite. MobileDet's are ``scores = "sigmoid"`` and
    ``post_processing = {min_score = 1e-8, candidates = 100, nms_iou = 0.6, detections =
    100}``; its whole recipe is configs/experiments/coco.toml.
    """

    extras: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        EXTRAS, description="output channels of the layers after the backbone"
    )
    scores: Scores = Field(
        "softmax",
        description=(
            "softmax: over classes and background, by SSD's loss with hard negatives; sigmoid: per"
            " class, by focal loss"
        ),
    )
    post_processing: PostProcessing = PostProcessing()


class TrainConfig(Section):
    """How the winner is trained."""

    arch: str | None = Field(
        None,
        coerce_numbers_to_str=True,  # TOML's 22212220, positions of options, is a number
        description=(
            "instead of searching: an architecture document, a published network's name, or one of"
            " the space in its notation"
        ),
    )
    weights: Literal["scratch", "supernet"] = "scratch"
    backbone: str | None = Field(
        None,
        description=(
            "detection: the run folder of a trained classifier, or its train folder, whose weights"
            " the backbone begins with"
        ),
    )
    epochs: float = Field(30, gt=0)
    batch_size: int = Field(64, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    bn_momentum: float = Field(
        0.1,
        gt=0,
        le=1,
        description=(
            "part of a new batch in BN's running statistics; torchvision's SSDLite and MobileDet:"
            " 0.03"
        ),
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of a classifier's labels")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="before the classifier; TuNAS: 0.15 for 360 epochs, 0 below 150",
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="exponential moving average of the weights; 0: none"
    )
    validate_every: float | None = Field(
        None,
        ge=0,
        description=(
            "epochs between evaluations on test images (2,000 at most; 500 of a detector), which"
            " choose nothing: the last weights are kept; 0: none; default: ten in the whole"
            " training, fewer where they would take more than a twentieth of its time"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a validation curve that is as usual: it changes no weight, so
        trainings from before it stay up to date.
        """
        return {
            name: value
            for name, value in handler(self).items()
            if name != "validate_every" or value is not None
        }


class ExportConfig(Section):
    """Which files are made."""

    formats: tuple[Format, ...] | None = Field(
        None,
        min_length=1,
        description=(
            "default: tflite-fp32, tflite-int8 and onnx; of detectors also those with NMS in the"
            " graph: onnx-nms, tflite-fp32-tasks and tflite-int8-tasks"
            " (TFLite_Detection_PostProcess); or the names of target plug-ins"
        ),
    )
    calibration_images: int = Field(
        128, ge=1, description="training images that set the int8 ranges"
    )
    parity_images: int = Field(
        64,
        ge=1,
        description="test images that each file's outputs are compared on, kept in the bundle",
    )
    input: Literal["float32", "uint8"] = Field(
        "float32",
        description=(
            "what the files take: normalised images, or pixels 0 to 255, which they normalise"
            " themselves"
        ),
    )
    softmax: bool = Field(
        False, description="classifiers: probabilities come out of the files instead of logits"
    )
    score_calibration: bool = Field(
        False,
        description=(
            "classifiers: TFLite files tell MediaPipe how to calibrate their scores, by a sigmoid"
            " per label that is fitted to half of the test images, the only ones that training has"
            " not seen; the other half is left to judge it by"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is as it always was, so that bundles from before it could be
        chosen stay up to date.
        """
        usual = {"input": "float32", "softmax": False, "score_calibration": False}
        return {
            name: value
            for name, value in handler(self).items()
            if name not in usual or value != usual[name]
        }


class ValidateConfig(Section):
    """When an exported file counts as fast and accurate as promised."""

    latency_tolerance: float = Field(
        0.05,
        gt=0,
        description=(
            "measured against predicted latency, for files of the table's runtime and dtype"
        ),
    )
    max_drift: float = Field(
        0.25,
        gt=0,
        description=(
            "a device this much faster or slower than when profiled fails: profile it again"
        ),
    )
    parity_tolerance: float = Field(
        1e-4,
        gt=0,
        description=(
            "outputs of float files against PyTorch's, relative to the largest; of detectors, in"
            " parts of the input or of a score"
        ),
    )
    accuracy_tolerance: float = Field(
        0.002, ge=0, description="top-1 of float files against PyTorch"
    )
    int8_accuracy_tolerance: float = Field(
        0.02, ge=0, description="top-1 of int8 files against PyTorch"
    )
    ap_tolerance: float = Field(
        0.005, ge=0, description="AP of a detector's float files against PyTorch"
    )
    int8_ap_tolerance: float = Field(
        0.03, ge=0, description="AP of a detector's int8 files against PyTorch"
    )
    images: int | None = Field(None, ge=1, description="test images to use; default all")
    app_score: float = Field(
        0.3,
        gt=0,
        lt=1,
        description=(
            "score from which an app shows what a detector finds: NMS is timed at it, too, for AP"
            " needs a far lower one (detector.post_processing.min_score; at or below that one it"
            " does nothing)"
        ),
    )
    rounds: int = Field(
        7,
        ge=1,
        description="interleaved passes over the files; up to twice as many while they are noisy",
    )
    max_spread: float = Field(
        0.10, gt=0, description="spread between rounds above which a file is measured again"
    )
    tolerances: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description=(
            "of metrics without a key of their own, by the metric's name, and 'int8 NAME' for int8"
            " files; default those of top-1"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``tolerances`` where there are none, so that verdicts from before
        them keep their hash.
        """
        return {
            name: value for name, value in handler(self).items() if name != "tolerances" or value
        }

    def tolerance(self, metric: str, dtype: str) -> float:
        """What a file of a number format may lose of a metric against PyTorch, as a fraction."""
        key = self.tolerance_key(metric, dtype)
        if key in type(self).model_fields:
            value: float = getattr(self, key)
            return value
        usual = self.tolerance("accuracy", dtype)
        return self.tolerances.get(key.removeprefix("tolerances."), usual)

    def tolerance_key(self, metric: str, dtype: str) -> str:
        """The key of this table that says so."""
        own = f"{metric.lower()}_tolerance"
        is_int8 = dtype == "int8"
        if own in ("accuracy_tolerance", "ap_tolerance"):
            return f"int8_{own}" if is_int8 else own
        return f"tolerances.int8 {metric}" if is_int8 else f"tolerances.{metric}"
