"""Errors whose message tells the user what to change. The command prints them as one line and exits with `exit_code`.

`check_fields` raises the first of them for a setting of the wrong type, `extra` one for a package that is not installed.
"""

import contextlib
import importlib.util
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


class AFDError(Exception):
    """An error with a remedy in its message. Everything saved before it is valid."""

    exit_code = 1


class ConfigError(AFDError, ValueError):
    """A setting, a file or a command that the user has to change; nothing was started."""

    exit_code = 2


class MissingFileError(FileNotFoundError, ConfigError):
    """A file, folder or repository that a checkpoint needs and that is not there; the message names it."""


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


_DEMO = ("PIL", "jinja2", "matplotlib", "peft", "pymunk", "rich", "safetensors", "tensorboard", "av", "typer")
_EVAL = ("av", "diffusers", "ftfy", "huggingface_hub", "peft", "rich", "safetensors", "transformers", "typer")
EXTRAS = {  # extra of pyproject.toml -> the modules that it brings
    "demo": _DEMO,
    "eval": _EVAL,
    "train": tuple(sorted({*_DEMO, *_EVAL, "httpx"})),
    "wandb": ("wandb",),
}


def not_installed(name: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]


class MissingExtra(AFDError, ImportError):
    """`who` needs the `module` that an extra of this library brings, and it is not installed."""

    exit_code = 2

    def __init__(self, who: str, name: str, module: str) -> None:
        lacking = {module, *not_installed(name)}
        missing = [m for m in EXTRAS[name] if m in lacking]
        super().__init__(
            f"{who} needs the extra [{name}]: pip install 'afd-fast[{name}]' (missing: {', '.join(missing)})"
        )
        self.module = module


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that the extra `name` brings: MissingExtra for one that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[name]:
            raise
        raise MissingExtra("this part of afd_fast", name, module) from None


def field_types(settings: type) -> dict[str, Any]:
    """The type of every field of a dataclass that its caller sets."""
    kinds = typing.get_type_hints(settings)
    return {f.name: kinds[f.name] for f in fields(settings) if f.init}


def in_words(kind: Any) -> str:
    """A field's type as a user would say it."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(in_words(option) for option in options)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f'"{option}"' for option in options)
    if typing.get_origin(kind) is tuple:
        return "numbers with commas between them" if Ellipsis in options else "two numbers"
    if is_dataclass(kind):
        return f"a {getattr(kind, '__name__', kind)}"
    words = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        types.NoneType: "none",
    }
    return words[kind]


def _is_a(value: object, kind: Any) -> bool:
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_is_a(value, option) for option in options)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in options
    if typing.get_origin(kind) is tuple:
        length = Ellipsis in options or (isinstance(value, tuple) and len(value) == len(options))
        return isinstance(value, tuple) and length and all(_is_a(item, options[0]) for item in value)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_fields(settings: Any) -> None:
    """ConfigError unless every field of a dataclass holds its declared type, numbers finite. Lists become tuples, and
    numbers of NumPy and tensors of one Python's, which JSON takes."""
    for name, kind in field_types(type(settings)).items():
        given = getattr(settings, name)
        scalar = isinstance(given, np.generic) or (getattr(given, "ndim", None) == 0 and hasattr(given, "item"))
        value = tuple(given) if isinstance(given, list) else given.item() if scalar else given
        if not _is_a(value, kind):
            raise ConfigError(f"{name} must be {in_words(kind)}, got {given!r}")
        object.__setattr__(settings, name, value)


def some(reasons: Iterable[str], shown: int = 5) -> str:
    """Reasons as one line, of many the first few."""
    found = list(reasons)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return "; ".join(found[:shown]) + more


def check_at_least(settings: Any, minimum: float, *names: str) -> None:
    """ConfigError for a field below the minimum; None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {value}")
