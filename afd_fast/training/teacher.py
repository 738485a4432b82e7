"""The teacher of a run, checked against its student before anything is fetched or paid for."""

from collections.abc import Iterable
from pathlib import Path

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError, some
from afd_fast.teachers import mixed
from afd_fast.teachers.cache import CachedTeacher
from afd_fast.teachers.dataset import BatchPlan, check_prompts, open_teacher, prompts_of
from afd_fast.teachers.folder import read_manifest
from afd_fast.teachers.teacher import Teacher
from afd_fast.training.run import Run


def batch_plan(config: TrainConfig) -> BatchPlan:
    """How the configuration draws an iteration's prompts."""
    return BatchPlan(config.seed, config.prompts_per_step, config.rollouts_per_prompt, config.shards)


def teacher_of(run: Run, teacher: Teacher | None, cache: Path) -> Teacher:
    """The teacher of a run: its prompts fill the shards, the student's text encoder takes them, and they are of a world that the student
    knows. Nothing is fetched or paid for. teacher: in place of the one that the configuration names."""
    specs = list(mixed.parse(run.config.teacher) or [run.config.teacher]) if teacher is None else []
    if teacher is None:
        _check_folders(run, specs)
        found = open_teacher(run.config.teacher, run.family.video, cache)
    else:
        found = CachedTeacher(teacher, cache, fit=run.family.video)
    split = prompts_of(found, run.config.teacher_prompts)
    check_prompts(found.name, split.train, batch_plan(run.config))
    prompts = list(dict.fromkeys(prompt for part in split for prompt in part))
    # whoever writes a teacher for a student knows what both are
    if any(spec.startswith(("folder:", "api:")) for spec in specs):
        _check_world(run, prompts)
    refused = [line for prompt in prompts if (line := _refusal(run, prompt))]
    if refused:
        raise ConfigError(f"{len(refused)} of {len(prompts)} prompts cannot be used: {some(refused)}")
    return found


def _check_folders(run: Run, specs: Iterable[str]) -> None:
    """`_check_world` of folders that hold no prompt of it, before one of their videos is opened."""
    known = run.family.prompts
    for kind, _, folder in (spec.partition(":") for spec in specs):
        if known is not None and kind == "folder" and folder:
            prompts = [entry.prompt for entry in read_manifest(Path(folder))]
            if not set(prompts) & set(known):
                _check_world(run, prompts)


def _check_world(run: Run, prompts: Iterable[str]) -> None:
    """ConfigError where a student that knows its own prompts alone is asked for others."""
    known = run.family.prompts
    if known is not None and (new := [prompt for prompt in prompts if prompt not in known]):
        raise ConfigError(
            f"student={run.config.student.name} has learnt a small world of its own alone, and {new[0][:80]!r} is no prompt of it: "
            "for your own videos take afd-fast distill --videos DIR, or another student= (docs/training.md)"
        )


def _refusal(run: Run, prompt: str) -> str:
    """Why the student's text encoder or the discriminator cannot read a prompt; empty where both can."""
    try:
        run.family.text([prompt])
        run.discriminator.check_prompt(prompt)
    except ValueError as error:
        return f"{prompt[:80]!r}: {error}"
    return ""
