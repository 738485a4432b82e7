"""The `afd-fast` command."""

from afd_fast.errors import EXTRAS, MissingExtra

_EXTRA = {
    "demo": "demo",
    "distill": "demo",
    "doctor": "demo",
    "pretrain": "demo",
    "report": "demo",
    "review": "demo",
    "rollout": "eval",
    "eval": "eval",
}  # the rest: train


def missing(arguments: list[str], error: MissingExtra) -> MissingExtra:
    """The error as the command given by `arguments` says it: with the command, and the smallest extra that suffices."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    small = _EXTRA.get(command, "train")
    name = next(name for name in (small, "train", *EXTRAS) if error.module in EXTRAS[name])
    return MissingExtra(f"afd-fast {command}".strip(), name, error.module)
