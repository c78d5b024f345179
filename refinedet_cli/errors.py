"""Errors a user can cause, each with the exit code that scripts may rely on."""

from __future__ import annotations


class RefineDetError(Exception):
    """A user's mistake or a circumstance, told in one line with its cure.

    Args:
        message: what is wrong and where: the file, the option or the value.
        hint: how to mend it; may be left out where the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RefineDetError):
    """Options that are malformed or do not go together."""

    exit_code = 2


class ConfigError(RefineDetError):
    """A preset, run file or setting that does not exist or is out of range."""

    exit_code = 3


class DataError(RefineDetError):
    """Pictures or annotations that are missing, unreadable or contradictory."""

    exit_code = 4


class CheckpointError(RefineDetError):
    """Weights that are missing, damaged or made for something else."""

    exit_code = 5


class DeviceError(RefineDetError):
    """A device that is absent or out of memory."""

    exit_code = 6


class GateError(RefineDetError):
    """A required figure was not reached."""

    exit_code = 7


class PartialError(RefineDetError):
    """Some of the work was done and some could not be."""

    exit_code = 8


class ToldElsewhere(RefineDetError):
    """Another process of the same command tells what went wrong; this one ends with its exit code and says nothing."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
