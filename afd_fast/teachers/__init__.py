"""Black-box teachers: prompt and seed in, a finished video out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afd_fast.teachers.dataset import TeacherVideos
    from afd_fast.teachers.folder import FolderTeacher
    from afd_fast.teachers.pipeline import PipelineTeacher, write_folder
    from afd_fast.teachers.teacher import CallableTeacher, Teacher, TeacherBase, register_teacher

_HOMES = {
    "CallableTeacher": "teacher",
    "FolderTeacher": "folder",
    "PipelineTeacher": "pipeline",
    "Teacher": "teacher",
    "TeacherBase": "teacher",
    "TeacherVideos": "dataset",
    "register_teacher": "teacher",
    "write_folder": "pipeline",
}

__all__ = [
    "CallableTeacher",
    "FolderTeacher",
    "PipelineTeacher",
    "Teacher",
    "TeacherBase",
    "TeacherVideos",
    "register_teacher",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
