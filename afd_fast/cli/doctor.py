"""`afd-fast doctor`: what this machine lacks, for everything or for one run, and how to mend it."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.markup import escape

from afd_fast.cli.common import Keys, console, table
from afd_fast.errors import EXTRAS, AFDError, ConfigError, not_installed

if TYPE_CHECKING:
    from afd_fast.config import TrainConfig
    from afd_fast.training.run import Run
    from afd_fast.video_io import VideoFormat

ENCODERS, DECODERS = ("libx264", "libx264rgb"), ("h264", "hevc", "vp9", "av1")
SPARE = 10e9  # bytes of disk that a run should find besides its own files
COLORS = {"ok": "green", "note": "yellow", "fails": "red"}


class Check(NamedTuple):
    """What was looked at and found. state: ok; note: something runs slower or not at all, though not what was asked for;
    fails: what was asked for cannot run. remedy: how to mend it."""

    what: str
    state: Literal["ok", "note", "fails"]
    found: str
    remedy: str = ""


def doctor(
    name: Annotated[
        str | None, typer.Argument(help="a named run (see `afd-fast runs`) to check this machine for")
    ] = None,
    overrides: Keys = None,
) -> None:
    """Say what would fail on this machine and how to mend it; with a RUN, exit with 1 where it cannot run."""
    more = f", then an iteration of {escape(name)}" if name else ""
    console.print(f"looking at packages, CPU, GPU, codecs and disk{more} ...")  # the imports alone take seconds
    from afd_fast.config import with_overrides
    from afd_fast.training import runs

    config = with_overrides(runs.get(name), overrides or []) if name else None
    checks = [*machine(), *(checked_run(config) if config else ())]
    found = table("", "", "found", "how to mend it", title=f"afd-fast doctor {escape(name or '')}")
    for check in checks:
        found.add_row(
            escape(check.what), f"[{COLORS[check.state]}]{check.state}", escape(check.found), escape(check.remedy)
        )
    console.print(found)
    failed = [check.what for check in checks if check.state == "fails"]
    if failed:
        console.print(f"{escape(name or 'afd-fast')} cannot run here: {escape(', '.join(failed))}")
        raise typer.Exit(1)
    console.print(
        f"{escape(name)} can run here" if name else "give a RUN to check this machine for it: afd-fast doctor demo"
    )


def machine() -> Iterator[Check]:
    """Everything that does not depend on a run."""
    import torch

    from afd_fast import ops
    from afd_fast.training.run_folder import environment

    found = environment()
    yield Check(
        "versions", "ok", f"afd_fast {found['afd_fast']}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    yield from extras()
    yield from threads()
    yield from gpu()
    yield from attention()
    yield from codecs()
    served = next(iter(ops.backends().values()))
    slow = "not built" in served or "too old" in served or "none (" in served
    remedy = "" if not slow else "see what is in brackets; results are the same, slower"
    yield Check("operators", "note" if slow else "ok", served, remedy)
    yield from disk(Path.cwd(), SPARE)


def extras() -> Iterator[Check]:
    for name in EXTRAS:
        if missing := not_installed(name):
            yield Check(f"extra [{name}]", "note", f"missing: {', '.join(missing)}", f"pip install 'afd-fast[{name}]'")
        else:
            yield Check(f"extra [{name}]", "ok", "installed")


def threads() -> Iterator[Check]:
    """The CPUs that this process gets against the threads that it starts."""
    import torch

    from afd_fast import threads as openmp

    facts, used, allowed = openmp.facts(), torch.get_num_threads(), openmp.cpus()
    found = f"{used} thread{'s' * (used != 1)} on {facts['CPUs']}"
    if used > allowed:
        yield Check("threads", "note", found, f"they wait for each other: {openmp.COUNT}={allowed}")
    else:
        yield Check("threads", "ok", found)
    spin = os.environ.get(openmp.WAITING, "").upper() == "ACTIVE"
    remedy = f"slow next to other processes: {openmp.WAITING}=PASSIVE" if spin else ""
    yield Check("waiting threads", "note" if spin else "ok", facts["waiting threads"], remedy)


def gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        build = "a CPU build of PyTorch" if torch.version.cuda is None else "PyTorch finds no driver or no device"
        yield Check("GPU", "note", f"none ({build})", "the demo and distill need none; a causal Wan does")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, whole = (n / 1e9 for n in torch.cuda.mem_get_info(index))
        found = f"{about.name}, compute capability {about.major}.{about.minor}, {free:.0f} of {whole:.0f} GB free"
        old = about.major < 8
        remedy = "bfloat16 kernels need compute capability 8.0 or more" if old else ""
        yield Check(f"GPU {index}", "note" if old else "ok", found, remedy)


def attention() -> Iterator[Check]:
    """Every backend: whether it is there, and which one is chosen."""
    import torch

    from afd_fast.ops import attention as backends

    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    for name in backends.BACKENDS:
        try:
            backends.choose_backend(name, capability, True, backends._is_installed)
            yield Check(f"attention {name}", "ok", "can be used")
        except (ImportError, ValueError) as error:
            found = "no GPU" if capability is None else "not usable"
            yield Check(
                f"attention {name}",
                "ok" if capability is None else "note",
                found,
                "" if capability is None else str(error),
            )


def codecs() -> Iterator[Check]:
    try:
        import av
        from av.codec import Codec
    except ImportError:
        yield Check("video", "note", "PyAV is not installed", "pip install 'afd-fast[demo]'")
        return
    missing = [f"{n} (writing)" for n in ENCODERS if not _codec(Codec, n, "w")] + [
        f"{n} (reading)" for n in DECODERS if not _codec(Codec, n, "r")
    ]
    if missing:
        remedy = "pip install --force-reinstall av: its wheels bring FFmpeg with them"
        yield Check("video", "note", f"PyAV {av.__version__} lacks {', '.join(missing)}", remedy)
    else:
        yield Check("video", "ok", f"PyAV {av.__version__} writes {', '.join(ENCODERS)}, reads {', '.join(DECODERS)}")


def _codec(codec: type, name: str, mode: str) -> bool:
    try:
        codec(name, mode)
    except ValueError:  # PyAV's UnknownCodecError
        return False
    return True


def disk(folder: Path, needed: float, what: str = "disk") -> Iterator[Check]:
    """Free space of the nearest folder that exists."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free in {folder}"
    short = free < needed
    remedy = f"{needed / 1e9:.1f} GB are wanted: free some, or give another --out" if short else ""
    yield Check(what, "fails" if short and what != "disk" else "note" if short else "ok", found, remedy)


