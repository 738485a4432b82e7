"""Files that survive a power cut: complete under their name, or not there; and what tells that one has changed since."""

import hashlib
import os
from pathlib import Path


def settle(partial: Path, path: Path) -> None:
    """Give a complete file or folder its name. Its content and its name are on disk when this returns."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def checksum(path: Path) -> str:
    """SHA-256 of a file, read by the megabyte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
