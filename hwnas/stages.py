"""What a stage is, and the run folder that it works in."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from hwnas.config import Experiment
from hwnas.config.decisive import settings_sha256
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data.fingerprint import Part, fingerprint
from hwnas.document import file_sha256, user_path
from hwnas.errors import UserError
from hwnas.runs import StageContext, recorded_output
from hwnas.task import task_of

STAGES = {
    "profile": "hwnas.profile.stage:Profile",
    "search": "hwnas.search.stage:Search",
    "train": "hwnas.train.stage:Train",
    "export": "hwnas.export.stage:Export",
    "validate": "hwnas.validate.stage:Validate",
    "report": "hwnas.report.stage:Report",
}
"""The stages in order. Each is imported only when used, because most commands need one."""


def configured_table(table: str) -> Path:
    """The path of ``search.table``. Raises UserError if the file does not exist."""
    path = user_path(table, "search.table")
    if path.is_dir():
        raise UserError(
            f"search.table = {table!r} is a folder: name the table in it, for instance"
            f" {str(path / 'profile' / 'table.json')!r} of a run."
        )
    if not path.is_file():
        raise UserError(f"search.table = {table!r} does not exist: check the path.")
    return path


@dataclass(frozen=True)
class RunFolder:
    """An experiment, its space and its folder ``root``: what a stage reads, and the
    hashes of it.

    Hashes are dicts from a name to a sha256, as in the manifest of a stage.
    ``same_as`` maps fingerprints of images to those from before some images were left
    out (see ``hwnas/unreadable.py``).
    """

    experiment: Experiment
    space: SearchSpace
    root: Path
    same_as: Mapping[str, str] = field(default_factory=dict)

    def path(self, stage: str, name: str) -> Path:
        """The path of a stage's file."""
        return self.root / stage / name

    @property
    def table_path(self) -> Path:
        """The table of the search: the configured one, else the profiled one."""
        table = self.experiment.search.table
        if table is not None:
            return user_path(table, "search.table")
        return self.path("profile", "table.json")

    def table(self) -> LatencyTable:
        """The table of the search, loaded."""
        return LatencyTable.load(self.table_path)

    def hash_of(self, path: Path, made_by: str) -> dict[str, str]:
        """The hash of a file that the stage ``made_by`` writes. Raises UserError if it
        does not exist.
        """
        if not path.is_file():
            raise UserError(
                f"{path} does not exist yet: run 'hwnas {made_by}' with the same --out first, or"
                " 'hwnas run'."
            )
        digest = file_sha256(path)
        if recorded_output(path) not in (None, digest):
            warnings.warn(
                f"{path} is not the file that 'hwnas {made_by}' wrote: if it was not replaced on"
                f" purpose, it is damaged; run 'hwnas {made_by}' again.",
                stacklevel=2,
            )
        return {path.name: digest}

    def hash_of_table(self) -> dict[str, str]:
        """The hash of the table of the search. Raises UserError if it does not exist."""
        if self.experiment.search.table is not None:
            configured_table(self.experiment.search.table)
        return {"table": self.hash_of(self.table_path, "profile")[self.table_path.name]}

    def hashes_of_config(self, *sections: str) -> dict[str, str]:
        """The hashes of the settings in tables of the configuration that decide results,
        by the name of the table.
        """
        return {section: settings_sha256(self.experiment, section) for section in sections}

    def hashes_of_data(self, *parts: Part) -> dict[str, str]:
        """The hashes of the preprocessing, and of the images of ``parts``.

        Images that the run has left out since it began do not count as changed.
        """
        data = self.experiment.data
        # only a search, which reads nothing but training images, holds some of them out
        ignored = () if parts == ("train",) else ("held_out",)
        hashes = {"data": settings_sha256(self.experiment, "data", *ignored)}
        for part in parts:
            digest = fingerprint(data, part)
            hashes[f"{part} images"] = self.same_as.get(digest, digest)
        return hashes

    def check_searchable(self) -> None:
        """Raise SpaceError or ConfigError if the space has no networks of the task.
        That is allowed only if ``train.arch`` names an architecture.
        """
        train = self.experiment.train.model_copy(update={"arch": None})
        task_of(self.experiment).space(
            self.space, self.experiment.model_copy(update={"train": train})
        )


class Stage(ABC):
    """A stage of one experiment: what it reads, what it writes, and how it runs.

    A stage reads documents, writes into its own folder, and imports no other stage.
    """

    name: ClassVar[str]
    result: ClassVar[str]
    """The file that its command prints."""
    reported: ClassVar[tuple[str, ...]] = ()
    """Its files that the report shows if they exist. The stage has finished if the
    first one exists.
    """
    estimate: ClassVar[str | None] = None
    """``module:function`` that estimates its time for ``hwnas run --plan``. The module
    imports the stages, and so is itself imported only when used.
    """
    checked: ClassVar[tuple[str, ...]] = ()
    """The stages whose settings are checked before this one starts on its own."""
    trains: ClassVar[bool] = False
    """Whether it trains a network; all splits of the data are then checked before it
    starts.
    """
    runs_networks: ClassVar[bool] = True
    """Whether it trains, evaluates or times networks. One that does not works without
    importing PyTorch.
    """
    holds_out: ClassVar[bool] = False
    """Whether it holds out a part of the training images."""

    def __init__(self, at: RunFolder) -> None:
        self.at = at

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """Whether ``hwnas run`` runs this stage."""
        del experiment
        return True

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Raise UserError, in one sentence, if its settings cannot work, whatever the
        results of earlier stages are. Images are not opened.
        """
        del experiment, space

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """The files that it writes into its folder."""

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """The hashes of everything it depends on, by name.

        Raises HwnasError if the stage cannot work with its inputs; this happens before
        any earlier results are moved aside.
        """

    def check_ready(self) -> None:  # noqa: B027 - most stages have nothing to check
        """Raise HwnasError if the stage could not start now: its device is out of reach,
        or a file that it reads is damaged. Called only if the stage is not up to date,
        and before any earlier results are moved aside.
        """

    @abstractmethod
    def summary(self) -> str:
        """What it would do, in words."""

    @abstractmethod
    def run(self, ctx: StageContext) -> None:
        """Run in ``ctx.folder``, or resume from the files that an interrupted run left
        there.
        """


def stage_class(name: str) -> type[Stage]:
    """The class of a stage."""
    stage: type[Stage] = imported(STAGES[name])
    return stage


def imported(reference: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
