"""The tables of the final training: ``[train]`` and its ``augmentation`` and
``progressive``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hwnas.config.base import (
    BatchSize,
    Epochs,
    Section,
    check_model_of_file,
    without_defaults,
)
from hwnas.config.search import OptimizerConfig

MOSAIC_UNSET: dict[str, Any] = {"mosaic": 0.0, "mosaic_off": 0.1}
"""Keys of ``train.augmentation`` that are left out of documents at these values, their
defaults.
"""


class AugmentationConfig(Section):
    """What training does to images beyond ``data.augment``: a mosaic for detectors, the
    other keys for classifiers. See docs/training.md.
    """

    auto: str = Field(
        "none",
        max_length=100,
        description=(
            "policy: none, randaugment, autoaugment, trivialaugment (torchvision's), or a string of"
            " timm such as rand-m9-mstd0.5-inc1"
        ),
    )
    erasing: float = Field(
        0.0, ge=0, le=1, description="probability that a random rectangle becomes noise"
    )
    mixup: float = Field(
        0.0, ge=0, le=100, description="alpha of mixup, which blends pairs of images; 0: none"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=100,
        description="alpha of CutMix, which pastes a rectangle of another image; 0: none",
    )
    cutout: int = Field(
        0,
        ge=0,
        le=4096,
        description=(
            "side in pixels of a square, anywhere in the image, that gets the mean colour; below"
            " the resolution; 0: none"
        ),
    )
    repeats: int = Field(
        1,
        ge=1,
        le=64,
        description=(
            "how many times each image is in an update, augmented differently each time; a divisor"
            " of the batch size"
        ),
    )
    mosaic: float = Field(
        0.0,
        ge=0,
        le=1,
        description="detectors: probability that an image is put together with three others",
    )
    mosaic_off: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of the steps, the last ones, in which there are no mosaics",
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys that are not set: the hash of training runs from before these keys
        existed must not change.
        """
        content: dict[str, Any] = handler(self)
        return without_defaults(content, {"cutout": 0, "repeats": 1, **MOSAIC_UNSET})

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are blended."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def without_mosaic(self) -> AugmentationConfig:
        """The same without mosaics: what is done to single images, and to pairs."""
        return self.model_copy(update=MOSAIC_UNSET)


class ProgressiveConfig(Section):
    """How the resolution rises during the training of a classifier; see
    hwnas/train/progressive.py.
    """

    start: float = Field(
        1.0,
        ge=0.1,
        le=1,
        description=(
            "size of the images in the first stage, as a fraction of the network's input; 1: images"
            " have the full size from the start"
        ),
    )
    stages: int = Field(
        4, ge=2, le=100, description="stages of equal length, the last one at the full size"
    )


TRAIN_UNSET: dict[str, Any] = {
    "validate_every": None,
    "pretrained": None,
    "pretrained_model": None,
    "teacher": None,
    "teacher_model": None,
    "teacher_share": 0.5,
    "teacher_temperature": 1.0,
    "loss": "cross_entropy",
    "drop_path": 0.0,
    "freeze": 0.0,
    "freeze_bn": False,
    "augmentation": AugmentationConfig().model_dump(),
    "progressive": ProgressiveConfig().model_dump(),
}
"""Keys of ``train`` that are left out of documents at these values, their defaults."""


