"""Errors that somebody catches. The launcher prints their one line without a traceback."""


def first_line(error: BaseException) -> str:
    """What an exception says, in a line: its first that is not blank, or else the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def raised_in(error: BaseException) -> str:
    """Which worker raised it and in which process, of an error that came from another one; else empty."""
    notes = getattr(error, "__notes__", None) or [""]
    return notes[0].partition("\n")[0].removesuffix(":")


class RlinfError(Exception):
    """Something that the user can mend; the message names the thing and the remedy."""


class ConfigError(RlinfError):
    """The configuration is wrong; the message lists every problem."""


class MissingDependency(RlinfError):
    """An optional package, simulator or device is not there; the message holds the command that mends it."""


class CheckpointError(RlinfError):
    """A checkpoint or buffer on disk is missing, foreign, incomplete or does not fit the configuration."""


class DataError(RlinfError):
    """Recorded data (demonstrations, data sets) are missing, empty or corrupt."""


class ShapeError(RlinfError, ValueError):
    """An array has another shape than its contract says."""


class NonFiniteError(RlinfError):
    """NaN or infinity where a number was expected; names the quantity and where it came from."""


class RunEnding(RlinfError):
    """The run was asked to end while an environment waited for something outside of it: a robot, a camera, a person."""


class WorkerDied(RlinfError):
    """A process or thread of the run ended or stopped answering; names it and its last words."""


class ProcessDied(WorkerDied):
    """Process number `process` of the run ended by itself or was killed."""

    def __init__(self, message: str, process: int) -> None:
        super().__init__(message)
        self.process = process
