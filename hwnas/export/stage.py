"""The export stage: turns a trained network into a bundle."""

from __future__ import annotations

from hwnas.devices.device import HOST, connect
from hwnas.export.bundle import PARITY_FILE
from hwnas.export.metadata import LABELS_FILE
from hwnas.export.target import target
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import task_of


def outputs(formats: tuple[str, ...]) -> list[str]:
    """The files that the stage writes."""
    return ["bundle.json", PARITY_FILE, LABELS_FILE, *(target(kind).file for kind in formats)]


class Export(Stage):
    """Writes the trained network's files, and compares each with PyTorch on this computer."""

    name = "export"
    result = "bundle.json"
    reported = ("bundle.json",)
    estimate = "hwnas.estimate.exporting:of_export"

    @property
    def outputs(self) -> list[str]:
        """The bundle's files."""
        return outputs(self.at.experiment.export_formats)

    def inputs(self) -> dict[str, str]:
        """The weights, the data and the settings."""
        trained = self.at.hash_of(self.at.path("train", "model.safetensors"), "train")
        sections = ("export", *task_of(self.at.experiment).tables)
        data = self.at.hashes_of_data("train", "test")
        return {**trained, **data, **self.at.hashes_of_config(*sections)}

    def check_ready(self) -> None:
        """Raise CheckpointError if the trained network is damaged."""
        from hwnas.nn.checkpoint import load_network

        load_network(self.at.path("train", "model.safetensors"))

    def summary(self) -> str:
        """The exported formats."""
        return ", ".join(self.at.experiment.export_formats)

    def run(self, ctx: StageContext) -> None:
        """Export the network, and run the files on this computer."""
        from hwnas.export.exporting import run

        run(ctx, connect(HOST).predict)
