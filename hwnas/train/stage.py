"""The training stage: takes an architecture and returns a trained network.

It trains on all training images, including those that the search holds out.
"""

from __future__ import annotations

from pathlib import Path

from hwnas.config import AugmentationConfig, Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.document import file_sha256
from hwnas.errors import ConfigError
from hwnas.networks import architecture
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import task_of
from hwnas.train.initial_weights import trained_backbone, trained_weights
from hwnas.train.result import WEIGHTS


def outputs(experiment: Experiment) -> list[str]:
    """The files that the stage writes: the weights, the result, and those of the task."""
    return [WEIGHTS, "train.json", *task_of(experiment).files]


class Train(Stage):
    """Trains the searched architecture, or the one that ``train.arch`` names."""

    name = "train"
    result = "train.json"
    reported = ("train.json", "arch.json", "pictures.json", "metrics.jsonl", "validation.jsonl")
    estimate = "hwnas.estimate.training:of_training"
    checked = ("train",)
    trains = True

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Check the optimiser, the initial weights, and a named architecture against the
        data.
        """
        from hwnas.engine import check_optimizer

        config = experiment.train
        supernet = experiment.search.supernet
        check_optimizer(config.optimizer, "train.optimizer")

        is_proxy = supernet.proxy_width != 1.0 or supernet.proxy_depth is not None
        # An already trained super-net (``search.weights``) has settings of its own.
        trains_supernet = config.arch is None and experiment.search.weights is None
        if config.weights == "supernet" and is_proxy and trains_supernet:
            raise ConfigError(
                "train.weights = 'supernet' needs a super-net of full size, and"
                " search.supernet.proxy_width or proxy_depth makes it smaller: set train.weights ="
                " 'scratch'."
            )

        arch = None
        if config.arch is not None:
            arch = architecture(experiment, space, Path())
        if config.teacher is not None:
            from hwnas.train.teacher import Teacher

            Teacher(config, experiment.data)
        if config.augmentation.without_mosaic != AugmentationConfig():
            from hwnas.data.training_augmentation import TrainingAugmentation

            TrainingAugmentation(config.augmentation, experiment.data)
        if config.pretrained is not None:
            from hwnas.nn.pretrained import read_pretrained

            read_pretrained(config.pretrained, config.pretrained_model, "train.pretrained")
        if config.backbone is not None:
            if arch is not None:
                trained_backbone(config.backbone, arch)
            else:
                # The search has not chosen the blocks yet, so only the file can be checked.
                trained_weights(config.backbone, "train.backbone")

    @property
    def outputs(self) -> list[str]:
        """The weights, the result, and the files of the task."""
        return outputs(self.at.experiment)

    @property
    def searched(self) -> Path:
        """The file of the searched architecture."""
        return self.at.path("search", "arch.json")

    def architecture(self) -> Architecture:
        """The architecture to train. Raises ConfigError if it does not fit the data or the
        task.
        """
        return architecture(self.at.experiment, self.at.space, self.searched)

    def inputs(self) -> dict[str, str]:
        """Hashes of the architecture, the initial weights, the data and the settings, by
        name.
        """
        from hwnas.nn.checkpoint import load_network

        config = self.at.experiment.train
        inherited = self.at.path("search", "supernet.safetensors")
        files: dict[str, str] = {}
        if not config.arch:
            files |= self.at.hash_of(self.searched, "search")
        if config.weights == "supernet":
            files |= self.at.hash_of(inherited, "search")

        arch = self.architecture()
        if config.weights == "supernet":
            if arch != Architecture.load(self.searched):
                raise ConfigError(
                    "train.weights = 'supernet' only fits the searched architecture: set"
                    " train.weights = 'scratch'."
                )
            if load_network(inherited).arch.identity != arch.identity:
                raise ConfigError(
                    "train.weights = 'supernet' needs a super-net of full size, and this one was a"
                    " proxy: set train.weights = 'scratch'."
                )
        if config.teacher is not None:
            from hwnas.train.teacher import teacher_hashes

            files |= teacher_hashes(config.teacher, config.teacher_model)
        if config.pretrained is not None:
            from hwnas.nn.pretrained import pretrained_hashes

            model = config.pretrained_model
            files |= pretrained_hashes(config.pretrained, model, "train.pretrained")
        if config.backbone is not None:
            files["backbone"] = file_sha256(trained_backbone(config.backbone, arch))
        data = self.at.hashes_of_data("train", "test")
        settings = self.at.hashes_of_config("train", "seed", *task_of(self.at.experiment).tables)
        return {"architecture": arch.sha256, **files, **data, **settings}

    def summary(self) -> str:
        """The architecture, the number of epochs, and the initial weights."""
        config = self.at.experiment.train
        arch = config.arch or "the searched architecture"
        weights = config.pretrained or config.backbone or config.weights
        return f"{arch} for {config.epochs:g} epochs, weights from {weights}"

    def run(self, ctx: StageContext) -> None:
        """Train the architecture."""
        from hwnas.train.training import run

        run(ctx, self.architecture())
