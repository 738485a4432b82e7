"""`afd-fast review`: which of a teacher's clips look wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from afd_fast.cli.common import FPS, FRAMES, Keys, check_place, console, table
from afd_fast.errors import ConfigError

if TYPE_CHECKING:
    from afd_fast.students import Family
    from afd_fast.teachers.api import APITeacher
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
    from afd_fast.teachers.folder import FolderTeacher, lower_weights, read_manifest
    from afd_fast.teachers.mixed import MixedTeacher, parse
    from afd_fast.training import runs
    from afd_fast.training.progress import progress
    from afd_fast.training.review import review as look
    from afd_fast.training.teacher import teacher_of
    from afd_fast.training.trainer import new_run

    config = with_overrides(runs.get(run), overrides or [])
    specs = list(parse(config.teacher) or [config.teacher])
    files = all(spec.partition(":")[0] in ("folder", "api") for spec in specs)
    if weights and len(specs) > 1:
        raise ConfigError("--weights writes one manifest: review the teachers one at a time")
    if weights and not files:
        raise ConfigError(f"--weights needs videos that are files: teacher={config.teacher} has none, leave it out")
    names = [Path(spec.partition(":")[2] or spec).stem for spec in specs]
    out = out or Path("runs") / f"review-{'+'.join(names)}"
    check_place(out)
    prepared = new_run(config)
    cache, video = out.parent / "teacher-cache", prepared.family.video
    if steps or not files:
        teacher = teacher_of(prepared, None, cache)
    else:  # the student is not asked
        video = _format(specs, prepared.family)
        teacher = open_teacher(config.teacher, video, cache)
    clips = config.teacher_clips
    if files:  # nothing is made: all of the folders', and what an API has of as many
        parts = teacher.teachers.values() if isinstance(teacher, MixedTeacher) else [teacher]
        folders = [part for part in parts if isinstance(part, FolderTeacher)]
        clips = max([clips, *(len(of.seeds(prompt, range(MOST))) for of in folders for prompt in of.prompts)])
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
        folder, prompts = cast("APITeacher | FolderTeacher", teacher).folder, list(data.videos)
        ordered = sorted(found, key=lambda one: prompts.index(one.prompt))
        written = lower_weights(folder, {(one.prompt, one.name): one.weight for one in ordered})
        all_one = all(entry.weight == 1 for entry in read_manifest(folder))
        console.print(f"weights: {'all 1, which needs no column in ' if all_one else ''}{escape(str(written))}")


def _format(specs: list[str], family: "Family") -> "VideoFormat":
    """In which the pixels of folders' and APIs' clips are looked at: the student's format, or distill's where the student has learnt an
    embedded world alone and the prompts are of another."""
    from statistics import median

    from afd_fast.students.toy.pixel import size_for
    from afd_fast.teachers.dataset import open_teacher
    from afd_fast.teachers.folder import survey
    from afd_fast.video_io import VideoFormat

    clips = [clip for spec in specs if spec.startswith("folder:") for clip in survey(Path(spec.partition(":")[2]))]
    asked = [clip.prompt for clip in clips]
    for spec in specs:
        if spec.startswith("api:"):
            asked += [prompt for part in open_teacher(spec, family.video, Path()).split() for prompt in part]
    if family.prompts is None or set(asked) & set(family.prompts):
        return family.video
    found = [clip.format for clip in clips if clip.format is not None]
    if not found:
        return VideoFormat(FRAMES, *size_for(WIDE), FPS)
    frames = int(median(f.frames / f.fps for f in found) * FPS)
    return VideoFormat(max(2, min(FRAMES, frames)), *size_for(median(f.width / f.height for f in found)), FPS)
