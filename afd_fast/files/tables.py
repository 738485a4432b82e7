"""CSV tables in and out, and the files that a folder's list names."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afd_fast.errors import ConfigError
from afd_fast.files.text import read_text

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins so


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, escape: bool = True) -> None:
    """Write a table with a header; the file appears complete or not at all. Text that a spreadsheet would run as a formula
    gets an apostrophe in front, which `read_csv` takes away. escape: False for the tables that other programs read."""

    def cell(value: Any) -> Any:
        return f"'{value}" if escape and isinstance(value, str) and value.lstrip("'").startswith(FORMULA) else value

    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *([cell(value) for value in row] for row in rows)])
    partial.replace(path)


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a table. Raises ConfigError unless the file exists and has these columns, and a cell in each of them."""

    def cell(value: str) -> str:
        return value[1:] if value.startswith("'") and value.lstrip("'").startswith(FORMULA) else value

    if not path.is_file():
        raise ConfigError(f"{path} is not there")
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        columns, found = list(columns), reader.fieldnames or ()
        if absent := set(columns) - set(found):
            names = ", ".join(name if name == name.strip() else repr(name) for name in found) or "none"
            raise ConfigError(
                f"{path} has no column {', '.join(sorted(absent))}; it has {names}: begin it with the line {','.join(columns)}, and put "
                "a comma between the cells, without a space"
            )
        rows: list[dict[str, str]] = []
        for row in reader:
            if None in row or None in row.values():
                more = " (write a cell that holds a comma in double quotes)" if None in row else ""
                raise ConfigError(
                    f"{path}: line {reader.line_num} has {'more' if more else 'fewer'} cells than the header: correct it{more}"
                )
            rows.append({name: cell(value) for name, value in row.items()})
        return rows
    except csv.Error as error:
        raise ConfigError(f"{path} is not a CSV file: {error}; save it again") from None


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a list in the folder names. ConfigError if it leads out of the folder, by itself or by a link."""
    path = folder / name
    try:
        held = path.resolve().is_relative_to(folder.resolve()) and ".." not in Path(name).parts
    except (OSError, ValueError, RuntimeError):  # a NUL, a circle of links
        held = False
    if not held or Path(name).is_absolute():
        raise ConfigError(
            f"{name!r} leads out of {folder}: copy the file into the folder and name it by its relative path"
        )
    return path
