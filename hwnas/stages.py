"""What a stage is, and the run folder that it works in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from hwnas.config import Experiment
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data import fingerprint
from hwnas.document import content_sha256, file_sha256
from hwnas.errors import UserError
from hwnas.runs import StageContext
from hwnas.task import task_of

STAGES = {
    "profile": "hwnas.profile.stage:Profile",
    "search": "hwnas.search.stage:Search",
    "train": "hwnas.train.stage:Train",
    "export": "hwnas.export.stage:Export",
    "validate": "hwnas.validate.stage:Validate",
    "report": "hwnas.report.stage:Report",
}
"""The stages in order, each imported when it is asked for: most commands need one."""


def configured_table(table: str) -> Path:
    """The file of ``search.table``. Raises UserError where there is none."""
    path = Path(table).expanduser()
    if not path.is_file():
        raise UserError(f"search.table = {table!r} does not exist: check the path.")
    return path


@dataclass(frozen=True)
class RunFolder:
    """An experiment, its space and its folder ``root``: what a stage reads, and the hashes of it.

    Hashes are dicts of a name and a sha256, as a stage's manifest has them.
    """

    experiment: Experiment
    space: SearchSpace
    root: Path

    def path(self, stage: str, name: str) -> Path:
        """A file of a stage."""
        return self.root / stage / name

    @property
    def table_path(self) -> Path:
        """The table that prices the search: the configured one, else the profiled one."""
        table = self.experiment.search.table
        return Path(table).expanduser() if table is not None else self.path("profile", "table.json")

    def table(self) -> LatencyTable:
        """The table that prices the search."""
        return LatencyTable.load(self.table_path)

    def hash_of(self, path: Path, made_by: str) -> dict[str, str]:
        """Of a file that a stage has to have made. Raises UserError where it is not there."""
        if not path.is_file():
            raise UserError(
                f"{path} does not exist yet: run 'hwnas {made_by}' with the same --out first, or"
                " 'hwnas run'."
            )
        return {path.name: file_sha256(path)}

    def hash_of_table(self) -> dict[str, str]:
        """Of the table that prices the search. Raises UserError where there is none."""
        if self.experiment.search.table is not None:
            configured_table(self.experiment.search.table)
        return self.hash_of(self.table_path, "profile")

    def hashes_of_config(self, *sections: str) -> dict[str, str]:
        """Of tables of the configuration, by name."""
        content = self.experiment.model_dump(mode="json", by_alias=True)
        return {section: content_sha256(content[section]) for section in sections}

    def hashes_of_data(self) -> dict[str, str]:
        """Of the images and of how they are shaped."""
        data = self.experiment.data
        found = {**self.hashes_of_config("data"), "images": fingerprint(data)}
        if data.name == "folder" and data.augment != "imagenet":
            # These were evaluated on a centre crop, whatever they were trained on: what
            # was found out that way does not stand.
            found["geometry"] = content_sha256(data.resize_mode)
        return found

    def check_searchable(self) -> None:
        """Raise SpaceError or ConfigError where the space has no networks of the task,
        as it may where an architecture is named.
        """
        train = self.experiment.train.model_copy(update={"arch": None})
        task_of(self.experiment).space(
            self.space, self.experiment.model_copy(update={"train": train})
        )


class Stage(ABC):
    """A stage of one experiment: what it reads, what it writes, and how it is done.

    It reads documents, writes its own folder, and imports no other stage.
    """

    name: ClassVar[str]
    result: ClassVar[str]
    """The file that its verb prints."""
    reported: ClassVar[tuple[str, ...]] = ()
    """Its files that the report shows, if they are there. Without the first one, the
    stage has not finished.
    """
    estimate: ClassVar[str | None] = None
    """``module:function`` that times it for ``hwnas run --plan``. It lies above the
    stages, and is imported when it is asked for.
    """
    checked: ClassVar[tuple[str, ...]] = ()
    """The stages whose settings are checked before this one begins on its own."""
    trains: ClassVar[bool] = False
    """Whether it trains a network, so that all splits of the data are checked before."""
    holds_out: ClassVar[bool] = False
    """Whether it leaves some of them out of the training."""

    def __init__(self, at: RunFolder) -> None:
        self.at = at

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """Whether ``hwnas run`` goes through it."""
        del experiment
        return True

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Raise UserError, in one sentence, where its settings cannot work, whatever
        earlier stages leave it. Images are not opened.
        """
        del experiment, space

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """The files that it writes into its folder."""

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """The hashes of all that it depends on, by name.

        Also refuses what the stage cannot work with, before anything earlier is set
        aside. Raises HwnasError.
        """

    @abstractmethod
    def summary(self) -> str:
        """What it would do, in words."""

    @abstractmethod
    def run(self, ctx: StageContext) -> None:
        """Do it in ``ctx.folder``, or go on with what a kill has left there."""


def stage_class(name: str) -> type[Stage]:
    """The class of a stage."""
    found: type[Stage] = imported(STAGES[name])
    return found


def imported(reference: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
