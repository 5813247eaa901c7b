"""The validation stage: from a bundle, a table and a device to a verdict."""

from __future__ import annotations

from pathlib import Path

from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.devices.device import connect, find_device
from hwnas.document import content_sha256
from hwnas.export.bundle import PARITY_FILE, Bundle
from hwnas.export.timing import bench_of
from hwnas.runs import StageContext
from hwnas.search.result import SearchResult
from hwnas.stages import Stage
from hwnas.task import task_of
from hwnas.train.result import TrainResult
from hwnas.validate.exported import load_bundle
from hwnas.verdict import lines


class Validate(Stage):
    """Runs the exported files on the device and checks them against PyTorch and the
    table's prediction."""

    name = "validate"
    result = "verdict.json"
    reported = ("verdict.json",)
    estimate = "hwnas.estimate.measuring:of_validation"
    outputs = ["verdict.json"]

    @property
    def bundle_folder(self) -> Path:
        """The folder of the bundle to validate."""
        return self.at.root / "export"

    def inputs(self) -> dict[str, str]:
        """The bundle, the table if there is one, the data, the settings, and the
        warnings of earlier stages.
        """
        run = self.at
        table = run.hash_of_table() if run.table_path.exists() else {}
        hashes = run.hash_of(self.bundle_folder / "bundle.json", "export")
        bundle = Bundle.load(self.bundle_folder / "bundle.json")
        # a file that was damaged since is not up to date
        for name in (*(file.name for file in bundle.files), PARITY_FILE):
            hashes |= run.hash_of(self.bundle_folder / name, "export")
        hashes |= {
            **table,
            **run.hashes_of_data("test"),
            **run.hashes_of_config("validate", "device"),
            "device.json": find_device(run.experiment.device.name).sha256,
        }
        cautions = [caution.model_dump() for caution in self.cautions()]
        # Verdicts are older than warnings: without any, the hashes stay as they were,
        # so that an older verdict is still up to date.
        if cautions:
            hashes["warnings"] = content_sha256(cautions)
        return hashes

    def check_ready(self) -> None:
        """Raise DeviceError if the device cannot be reached or has no runtime, and
        DocumentError if the bundle is damaged.
        """
        load_bundle(self.bundle_folder)
        connect(find_device(self.at.experiment.device.name)).runtimes()

    def cautions(self) -> tuple[Caution, ...]:
        """The warnings from the search and the training of the exported network."""
        arch = Bundle.load(self.bundle_folder / "bundle.json").architecture
        searched = self.at.path("search", "arch.json")
        search = self.at.path("search", "search.json")
        train = self.at.path("train", "train.json")
        cautions: list[Caution] = []
        # an earlier search may have found another network than the one exported
        if searched.is_file() and search.is_file() and Architecture.load(searched) == arch:
            learning = SearchResult.load(search).learning
            if learning is not None:
                cautions += learning.cautions
        if train.is_file():
            result = TrainResult.load(train)
            if result.architecture_sha256 == arch.sha256 and result.caution is not None:
                cautions.append(result.caution)
        return tuple(cautions)

    def summary(self) -> str:
        """The tolerances."""
        experiment = self.at.experiment
        config = experiment.validation
        task = task_of(experiment)
        quality = f"{task.words.metric} within {config.tolerance(task.metric, 'int8'):.1%}"
        latency = f"latency within {config.latency_tolerance:.0%} of predicted"
        profiled = experiment.search.by_table and experiment.train.arch is None
        has_table = experiment.search.table is not None or self.at.table_path.exists()
        if not profiled and not has_table:
            latency = "latency measured but not checked, as no table predicts it"
        return f"{latency}, int8 {quality} of PyTorch"

    def run(self, ctx: StageContext) -> None:
        """Write ``verdict.json``."""
        from hwnas.validate.validating import validate

        experiment = self.at.experiment
        table = self.at.table() if self.at.table_path.exists() else None
        bench = bench_of(experiment.device, ctx.folder, ctx.progress)
        verdict = validate(bench, self.bundle_folder, experiment.data, experiment.validation, table)
        verdict = verdict.model_copy(update={"warnings": self.cautions()})
        verdict.save(ctx.folder / "verdict.json")
        for line in lines(verdict):
            ctx.progress.info(line)
