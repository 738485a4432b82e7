"""What an mp4 file says of its own length, from its boxes (ISO/IEC 14496-12)."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from afd_fast.errors import VideoError

UNKNOWN = (2**32 - 1, 2**64 - 1)  # durations that a live encoder leaves open


class Box(NamedTuple):
    """A box: its name, and where its content starts and ends in the file."""

    name: bytes
    start: int
    end: int


def fragments_seconds(path: Path) -> float | None:
    """Seconds that the header of a fragmented file promises, 0 where it leaves them open; None for other files.

    Raises VideoError where a box is cut off, or where an index names bytes behind the end of the file.
    """
    size, seconds, fragmented = path.stat().st_size, 0.0, False
    with path.open("rb") as file:
        for box in _boxes(file, 0, size):
            fragmented |= box.name == b"moof"
            if box.name == b"moov":
                seconds = _seconds(file, box)
            last = _indexed(file, box) if box.name == b"sidx" else box.end
            if last > size:
                raise VideoError(f"{path}: ends in the middle of a box, or lacks some that its index lists")
    return seconds if fragmented else None


def _boxes(file: IO[bytes], start: int, end: int) -> Iterator[Box]:
    while start < end:
        file.seek(start)
        head = file.read(16)
        length, name = struct.unpack(">I4s", head[:8]) if len(head) >= 8 else (16, b"")
        content = 8
        if length == 1 and len(head) == 16:
            (length,), content = struct.unpack(">Q", head[8:]), 16
        length = length or end - start  # 0: up to the end
        yield Box(name, start + content, start + max(length, content))
        start += max(length, content)


def _read(file: IO[bytes], box: Box) -> tuple[int, bytes]:
    """The version of a box and its content. Boxes of the header and indices are small."""
    file.seek(box.start)
    content = file.read(min(box.end - box.start, 1 << 20))
    return content[0] if content else 0, content.ljust(40, b"\0")


def _seconds(file: IO[bytes], moov: Box) -> float:
    """The longer one of the durations in mvhd, of the first samples, and in mehd, of all fragments."""
    found, scale = [0], 1
    for box in _boxes(file, moov.start, moov.end):
        if box.name == b"mvhd":
            version, content = _read(file, box)
            scale, duration = struct.unpack_from(">IQ" if version else ">II", content, 20 if version else 12)
            found.append(duration)
        elif box.name == b"mvex":
            for inner in _boxes(file, box.start, box.end):
                if inner.name == b"mehd":
                    version, content = _read(file, inner)
                    found += struct.unpack_from(">Q" if version else ">I", content, 4)
    return max(duration for duration in found if duration not in UNKNOWN) / max(scale, 1)


def _indexed(file: IO[bytes], box: Box) -> int:
    """Where the last segment of an index ends."""
    version, content = _read(file, box)
    at = 20 + 8 * bool(version)
    (first,) = struct.unpack_from(">Q" if version else ">I", content, at - (8 if version else 4))
    (count,) = struct.unpack_from(">H", content, at + 2)
    entries = content[at + 4 : at + 4 + 12 * count]
    sizes = struct.iter_unpack(">I8x", entries[: len(entries) // 12 * 12])
    return int(box.end + first + sum(size & 0x7FFFFFFF for (size,) in sizes))