class TrainConfig(Section):
    """How the final network is trained."""

    arch: str | None = Field(
        None,
        # Positions of options such as 22212220 are a number in TOML.
        coerce_numbers_to_str=True,
        description=(
            "architecture to train instead of searching: path of a document (.json), name of a"
            " published network, or an architecture of the space in its notation"
        ),
    )
    weights: Literal["scratch", "supernet"] = Field(
        "scratch",
        description="initial weights: scratch: random; supernet: those of the trained super-net",
    )
    backbone: str | None = Field(
        None,
        description=(
            "detection: run folder or train folder of a trained classifier, whose weights"
            " initialise the backbone"
        ),
    )
    pretrained: str | None = Field(
        None,
        min_length=1,
        description=(
            "weights to start from: a file (.pth, .safetensors), the folder of an earlier run, or"
            " the name of a timm model whose weights are in its cache"
        ),
    )
    pretrained_model: str | None = Field(
        None, description="the timm model that the file of train.pretrained belongs to"
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description=(
            "a trained classifier of the same classes, whose probabilities this network learns as"
            " well (distillation): the folder of an earlier run, a file (.pth, .safetensors), or"
            " the name of a timm model whose weights are in its cache"
        ),
    )
    teacher_model: str | None = Field(
        None, description="the timm model that the file of train.teacher belongs to"
    )
    teacher_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description=(
            "weight of the teacher's probabilities in the loss, against 1 - it of the labels"
        ),
    )
    teacher_temperature: float = Field(
        1.0,
        ge=0.1,
        le=100,
        description=(
            "divisor of the logits of both networks where this one learns from its teacher: the"
            " higher, the more the less probable classes count"
        ),
    )
    freeze: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "fraction of the steps, from the first, in which only the classifier (or the"
            " detector's layers after the backbone) is trained"
        ),
    )
    freeze_bn: bool = Field(
        False,
        description=(
            "keep the BN statistics, scales and shifts of the backbone as they are in the initial"
            " weights"
        ),
    )
    epochs: Epochs = Field(30, description="epochs of training")
    batch_size: BatchSize = Field(64, description="images per training step")
    optimizer: OptimizerConfig = OptimizerConfig()
    bn_momentum: float = Field(
        0.1,
        gt=0,
        le=1,
        description=(
            "weight of a new batch in the running statistics of BN; torchvision's SSDLite and"
            " MobileDet: 0.03"
        ),
    )
    loss: Literal["cross_entropy", "bce"] = Field(
        "cross_entropy",
        description=(
            "loss of a classifier. cross_entropy: of the softmax over all classes; bce: the mean of"
            " the binary cross-entropies of the classes (timm's)"
        ),
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing of a classifier")
    augmentation: AugmentationConfig = AugmentationConfig()
    progressive: ProgressiveConfig = ProgressiveConfig()
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "dropout probability before the classifier; TuNAS: 0.15 for 360 epochs, 0 below 150"
        ),
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "probability that an image loses the branch of the last residual block in training; it"
            " rises linearly over the blocks (stochastic depth). In networks of cells: that it"
            " loses the op of an edge at the end of training, to which it rises linearly"
        ),
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of the moving average of the weights; 0: no average",
    )
    validate_every: float | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description=(
            "epochs between evaluations on test images (at most 2,000; 500 for detectors). They"
            " select nothing: the last weights are kept. 0: no evaluations; default: ten in the"
            " whole training, or fewer if they would take more than a twentieth of its time"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit keys that are not set: the hash of training runs from before these keys
        existed must not change.
        """
        content: dict[str, Any] = handler(self)
        return without_defaults(content, TRAIN_UNSET)

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(
                f"train.batch_size = {self.batch_size} is odd, and mixup and CutMix blend images in"
                " pairs; choose an even number"
            )
        repeats = self.augmentation.repeats
        if self.batch_size % repeats:
            raise ValueError(
                f"train.batch_size = {self.batch_size} is not a multiple of"
                f" train.augmentation.repeats = {repeats}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_pretrained(self) -> Self:
        check_model_of_file("train.pretrained", self.pretrained, self.pretrained_model)
        check_model_of_file("train.teacher", self.teacher, self.teacher_model)
        starts_anew = self.pretrained is None and self.backbone is None
        if starts_anew and self.weights == "scratch" and (self.freeze or self.freeze_bn):
            key = "train.freeze" if self.freeze else "train.freeze_bn"
            raise ValueError(
                f"{key} keeps initial weights as they are, and these are random; set"
                " train.pretrained, or remove it"
            )
        return self
