"""What can go wrong, and the exit code it ends in.

Every message is one sentence that names the offending value and the fix; the command
line prints it without a traceback. Our own broken invariants are ``assert`` and do show
one.
"""


class HwnasError(Exception):
    """Anything hwnas reports to a person. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UserError(HwnasError, ValueError):
    """Input that the user can correct: a value, a name, a file."""

    exit_code = 2


class ConfigError(UserError):
    """An experiment configuration that does not parse, or names what does not exist."""


class DocumentError(UserError):
    """A document (space, table, architecture, ...) that is corrupt, truncated or of
    another schema.
    """


class SpaceError(UserError):
    """A search space, picks or an architecture that contradict each other."""


class TableError(UserError):
    """A latency table that cannot serve: no calibration, another space."""


class CoverageError(TableError):
    """A table that lacks ops. ``missing`` holds their keys."""

    def __init__(self, message: str, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class TargetError(UserError):
    """A latency target or another limit that no architecture of the space meets."""


class DataError(UserError):
    """Images or labels that are missing, or that do not decode."""


class CheckpointError(UserError):
    """A checkpoint that is corrupt or belongs to something else."""


class StorageError(UserError):
    """A file that cannot be written: full disk, read-only folder."""


class DivergenceError(HwnasError):
    """A training whose loss is no longer finite."""


class ExportError(HwnasError):
    """A network that a runtime's converter refuses."""


class DeviceError(HwnasError):
    """A device, or its runtime, that cannot be used right now."""

    exit_code = 3
