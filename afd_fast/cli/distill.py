"""`afd-fast distill`: a small student of a user's own videos, on any machine."""

import hashlib
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from afd_fast.cli.common import (
    FPS,
    FRAMES,
    Keys,
    Out,
    Overwrite,
    Resume,
    check_place,
    console,
    height_width,
    keeping,
    run,
    table,
)
from afd_fast.errors import ConfigError, some

if TYPE_CHECKING:
    from torch import Tensor

    from afd_fast.config import TrainConfig
    from afd_fast.teachers.folder import FolderTeacher, Found
    from afd_fast.video_io import VideoFormat

STEPS = 600  # of the base student's pretraining
CLIPS = 8  # used of a prompt, at most
# prompts of an iteration before the folder's are counted: what may be said of shards then is not said too early
ANY = 12
CHOSEN = ("student", "teacher", "height", "width", "frames", "fps")  # keys in whose place options stand


def distill(
    videos: Annotated[Path, typer.Option(help="folder with mp4 files and manifest.csv (columns prompt,video)")],
    overrides: Keys = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels, multiples of 8; default: the clips' own aspect")
    ] = None,
    frames: Annotated[int, typer.Option(help="of a clip; a multiple of 3")] = FRAMES,
    fps: Annotated[float, typer.Option(help="frames per second at which the clips are sampled")] = FPS,
    steps: Annotated[int, typer.Option(help="of the base student's pretraining", min=1)] = STEPS,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list every clip with what would happen to it, and stop")
    ] = False,
) -> None:
    """Distil your own videos into a small pixel student, and write a report.

    The base student is pretrained on augmentations of the training videos; then AFD learns from the videos themselves. A
    causal Wan student needs a GPU: afd-fast train afd_table3.
    """
    from afd_fast.config import with_overrides
    from afd_fast.students.toy import pixel
    from afd_fast.teachers.folder import FolderTeacher, survey
    from afd_fast.video_io import VideoFormat

    name = f"distill-{videos.resolve().name}"
    out = out or Path("runs") / name
    base = out.with_name(f"{out.name}.base.safetensors")
    if odd := [item for item in overrides or [] if item.partition("=")[0].partition(".")[0] in CHOSEN]:
        raise ConfigError(
            f"{odd[0]} has no meaning here: --videos, --size, --frames and --fps choose the teacher and the student"
        )
    if not fps > 0 or fps == float("inf"):
        raise ConfigError(f"--fps must be a positive number, got {fps}")
    given = height_width(size) if size else (8, 8)
    if given is None:
        raise ConfigError(f"--size is written HEIGHTxWIDTH, such as 48x80, got {size!r}")
    pixel.config_for(VideoFormat(frames, *given, fps))
    any_clips = with_overrides(_config(name, f"folder:{videos}", base, clips=1, prompts_per_step=ANY), overrides or [])
    if dry_run:
        check_place(out)
    else:
        _check_out(out, any_clips, overwrite, resume)
    found = survey(videos)
    shapes = [clip.format for clip in found if clip.format is not None]
    if not shapes:
        raise ConfigError(
            f"{videos}: no usable video. {some(clip.problem for clip in found) or 'the manifest is empty'}"
        )
    height, width = given if size else pixel.size_for(statistics.median(s.width / s.height for s in shapes))
    video = VideoFormat(frames, height, width, fps)
    teacher = FolderTeacher(videos, frames=frames, size=(height, width), fps=fps)
    _list(found, teacher, video)
    config = with_overrides(_config(name, teacher.name, base, *_counts(teacher)), overrides or [])
    _say(config, video, base, steps)
    if dry_run:
        return
    from afd_fast.training.run_folder import check_folder

    clips = _clips(teacher)
    made = {
        "videos": f"{frames} frames of {height}x{width} at {fps:g} fps",
        "steps": steps,
        "seed": config.seed,
        "clips": _digests(teacher, clips),
    }
    before = pixel.made_by(base) if base.exists() else None
    if resume and (changes := _changes(base, before, made, teacher.left_out)):
        raise ConfigError(
            f"{out} cannot be continued: {changes}. Give it what it began with, or start again with --overwrite"
        )
    check_folder(out, config, overwrite=overwrite, resume=resume)
    if before == made:
        console.print(f"base student: {escape(str(base))}, as it is")
    else:
        _pretrain(clips, video, base, steps, config.seed, made)
    run(config, out, overwrite, resume)


def _check_out(out: Path, config: "TrainConfig", overwrite: bool, resume: bool) -> None:
    """ConfigError for an --out that cannot be used so."""
    from afd_fast.training.run_folder import check_folder

    if not resume:
        check_folder(out, config, overwrite=overwrite, resume=False)
    elif overwrite or not (out / "config.json").exists():
        check_folder(out, config, overwrite=overwrite, resume=True)  # which says so
    check_place(out)


def _clips(teacher: "FolderTeacher") -> "dict[str, Tensor]":
    """The training videos by prompt, [M, 3, F, H, W] uint8."""
    import torch

    from afd_fast.video_io import to_uint8

    return {
        p: torch.stack([to_uint8(teacher(p, s)) for s in teacher.seeds(p, range(CLIPS))]) for p in teacher.split().train
    }


