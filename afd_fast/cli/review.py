"""`afd-fast review`: which of a teacher's clips look wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from afd_fast.cli.common import FPS, FRAMES, Keys, check_place, console, table
from afd_fast.errors import ConfigError

if TYPE_CHECKING:
    from afd_fast.students import Family
    from afd_fast.teachers.teacher import Teacher
    from afd_fast.training.review import Reviewed
    from afd_fast.video_io import VideoFormat

SHOWN = 20  # clips of the table
MOST = 1000  # videos of a prompt in a folder
WIDE = 5 / 3  # the aspect of an API's videos, nearly


def review(
    run: Annotated[str, typer.Argument(help="a named run, for its student and discriminator (see `afd-fast runs`)")],
    overrides: Keys = None,
    steps: Annotated[
        int, typer.Option(min=0, help="of each of the eight fits of the discriminator; 0: look at the pixels alone")
    ] = 150,
    weights: Annotated[
        bool, typer.Option("--weights", help="write the weights into the manifest of the teacher's folder")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder of clips.csv and clips.html; default runs/review-TEACHER")
    ] = None,
) -> None:
    """List the clips of RUN's teacher that look wrong, worst first.

    Frozen, black, cut, copied, not what the prompt says, or moving like the base student. Nothing is bought: of an API the videos that are
    there.
    """
    from afd_fast.config import with_overrides
    from afd_fast.reports.review import verdict, write_review
    from afd_fast.teachers.dataset import collect, open_teacher
    from afd_fast.teachers.folder import FolderTeacher
    from afd_fast.teachers.mixed import parse
    from afd_fast.training import runs
    from afd_fast.training.progress import progress
    from afd_fast.training.review import review as look
    from afd_fast.training.teacher import teacher_of
    from afd_fast.training.trainer import new_run

    config = with_overrides(runs.get(run), overrides or [])
    kind = config.teacher.partition(":")[0]
    several = parse(config.teacher)
    if weights and several:
        raise ConfigError("--weights writes one manifest: review the teachers one at a time")
    if weights and kind not in ("folder", "api"):
        raise ConfigError(f"--weights needs videos that are files: teacher={config.teacher} has none, leave it out")
    names = [Path(spec.partition(":")[2] or spec).stem for spec in several or [config.teacher]]
    out = out or Path("runs") / f"review-{'+'.join(names)}"
    check_place(out)
    prepared = new_run(config)
    cache, video = out.parent / "teacher-cache", prepared.family.video
    if steps or kind not in ("folder", "api"):
        teacher = teacher_of(prepared, None, cache)
    else:  # the student is not asked
        video = _format(config.teacher, prepared.family)
        teacher = open_teacher(config.teacher, video, cache)
    clips = config.teacher_clips
    if isinstance(teacher, FolderTeacher):
        clips = max(len(teacher.seeds(prompt, range(MOST))) for prompt in teacher.prompts)
    with progress(console) as bar:

        def track(items: Any, about: str) -> Any:
            yield from bar.track(items, description=about)

        data = collect(teacher, clips, config.codec_crf, track, config.teacher_prompts, fetch=False)
        found = look(prepared, data, track, steps)
    write_review(out, found, data, video.fps)
    shown = table("clip", "weight", "what looks wrong", title=escape(teacher.name))
    for one in found[:SHOWN]:
        if one.reasons:
            shown.add_row(
                f"{escape(one.name)}\n{escape(one.prompt)}", f"{one.weight:g}", escape("; ".join(one.reasons))
            )
    if shown.row_count:
        console.print(shown)
    for problem in data.problems:
        console.print(f"[yellow]left out:[/] {escape(problem)}")
    console.print(escape(verdict(found, data.problems)), highlight=False)
    console.print(f"all of them: {escape(str(out / 'clips.csv'))}; to look at: {escape(str(out / 'clips.html'))}")
    if weights:
        written = escape(str(_write_weights(teacher, found, list(data.videos))))
        all_one = all(one.weight == 1 for one in found)
        console.print(f"weights: {'all 1, which needs no column in ' if all_one else ''}{written}")


def _format(spec: str, family: "Family") -> "VideoFormat":
    """In which the pixels of a folder's or an API's clips are looked at: the student's format, or distill's where the student has learnt an
    embedded world alone and the prompts are of another."""
    from statistics import median

    from afd_fast.students.toy.pixel import size_for
    from afd_fast.teachers.dataset import open_teacher
    from afd_fast.teachers.folder import survey
    from afd_fast.video_io import VideoFormat

    kind, _, folder = spec.partition(":")
    clips = survey(Path(folder)) if kind == "folder" else []
    asked = [clip.prompt for clip in clips] or [
        p for part in open_teacher(spec, family.video, Path()).split() for p in part
    ]
    if family.prompts is None or set(asked) & set(family.prompts):
        return family.video
    found = [clip.format for clip in clips if clip.format is not None]
    if not found:
        return VideoFormat(FRAMES, *size_for(WIDE), FPS)
    frames = int(median(f.frames / f.fps for f in found) * FPS)
    return VideoFormat(max(2, min(FRAMES, frames)), *size_for(median(f.width / f.height for f in found)), FPS)


def _write_weights(teacher: "Teacher", found: "list[Reviewed]", prompts: list[str]) -> Path:
    """Into the manifest next to the videos, which an API's folder gets; a lower weight that is there stays."""
    from afd_fast.teachers.api import APITeacher
    from afd_fast.teachers.folder import Entry, FolderTeacher, read_manifest, write_manifest

    assert isinstance(teacher, (APITeacher, FolderTeacher))
    if isinstance(teacher, APITeacher):
        new = [Entry(one.prompt, one.name, one.weight) for one in found]
        return write_manifest(teacher.folder, sorted(new, key=lambda entry: prompts.index(entry.prompt)))
    weights = {(one.prompt, one.name): one.weight for one in found}
    return write_manifest(teacher.folder, [
        entry._replace(weight=min(entry.weight, weights.get((entry.prompt, Path(entry.video).as_posix()), 1.0)))
        for entry in read_manifest(teacher.folder)
    ])  # fmt: skip
