"""The tables of the stages: space, device, data, profile, detector, export and
validate.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from hwnas.config.base import (
    Images,
    Processes,
    Rounds,
    Section,
    Weight,
    with_defaults,
    without_defaults,
)
from hwnas.config.formats import Format, check_dtype, check_runtime
from hwnas.core.detector import DetectorSpec, PostProcessing, Scores
from hwnas.core.fcos import CHANNELS, FCOSSpec
from hwnas.core.size import Pixels, Size, sides
from hwnas.core.ssdlite import EXTRAS, SSDLiteSpec

OptionNumber: TypeAlias = Annotated[int, Field(ge=0, le=1_000_000)]
"""An option that is a number: a width, a depth or a resolution."""


class SpaceConfig(Section):
    """The search space."""

    name: str = Field(
        "mobile32", description="name of a built-in space, or path of a space document (.json)"
    )
    act: str | None = Field(None, description="activation function, for spaces that do not fix it")
    restrict: dict[str, tuple[str | OptionNumber, ...]] = Field(
        {}, description="options to keep, by choice, for instance {resolution = [224]}"
    )
    width: float = Field(
        1.0,
        gt=0,
        le=16,
        description="factor of all channel counts, which are rounded to multiples of 8",
    )
    layers: int | None = Field(
        None, ge=3, le=200, description="total number of cells, for spaces of DARTS's cells"
    )


CoreIndex: TypeAlias = Annotated[int, Field(ge=0, lt=8192)]
"""The index of a core. Linux numbers at most 8192."""


class DeviceConfig(Section):
    """The device on which latency is measured."""

    name: str = Field(
        "host", description="'host' for this computer, or path of a device document (.json)"
    )
    runtime: Annotated[str, AfterValidator(check_runtime)] = Field(
        "litert", description="runtime: litert, onnxruntime, or that of a target plug-in"
    )
    dtype: Annotated[str, AfterValidator(check_dtype)] = Field(
        "fp32", description="number format: fp32, int8 (litert only), or that of a target plug-in"
    )
    threads: Processes = Field(1, description="threads of the runtime")
    cores: tuple[CoreIndex, ...] | None = Field(
        None,
        max_length=8192,
        description=(
            "indices of the cores to pin the runtime to; default: the last `threads` cores, on a"
            " phone the fastest; []: do not pin, for devices that cannot (no taskset, cores that"
            " are switched off); times then spread more"
        ),
    )

    @model_validator(mode="after")
    def _check_cores(self) -> Self:
        # two threads on one core would measure the scheduler
        if self.cores and len(set(self.cores)) < self.threads:
            raise ValueError(
                f"device.cores names {len(set(self.cores))} cores for {self.threads} threads; name"
                " at least one per thread"
            )
        return self


Resize: TypeAlias = Literal["squash", "crop", "pad"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
BoxAugmentation: TypeAlias = Literal["ssd", "ssdlite", "jitter", "lsj"]

BOX_AUGMENTATIONS: tuple[str, ...] = get_args(BoxAugmentation)
"""The values of ``data.augment`` for images with boxes."""

IMAGE_LABELS = ("digits", "npz", "cifar10", "folder")
"""Built-in data sets with one label per image. Plug-ins may be of either kind."""

ARRAYS = ("digits", "npz", "cifar10")
"""The data sets among these that are in-memory arrays, with images of one size."""

GREY_MEAN = (0.449,)
"""ImageNet's mean averaged over the colours, as in timm for one channel."""

GREY_STD = (0.226,)
"""ImageNet's standard deviation averaged over the colours, as in timm for one channel.
"""


Shade: TypeAlias = Annotated[float, Field(ge=-1000, le=1000)]
"""A mean or a standard deviation of images that are scaled to 0..1, or to 0..255 in
other programs.
"""


