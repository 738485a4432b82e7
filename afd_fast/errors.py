"""Errors whose message tells the user what to change. The command prints them as one line and exits with `exit_code`."""


class AFDError(Exception):
    """An error with a remedy in its message. Everything saved before it is valid."""

    exit_code = 1


class ConfigError(AFDError, ValueError):
    """A setting, a file or a command that the user has to change; nothing was started."""

    exit_code = 2


class VideoError(AFDError, ValueError):
    """A file or tensor that holds no usable video; the message names it."""


class TeacherError(AFDError, RuntimeError):
    """The teacher's requests had to stop; everything paid for is on record and the same command continues."""


class TrainingError(AFDError, RuntimeError):
    """Training stopped for the reason the message gives; the last checkpoint is valid."""


class CheckpointError(AFDError, RuntimeError):
    """A checkpoint that could not be written or read; the message says what is still valid."""


class ToolError(ConfigError):
    """An official evaluation tool that did not do its work; the message names its log."""


class Interrupted(AFDError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved itself."""

    exit_code = 130