def checked_run(config: "TrainConfig") -> Iterator[Check]:
    """What this run needs: packages, files, memory, disk."""
    yield from packages(config)
    yield from sources(config)
    yield from memory(config)


def packages(config: "TrainConfig") -> Iterator[Check]:
    from afd_fast.students.student import WAN, entry
    from afd_fast.teachers import mixed

    teachers = mixed.parse(config.teacher) or [config.teacher]
    small = entry(config.student.name) is not WAN and not any(spec.startswith("api:") for spec in teachers)
    extra = "demo" if small else "train"
    missing = not_installed(extra)
    state: Literal["ok", "fails"] = "fails" if missing else "ok"
    found = f"missing: {', '.join(missing)}" if missing else f"[{extra}] is installed"
    yield Check("packages of the run", state, found, f"pip install 'afd-fast[{extra}]'" if missing else "")


def sources(config: "TrainConfig") -> Iterator[Check]:
    """Files and repositories that the configuration names, and the teacher as `train` checks it: small networks are made, a
    checkpoint's are neither loaded nor downloaded, and nothing is bought."""
    from afd_fast.discriminators.config import DISCRIMINATORS
    from afd_fast.students.files import check_source
    from afd_fast.students.student import FAMILIES
    from afd_fast.students.wan.supported import check_trained

    small, cache = config.student.name in FAMILIES, Path("runs/teacher-cache")
    prepared: list[Run] = []

    def student() -> None:
        from afd_fast.training.trainer import new_run

        if small:
            judge = config.discriminator
            known = judge if judge.name in DISCRIMINATORS else replace(judge, name="pixel", lora_rank=None)
            prepared.append(new_run(replace(config, discriminator=known)))
        else:
            check_source(config.student.name)
            check_trained(config.student.name)

    def discriminator() -> None:
        if config.discriminator.name not in DISCRIMINATORS:
            check_source(config.discriminator.name)

    def teacher() -> None:
        from afd_fast.teachers.dataset import check_prompts, open_teacher, prompts_of
        from afd_fast.training.teacher import batch_plan, teacher_of

        if prepared:
            teacher_of(prepared[0], None, cache)
        else:
            found = open_teacher(config.teacher, _wan_video(config), cache)
            check_prompts(found.name, prompts_of(found, config.teacher_prompts).train, batch_plan(config))

    for what, check, value in (
        ("student", student, config.student.name), ("discriminator", discriminator, config.discriminator.name),
        ("teacher", teacher, config.teacher),
    ):  # fmt: skip
        if what == "teacher" and small and not prepared:
            return  # what its videos have to fit is not known
        try:
            check()
            yield Check(what, "ok", value)
        except AFDError as error:
            yield Check(what, "fails", value, str(error))


def _wan_video(config: "TrainConfig") -> "VideoFormat":
    """Of a Wan student's videos, without its base: where that is not Wan 2.1's, at the rate of Wan 2.2, which asks for shorter clips."""
    from afd_fast.students.wan.family import FPS, FPS_2_2, coder_of, latent_size
    from afd_fast.video_io import VideoFormat

    size, scale = latent_size(config.student, config.rollout.chunk), coder_of("tiny").scale
    fps = FPS if config.student.base is None else FPS_2_2
    return VideoFormat(4 * size.frames - 3, scale * size.height, scale * size.width, fps)


def memory(config: "TrainConfig") -> Iterator[Check]:
    """The estimate of an iteration against the GPU, or the host's memory where there is none, and checkpoints against the disk."""
    import torch

    from afd_fast.estimate import estimate
    from afd_fast.students.student import FAMILIES, WAN, entry
    from afd_fast.training.checkpoint import KEEP

    try:
        found = estimate(config)
    except ConfigError as error:
        yield Check("memory", "note", "not counted", str(error))
        return
    peak, phase = found.peak
    on_gpu = entry(config.student.name) is WAN and (config.student.device or "cuda") != "cpu"
    cuda = torch.cuda.is_available() and on_gpu
    held = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = f"at least {peak / 1e9:.3g} GB in {phase}; {held / 1e9:.0f} GB {'free on the GPU' if cuda else 'in this machine'}"
    more = "see afd-fast estimate for the settings that fit, or use several GPUs with fsdp=true"
    yield Check("memory", "fails" if peak > held else "ok", said, more if peak > held else "")
    if not cuda and config.student.name not in FAMILIES:
        yield Check(
            "speed",
            "fails",
            "a causal Wan without a GPU",
            "run it where there is one; student=tiny tries the path anywhere",
        )
    kept = sum(n for what, n, _ in found.memory if "AdamW" in what)  # what is trained, with its states and averages
    yield from disk(Path("runs"), (KEEP + 1) * kept + SPARE / 10, "disk of the run")