class DataConfig(Section):
    """The images and labels. ``classes``, ``channels`` and ``resolution`` also
    determine the shape of the network.
    """

    name: str = Field(
        "digits",
        description="data set: digits, npz, cifar10, folder, coco (detection), or a plug-in",
    )
    path: str | None = Field(
        None, description="file or folder of the images; may be relative or begin with ~"
    )
    resolution: Annotated[Size, Pixels(least=8, most=4096)] = Field(
        32,
        description=(
            "height and width of the network's input in pixels: one number for both, or [height,"
            " width]"
        ),
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey images, 3 for colour images")
    classes: int = Field(
        10,
        ge=1,
        le=100_000,
        description=(
            "number of classes: at least 2 for images; at least 1 for objects, the background not"
            " counted; default: counted in the training images"
        ),
    )
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="fraction of the training images kept for rewards and rankings of the search",
    )
    mean: tuple[Shade, ...] = Field(
        (0.485, 0.456, 0.406),
        description=(
            "subtracted per channel from images scaled to 0..1; default: ImageNet's mean, for grey"
            " images its average over the colours"
        ),
    )
    std: tuple[Shade, ...] = Field(
        (0.229, 0.224, 0.225),
        description="divisor per channel of images scaled to 0..1; default: as for mean",
    )
    augment: Literal["none", "crop", "crop_flip", "imagenet"] | BoxAugmentation = Field(
        "crop_flip",
        description=(
            "augmentation of training images. none, crop, crop_flip: any images without boxes;"
            " imagenet: for data.name = 'folder'. For boxes: ssd, ssdlite: torchvision's presets,"
            " the latter also MobileDet's; jitter: colours and a scale of 0.8 to 1.25; lsj: a scale"
            " of 0.1 to 2 (large-scale jitter). Default: crop_flip, for coco ssdlite"
        ),
    )
    resize: Resize | None = Field(
        None,
        description=(
            "how images are resized to the network's input, in training and in evaluation. squash"
            " (default): both sides to the resolution, as MediaPipe and ML Kit do; crop (default"
            " with augment = 'imagenet'): the centre of a larger image, not for boxes; pad: the"
            " whole image, with a border of the mean colour"
        ),
    )
    crop_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description=(
            "with resize = 'crop': fraction of the shorter side that is kept; default: 0.875 (224"
            " of 256 pixels)"
        ),
    )
    interpolation: Interpolation | None = Field(
        None,
        description=(
            "interpolation of the resizing, with antialiasing; default: bilinear, with augment ="
            " 'imagenet' bicubic"
        ),
    )
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="processes that load images; 0: the training process loads them",
    )
    unreadable: Literal["fail", "skip"] = Field(
        "fail",
        description=(
            "images that do not decode. fail: list them and stop before work begins; skip: leave"
            " them out, and list them in the run folder and the report"
        ),
    )
    skip: tuple[str, ...] = Field(
        (),
        description=(
            "images to leave out, as paths relative to data.path. In training, another image of"
            " the split takes the place of each; the test split is evaluated without them"
        ),
    )
    allow_outside: bool = Field(
        False,
        description="for coco: whether file names may lead out of the folder of the images",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _conditional_defaults(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the defaults that depend on other keys; they do not count as set."""
        known = given if isinstance(given, dict) else {}
        defaults: dict[str, Any] = {}
        if known.get("name") == "coco":
            defaults["augment"] = "ssdlite"
        if known.get("channels") == 1:
            defaults |= {"mean": GREY_MEAN, "std": GREY_STD}
        return with_defaults(given, defaults, handler)

    @property
    def resize_mode(self) -> Resize:
        """``resize``, or its default."""
        default: Resize = "crop" if self.augment == "imagenet" else "squash"
        return self.resize or default

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys of the geometry that are not set: the hash of run folders from
        before these keys existed must not change.
        """
        content: dict[str, Any] = handler(self)
        for name in ("resize", "crop_fraction", "interpolation"):
            if getattr(self, name) is None:
                content.pop(name, None)
        return content

    @model_validator(mode="after")
    def _check_geometry(self) -> Self:
        if self.crop_fraction is not None and self.resize_mode != "crop":
            raise ValueError(
                f"data.crop_fraction is for data.resize = 'crop', not {self.resize_mode!r}; remove"
                " it, or choose 'crop'"
            )
        has_boxes = self.name == "coco" or self.augment in BOX_AUGMENTATIONS
        if self.resize == "crop" and has_boxes:
            raise ValueError(
                "data.resize = 'crop' would cut off objects at the edges; choose squash or pad for"
                " boxes"
            )
        if self.resize == "pad" and self.augment == "imagenet":
            raise ValueError(
                "data.resize = 'pad' adds borders that the crops of data.augment = 'imagenet' do"
                " not have; choose crop or squash"
            )
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
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
    def _check_task(self) -> Self:
        augments_boxes = self.augment in BOX_AUGMENTATIONS
        if self.name in IMAGE_LABELS and augments_boxes:
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
            raise ValueError(f"data.classes = {self.classes}, but a classifier needs at least 2")
        if self.name == "coco" and not augments_boxes and self.augment != "none":
            raise ValueError(
                f"data.augment = {self.augment!r} is for images without boxes; choose"
                f" {', '.join(BOX_AUGMENTATIONS)} or none for 'coco'"
            )
        return self

    @property
    def smaller_side(self) -> int:
        """The smaller one of height and width."""
        return min(sides(self.resolution))

    def at(self, resolution: Size) -> DataConfig:
        """The same data at another input size in pixels, for architectures whose space
        has a choice of resolution.
        """
        if resolution == self.resolution:
            return self
        return self.model_copy(update={"resolution": resolution})


SAMPLED = 40
"""The number of networks that mode ``networks`` measures by default."""


class ProfileConfig(Section):
    """How the device is profiled. See hwnas/profile for the procedure."""

    mode: Literal["ops", "networks"] = Field(
        "ops",
        description=(
            "what is measured. ops: every op of the space; networks: only whole networks, to which"
            " the entries of the table are fitted"
        ),
    )
    networks: Annotated[int, Field(ge=3, le=100_000)] | tuple[str, ...] = Field(
        SAMPLED,
        description=(
            "a number: how many sampled networks mode 'networks' measures. Names, as in train.arch:"
            " networks whose latency can then be predicted, because mode 'ops' also measures their"
            " blocks, or mode 'networks' measures them in addition to 40 sampled networks"
        ),
    )
    prior: tuple[str, ...] = Field(
        (),
        max_length=1000,
        description=(
            "mode networks: latency tables of the space for other devices, which the fit starts"
            " from in addition to a roofline model"
        ),
    )
    rounds: Rounds = Field(
        7,
        description=(
            "passes over all measurements, in random order; an entry is the median of its medians"
            " per pass"
        ),
    )
    max_rounds: Rounds = Field(
        15,
        description=(
            "noisy entries are measured again up to this total number of rounds, then flagged"
        ),
    )
    max_spread: float = Field(
        0.10,
        gt=0,
        le=1000,
        description=(
            "spread between rounds (interquartile range / median) above which an entry counts as"
            " noisy"
        ),
    )
    min_ms: float = Field(
        20.0,
        gt=0,
        le=3_600_000,
        description="minimum time per model and round, in milliseconds",
    )
    min_runs: int = Field(
        5, ge=1, le=1_000_000, description="minimum number of runs per model and round"
    )
    fit_networks: int = Field(
        12,
        ge=0,
        le=100_000,
        description="number of whole networks that the calibration is fitted to",
    )
    test_networks: int = Field(
        8,
        ge=0,
        le=100_000,
        description="number of whole networks, not used in the fit, that test the calibration",
    )

    @field_validator("networks", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # -s profile.networks=mobilenet_v2

    @property
    def sampled(self) -> int:
        """The number of networks that mode ``networks`` samples from the space."""
        return self.networks if isinstance(self.networks, int) else SAMPLED


class DetectorConfig(Section):
    """The detector that is added to an architecture without one, and the
    post-processing of all detectors.

    The defaults are those of torchvision's SSDLite. Those of MobileDet are ``scores =
    "sigmoid"`` and ``post_processing = {min_score = 1e-8, candidates = 100, nms_iou =
    0.6, detections = 100}``; ``recipe = "mobiledet"`` has its whole training.
    """

    head: Literal["ssdlite", "fcos"] = Field(
        "ssdlite",
        description=(
            "kind of detector. ssdlite: anchor boxes on the two coarsest feature maps and extra"
            " layers after them; fcos: no anchor boxes, on the three coarsest ones, joined by a"
            " light PAN (as in NanoDet and PicoDet). See docs/detection.md"
        ),
    )
    extras: tuple[Annotated[int, Field(ge=2, le=2**16)], ...] = Field(
        EXTRAS,
        max_length=100,
        description="ssdlite: output channels of the layers after the backbone",
    )
    scores: Scores = Field(
        "softmax",
        description=(
            "ssdlite: softmax over classes and background, trained with SSD's loss and hard"
            " negatives; or a sigmoid per class, trained with focal loss"
        ),
    )
    channels: int = Field(
        CHANNELS, ge=2, le=2**16, description="fcos: width of the neck and the heads"
    )
    post_processing: PostProcessing = Field(
        PostProcessing(), description="how raw outputs become detections: score threshold and NMS"
    )

    @property
    def spec(self) -> DetectorSpec:
        """The detector that these settings describe."""
        if self.head == "fcos":
            return FCOSSpec(channels=self.channels)
        return SSDLiteSpec(extras=self.extras, scores=self.scores)

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit the keys of anchor-free detectors unless they are used: the hash of run
        folders from before these keys existed must not change.
        """
        content: dict[str, Any] = handler(self)
        return without_defaults(content, {"head": "ssdlite", "channels": CHANNELS})


class ExportConfig(Section):
    """Which files are exported, and how."""

    formats: tuple[Format, ...] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description=(
            "files to write, including those of target plug-ins by name; default: tflite-fp32,"
            " tflite-int8 and onnx, and for detectors also those with NMS in the graph: onnx-nms,"
            " tflite-fp32-tasks and tflite-int8-tasks (TFLite_Detection_PostProcess)"
        ),
    )
    calibration_images: Images = Field(
        128, description="training images from which the int8 ranges are estimated"
    )
    parity_images: Images = Field(
        64,
        description=(
            "test images on which the outputs of each file are compared; stored in the bundle"
        ),
    )
    input: Literal["float32", "uint8"] = Field(
        "float32",
        description=(
            "input of the files. float32: normalised images; uint8: pixels of 0 to 255, which the"
            " files normalise themselves"
        ),
    )
    softmax: bool = Field(
        False, description="classifiers: the files return probabilities instead of logits"
    )
    score_calibration: bool = Field(
        False,
        description=(
            "classifiers: TFLite files contain MediaPipe's calibration of scores, a sigmoid per"
            " label. It is fitted to half of the test images, because training has seen all others;"
            " the other half evaluates it"
        ),
    )

    @model_validator(mode="after")
    def _once(self) -> Self:
        formats = self.formats or ()
        twice = [name for name in formats if formats.count(name) > 1]
        if twice:
            raise ValueError(f"export.formats has {twice[0]!r} twice; give each format once")
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys at their defaults that bundles from before these keys do not have:
        the hash of such bundles must not change.
        """
        content: dict[str, Any] = handler(self)
        for name, default in (
            ("input", "float32"),
            ("softmax", False),
            ("score_calibration", False),
        ):
            if name in content and content[name] == default:
                del content[name]
        return content


class ValidateConfig(Section):
    """When an exported file passes: as fast as predicted, and as accurate
    as PyTorch.
    """

    latency_tolerance: float = Field(
        0.05,
        gt=0,
        le=1_000_000,
        description=(
            "maximum relative difference between measured and predicted latency, for files with the"
            " runtime and number format of the table"
        ),
    )
    max_drift: float = Field(
        0.25,
        gt=0,
        le=1_000_000,
        description=(
            "maximum relative change of the device's speed since it was profiled; beyond it, the"
            " device has to be profiled again"
        ),
    )
    parity_tolerance: float = Field(
        1e-4,
        gt=0,
        le=1_000_000,
        description=(
            "maximum difference between outputs of float files and PyTorch's, relative to the"
            " largest output; for detectors, as a fraction of the input size or of a score"
        ),
    )
    accuracy_tolerance: float = Field(
        0.002,
        ge=0,
        le=1,
        description="largest drop in top-1 (0 to 1) of float files against PyTorch",
    )
    int8_accuracy_tolerance: float = Field(
        0.02, ge=0, le=1, description="largest drop in top-1 (0 to 1) of int8 files against PyTorch"
    )
    ap_tolerance: float = Field(
        0.005, ge=0, le=1, description="largest drop in AP (0 to 1) of float files against PyTorch"
    )
    int8_ap_tolerance: float = Field(
        0.03, ge=0, le=1, description="largest drop in AP (0 to 1) of int8 files against PyTorch"
    )
    images: Images | None = Field(None, description="number of test images to use; default: all")
    app_score: float = Field(
        0.3,
        gt=0,
        lt=1,
        description=(
            "score above which an app shows detections, at which NMS is timed as well: AP needs a"
            " far lower threshold (detector.post_processing.min_score). No effect at or below that"
            " threshold"
        ),
    )
    rounds: Rounds = Field(
        7,
        description=(
            "interleaved passes of timing over the files; up to twice as many while they are noisy"
        ),
    )
    max_spread: float = Field(
        0.10,
        gt=0,
        le=1000,
        description=(
            "spread between rounds (interquartile range / median) above which a file is timed again"
        ),
    )
    tolerances: dict[str, Weight] = Field(
        {},
        description=(
            "largest drops in metrics without their own key: the name of the metric, or 'int8"
            " NAME' for int8 files, to a fraction; default: the tolerances of top-1"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit ``tolerances`` if it is empty: the hash of verdicts from before the key
        existed must not change.
        """
        content: dict[str, Any] = handler(self)
        if "tolerances" in content and not content["tolerances"]:
            del content["tolerances"]
        return content

    def tolerance(self, metric: str, dtype: str) -> float:
        """The largest drop in a metric that a file of a number format may have against
        PyTorch, as a fraction.
        """
        key = self.tolerance_key(metric, dtype)
        if key in type(self).model_fields:
            value: float = getattr(self, key)
            return value
        default = self.tolerance("accuracy", dtype)
        return self.tolerances.get(key.removeprefix("tolerances."), default)

    def tolerance_key(self, metric: str, dtype: str) -> str:
        """The key of this table that sets ``tolerance``."""
        # the keys of accuracy and AP are older than metrics of plug-ins
        own = f"{metric.lower()}_tolerance"
        is_int8 = dtype == "int8"
        if own in ("accuracy_tolerance", "ap_tolerance"):
            return f"int8_{own}" if is_int8 else own
        return f"tolerances.int8 {metric}" if is_int8 else f"tolerances.{metric}"
