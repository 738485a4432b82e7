"""Safetensors files with the permissions of every other file; the package itself lets only their owner read them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from afd_fast.errors import extra
from afd_fast.files.durable import settle

with extra("train"):
    from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write tensors by name; about: the header's metadata. The file appears whole or not at all."""
    partial = path.with_suffix(".part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask allows
        save_file(dict(tensors), partial, about)
        partial.chmod(mode)
        settle(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
