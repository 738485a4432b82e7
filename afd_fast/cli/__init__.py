"""The `afd-fast` command."""

from afd_fast.errors import EXTRAS, MissingExtra

_EXTRA = {"demo": "demo", "pretrain": "demo", "report": "demo", "rollout": "eval", "eval": "eval"}  # the rest: train


def missing(arguments: list[str], error: MissingExtra) -> MissingExtra:
    """The error as the command given by `arguments` says it: with the command, and the smallest extra that suffices."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    small = _EXTRA.get(command, "train")
    return MissingExtra(
        f"afd-fast {command}".strip(), small if error.module in EXTRAS[small] else "train", error.module
    )
