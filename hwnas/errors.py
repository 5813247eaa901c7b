"""The errors of hwnas, and the exit code of each.

Every message is one sentence that names the offending value and the fix; the command
line prints it without a traceback. Broken internal invariants are ``assert``, and those
do show a traceback.
"""

from __future__ import annotations


class HwnasError(Exception):
    """Any error that hwnas reports to the user. ``exit_code`` is the exit code of the
    command.
    """

    exit_code = 1


class UserError(HwnasError, ValueError):
    """Input that the user can correct: a value, a name, a file."""

    exit_code = 2


class ConfigError(UserError):
    """An experiment configuration that does not parse, or that names something unknown."""


class DocumentError(UserError):
    """A document (space, table, architecture, ...) that is corrupt, truncated or has
    another schema.
    """


class SpaceError(UserError):
    """A search space, picks or an architecture that do not fit together."""


class TableError(UserError):
    """A latency table that cannot be used: no calibration, another space."""


class CoverageError(TableError):
    """A table that lacks ops. ``missing`` holds the keys of those ops."""

    def __init__(self, message: str, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class TargetError(UserError):
    """A latency target or another limit that no architecture of the space meets."""


class DataError(UserError):
    """Images or labels that are missing or cannot be decoded."""


class UnreadableImageError(DataError):
    """An image that does not decode. ``image`` is its path relative to ``data.path``, as
    in ``data.skip``.
    """

    def __init__(self, message: str, image: str) -> None:
        super().__init__(message)
        self.image = image

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        # loader processes send it to the training process, and pickle calls __init__
        return type(self), (str(self), self.image)


class DataProblemsError(DataError):
    """Everything that is wrong with a data set. ``unreadable`` maps images that do not
    decode to the reasons; see ``UnreadableImageError.image``.
    """

    def __init__(self, message: str, unreadable: dict[str, str]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


class CheckpointError(UserError):
    """A checkpoint that is corrupt or belongs to something else."""


class ResourceError(UserError):
    """A machine that refuses what the settings need: memory, processes, open files."""


class StorageError(UserError):
    """A file that cannot be written: full disk, read-only folder."""


class DivergenceError(HwnasError):
    """A training whose loss is no longer finite."""


class ExportError(HwnasError):
    """A network that the converter of a runtime refuses."""


class DeviceError(HwnasError):
    """A device, or its runtime, that cannot be used at the moment."""

    exit_code = 3
