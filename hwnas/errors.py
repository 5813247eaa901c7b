"""The errors of hwnas, and the exit code of each.

Every message is one sentence that names the offending value and the fix; the command
line prints it without a traceback. Broken internal invariants are ``assert``, and those
do show a traceback.
"""


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


class CheckpointError(UserError):
    """A checkpoint that is corrupt or belongs to something else."""


class StorageError(UserError):
    """A file that cannot be written: full disk, read-only folder."""


class DivergenceError(HwnasError):
    """A training whose loss is no longer finite."""


class ExportError(HwnasError):
    """A network that the converter of a runtime refuses."""


class DeviceError(HwnasError):
    """A device, or its runtime, that cannot be used at the moment."""

    exit_code = 3