def _digests(teacher: "FolderTeacher", clips: "dict[str, Tensor]") -> dict[str, str]:
    """Of every training video with its prompt, by its file."""
    return {
        teacher.file(prompt, i): hashlib.sha256(prompt.encode() + video.numpy().tobytes()).hexdigest()
        for prompt, videos in clips.items()
        for i, video in enumerate(videos)
    }


def _changes(base: Path, before: dict[str, Any] | None, made: dict[str, Any], left_out: dict[str, str]) -> str:
    """What differs from what the base student was made with; empty where nothing does."""
    if before is None:
        return f"its base student {base} is missing"
    was, now = before["clips"], made["clips"]
    said = [
        f"{name} left out now ({left_out[name]})" if name in left_out else f"{name} gone"
        for name in was
        if name not in now
    ]
    said += [f"{name} new" for name in now if name not in was]
    said += [f"{name} changed" for name in now if was.get(name, now[name]) != now[name]]
    if before["videos"] != made["videos"]:
        said = [f"it makes {before['videos']}, and --size, --frames and --fps ask for {made['videos']}"]
    elif said:
        said = ["of its training videos " + ", ".join(said)]
    said += [f"it has {key}={before[key]}, not {made[key]}" for key in ("steps", "seed") if before[key] != made[key]]
    return "; ".join(said)


def _counts(teacher: "FolderTeacher") -> tuple[int, int]:
    """The most videos of a prompt, and the prompts of an iteration."""
    return max(len(teacher.seeds(p, range(CLIPS))) for p in teacher.prompts), min(4, len(teacher.split().train))


def _config(name: str, teacher: str, base: Path, clips: int, prompts_per_step: int) -> "TrainConfig":
    """The demo's run at a size that two cores bear, with as many videos and prompts as the folder has."""
    from afd_fast.config import EvaluationConfig
    from afd_fast.students.student import StudentConfig
    from afd_fast.training import runs

    demo = runs.demo()
    return replace(
        demo, name=name, iterations=120, teacher=teacher, teacher_clips=clips, checkpoint_every=40,
        prompts_per_step=prompts_per_step, rollouts_per_prompt=4,
        student=StudentConfig("pixel", base=str(base)), discriminator=replace(demo.discriminator, name="pixel", warmup=10),
        evaluation=EvaluationConfig(every=40, rollouts=2, batch=8),
    )  # fmt: skip


def _list(found: "list[Found]", teacher: "FolderTeacher", video: "VideoFormat") -> None:
    """Every clip, what it holds, and what happens to it."""
    split, left_out = teacher.split(), teacher.left_out
    listed = table("clip", "holds", "what happens to it", title=escape(teacher.name))
    for clip in found:
        holds, fate = "", escape(f"left out: {left_out[clip.video]}") if clip.video in left_out else ""
        if clip.format is not None:
            f = clip.format
            holds = f"{f.height}x{f.width}, {f.frames} frames at {f.fps:g} fps"
        if clip.format is not None and clip.video not in left_out:
            role = "held out" if clip.prompt not in split.train else "trained on"
            if split.train == split.held_out:
                role = "trained on, and judged on, as there is one prompt"
            whole = clip.format.frames / clip.format.fps
            fate = f"{role}: {min(video.frames / video.fps, whole):.1f} of {whole:.1f} s{_crop(clip.format, video)}"
        listed.add_row(f"{escape(clip.video)}\n{escape(clip.prompt)}", holds, fate)
    console.print(listed)


def _crop(held: "VideoFormat", video: "VideoFormat") -> str:
    """How much of a clip's picture its student sees."""
    kept = min(held.width / video.width, held.height / video.height)
    share = kept**2 * video.width * video.height / (held.width * held.height)
    return f", {100 * share:.0f} % of the picture" if share < 0.995 else ", the whole picture"


def _say(config: "TrainConfig", video: "VideoFormat", base: Path, steps: int) -> None:
    """What the command does with the videos, before it does it."""
    import torch

    console.print(
        f"student: {video.frames} frames of {video.height}x{video.width} pixels at {video.fps:g} fps, made from pixels without a "
        f"VAE. Its base is pretrained for {steps} steps on augmentations of your training videos (mirrored, cropped, brightened, "
        f"tinted): {escape(str(base))}. Then {config.iterations} iterations of AFD learn from the videos themselves; in the first "
        f"{config.discriminator.warmup} the discriminator learns alone.",
        highlight=False,
    )
    if torch.cuda.is_available():
        console.print(
            f"this machine has a GPU: afd-fast train afd_table3 student=CHECKPOINT discriminator=VideoReward/ "
            f"{escape('teacher=' + config.teacher)} trains a causal Wan at 480x832 (docs/training.md)",
            highlight=False,
        )


def _pretrain(
    clips: "dict[str, Tensor]", video: "VideoFormat", base: Path, steps: int, seed: int, made: dict[str, Any]
) -> None:
    """Make the base student's file. What is done of it is kept next to it."""
    from afd_fast.students.toy import pixel

    with keeping(base, made) as (report, kept):
        student = pixel.pretrain(clips, video, steps, seed=seed, report=report, kept=kept)
        pixel.save(student, video, base, made)
