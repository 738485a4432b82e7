"""Files that survive a power cut: complete under their name, or not there."""

import os
from pathlib import Path


def settle(partial: Path, path: Path) -> None:
    """Give a complete file its name. Its content and its name are on disk when this returns."""
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
