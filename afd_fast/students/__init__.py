"""Students, their families, weights and caches. Heavy imports happen on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afd_fast.students.student import (
        VAE,
        Family,
        FamilyEntry,
        LatentFormat,
        Student,
        StudentConfig,
        StudentModule,
        register_family,
    )
    from afd_fast.students.wan.checkpoints import load_student, save_student
    from afd_fast.students.wan.experts import TwoExperts
    from afd_fast.students.wan.layers import CausalWanConfig
    from afd_fast.students.wan.model import CausalWan

_HOMES = {
    "CausalWan": "wan.model",
    "CausalWanConfig": "wan.layers",
    "Family": "student",
    "FamilyEntry": "student",
    "LatentFormat": "student",
    "Student": "student",
    "StudentConfig": "student",
    "StudentModule": "student",
    "TwoExperts": "wan.experts",
    "VAE": "student",
    "load_student": "wan.checkpoints",
    "register_family": "student",
    "save_student": "wan.checkpoints",
}

__all__ = [
    "VAE",
    "CausalWan",
    "CausalWanConfig",
    "Family",
    "FamilyEntry",
    "LatentFormat",
    "Student",
    "StudentConfig",
    "StudentModule",
    "TwoExperts",
    "load_student",
    "register_family",
    "save_student",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
