"""The training methods by name: AFD and what it is compared with, over the same student, teacher videos, discriminator
and judge."""

from afd_fast.config import METHOD_NAMES
from afd_fast.errors import ConfigError
from afd_fast.training.methods import afd, gan, rejection, sft
from afd_fast.training.methods.method import Method

METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make `method=NAME` known. ConfigError for a name that is taken."""
    if method.name in METHODS:
        raise ConfigError(f"a method named {method.name!r} exists already")
    METHODS[method.name] = method
    METHOD_NAMES[method.name] = method.uses_discriminator


for _method in (afd.METHOD, sft.METHOD, rejection.METHOD, gan.GAN, gan.DMD):
    register_method(_method)

__all__ = ["METHODS", "Method", "register_method"]
