"""Text files from users: one reader for prompts, lists and JSON, whichever editor saved them."""

import json
from pathlib import Path
from typing import Any

from afd_fast.errors import ConfigError


def check_folder(path: Path, give: str) -> None:
    """ConfigError unless the path is a folder. give: the folder that the user has to give."""
    if not path.is_dir():
        raise ConfigError(f"{path} is {'a file' if path.exists() else 'not there'}: give {give}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark; line ends as they are. ConfigError names file, line and byte."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file: check the path")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not text in UTF-8 (byte 0x{data[error.start]:02x} in line {line}): save it as UTF-8"
        ) from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line. A line ends with LF or CR LF, not with the other separators of Unicode.
    ConfigError without any."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file, so it holds no prompt: give a text file with at least one prompt")
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no prompt: write at least one prompt, one per line")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ConfigError for anything else."""
    text = read_text(path)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore the file") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} holds a {type(contents).__name__}, expected a JSON object: restore the file")
    return contents
