"""Files of checkpoints: from the disk or the Hugging Face Hub, with errors of one line that name the file.

Pickles are read with weights_only=True, which refuses those that carry code.
"""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from afd_fast.errors import ConfigError, MissingFileError, extra

# suffixes of files; the name of a repository has none of them
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for errors of one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_source(source: str | Path) -> None:
    """Raises MissingFileError unless `source` exists or can be the name of a repository. In a folder that exists here
    it is a path, though it looks like owner/name."""
    path, name = Path(source), str(source)
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise ConfigError(f"{name} is neither a file nor a folder: check the path")
    if isinstance(source, Path) or path.suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise MissingFileError(
            f"{name} is neither a file, a folder nor an owner/name repository: check the path (docs/models.md says where checkpoints "
            "are downloaded)"
        )
    if path.parent.exists():
        raise MissingFileError(f"{name} is missing in the folder {path.parent}: check the path")


def check_named(key: str, name: str, known: Collection[str]) -> None:
    """`check_source` of `key=name`, unless it is one of the known names, which the error lists too."""
    if name in known:
        return
    try:
        check_source(name)
    except MissingFileError as error:
        raise MissingFileError(f"{key}={name} is none of {', '.join(sorted(known))}, and {error}") from None


@contextlib.contextmanager
def loading(what: str, source: str | Path) -> Iterator[None]:
    """Around a `from_pretrained`: its errors become a ConfigError of one line that names the folder or repository."""
    check_source(source)
    try:
        yield
    except Exception as error:  # transformers, diffusers and tokenizers raise many types
        mend = "the repository's name, your access to it and the network"
        if Path(source).exists():
            mend = "that it is complete, and what was meant"
        raise ConfigError(
            f"{source} has no {what} that can be loaded ({type(error).__name__}: {first_line(error)}): check {mend}"
        ) from error


def local_copy(source: str | Path, patterns: list[str] | None = None) -> Path:
    """The file or folder `source`, or a snapshot of the Hugging Face repository owner/name (only files of `patterns`).

    Paths are never downloaded: names with a suffix of a checkpoint file, a leading dot or slash, more than one slash, or an
    existing folder before the slash.
    Raises MissingFileError that names the source in one line.
    """
    path, name = Path(source), str(source)
    check_source(source)
    if path.exists():
        return path
    with extra("train"):
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of httpx, OSError or ValueError, depending on the version of the hub
        raise MissingFileError(
            f"{name} is neither a local file nor a folder, and the Hugging Face repository {name} could not be downloaded "
            f"({type(error).__name__}: {first_line(error)}): check the name, your access to it and the network"
        ) from None


def check_sums(path: Path) -> None:
    """Raises BadZipFile when a file of torch.save has changed since it was written: torch.load ignores its checksums."""
    with path.open("rb") as start:
        if start.read(2) != b"PK":  # the old format, which has none
            return
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} has changed since it was written")


def read_tensors(path: Path) -> Any:
    """Contents of a checkpoint file, on the CPU. Raises ConfigError for a damaged file and for one that could run code."""
    if not path.is_file():
        raise MissingFileError(f"{path} is not a file: check the path")
    if path.suffix == ".safetensors":
        with extra("train"):
            from safetensors.torch import load_file
        with _reading(path):
            return load_file(path)
    with _reading(path):
        check_sums(path)
        return _unpickled(path)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint file, those of its groups included, without reading their numbers. Errors of `read_tensors`."""
    if path.suffix == ".safetensors":
        with extra("train"):
            from safetensors import safe_open
        with _reading(path), safe_open(path, "pt") as file:
            return list(file.keys())
    with _reading(path):
        return list(_names(_unpickled(path)))


def _names(contents: Any, before: str = "") -> Iterator[str]:
    for key, value in contents.items() if isinstance(contents, dict) else ():
        yield from _names(value, f"{before}{key}.") if isinstance(value, dict) else [f"{before}{key}"]


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the old format, which is not a zip file, has no mmap
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of torch and safetensors become a ConfigError of one line that names the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{path} is not a plain file of tensors: refused, since loading it could run code ({reason})"
        ) from None
    except Exception as error:  # torch and safetensors raise many types for damaged files
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({reason}): check that the file is complete"
        ) from None
