"""A run: collect the teacher's videos, train, judge, checkpoint; can be interrupted and resumed without loss.

A run folder holds config.json, environment.json, metrics.jsonl (one row an iteration), evaluations.jsonl,
tensorboard/, checkpoints/, and at the end result.json, samples.safetensors and student.safetensors.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import Interrupted, TrainingError
from afd_fast.judges import clips as clip_judge
from afd_fast.judges import physics as physics_judge
from afd_fast.students.lora import merged_lora, trainable
from afd_fast.teachers import api
from afd_fast.teachers.dataset import REFERENCE_SEEDS, TEACHER_ROW_SEEDS, collect
from afd_fast.training import checkpoint
from afd_fast.training.distributed import Ranks, whole
from afd_fast.training.methods import baselines
from afd_fast.training.methods.streaming import clip, stream_step
from afd_fast.training.run_folder import add_video, append, environment, prepare_folder, read_rows, rewind
from afd_fast.training.state import System, generator, new_state
from afd_fast.training.step import sample_policy

REFERENCE_CLIPS = 32  # teacher clips per held-out prompt behind the Frechet distance (physics only: they are free)
WATCHED = 20  # iterations
PAIR_R = (0.01, 0.65)  # the range of sigmoid(D(student) - D(teacher)) that is no reason to worry
NORM_RATIO = (0.9, 1.1)  # and of ||v|| / ||v_ref||
AUTO_RANGE = 10.0  # disc_lr_auto stays within this factor of disc_lr
NOTED = ("loss", "reward", "margin", "accuracy")  # beside the progress bar
SAMPLE_PROMPTS, SAMPLES_PER_PROMPT = 8, 2  # shown in the report


@contextlib.contextmanager
def on_stop_signal(ask: Callable):
    """Inside the block Ctrl-C and SIGTERM call `ask(signal, frame)` and nothing else."""
    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


class Trainer:
    """One run in one folder. `run()` trains to the end; `system` holds the pretrained student it starts from.

    Of several ranks the lead alone judges, writes and speaks.
    """

    def __init__(
        self, config: TrainConfig, system: System, out: Path, *, cache: Path, console: Console, ranks: Ranks = Ranks()
    ):
        self.config, self.out, self.console, self.ranks = config, out, console, ranks
        self.shards = ranks.share(config.shards)
        self.lockstep = config.fsdp and ranks.world > 1  # the student runs only when it runs on every rank
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        with self.progress:
            with ranks.lead_first():  # the others then find every video in the cache
                self.data = collect(config, system, cache, self._track)
            self.reference = self._reference_clips() if ranks.lead else None
            first = self.data.first_held_out if ranks.lead else []
            self.first_reference = self._reference_of(first) if first else None
        for problem in self.data.problems:
            console.print(f"[yellow]left out:[/] {problem}")
        self.state = new_state(config, system)
        self._stop, self._drift_said = False, -WATCHED

    def _track(self, items, description: str):
        task = self.progress.add_task(description, total=len(items), note="")
        for item in items:
            yield item
            self.progress.advance(task)

    def _reference_clips(self) -> Tensor:
        """Teacher clips [N, 3, F, H, W] of the held-out prompts that student clips are compared with."""
        if not self.data.judged:
            return torch.cat([self.data.videos[p] for p in self.data.held_out]).float() / 255
        return self._reference_of(self.data.held_out)

    def _reference_of(self, held_out: list[str]) -> Tensor:
        pairs = [(p, REFERENCE_SEEDS + i) for i in range(REFERENCE_CLIPS) for p in held_out]
        return torch.cat([self.data.clips([p], [s]) for p, s in self._track(pairs, "judge's reference videos")])

    # -- judging ---------------------------------------------------------------------------------------------

    def judge(self, clips: Tensor, prompts: list[str]) -> dict[str, float]:
        """Scores from pixels alone."""
        if self.data.judged:
            return physics_judge.evaluate(clips.numpy(), prompts, self.reference.numpy())
        return clip_judge.evaluate(clips.numpy(), self.reference.numpy())

    def student_clips(self, per_prompt: int, held_out: list[str] | None = None) -> tuple[Tensor, list[str]]:
        """Held-out rollouts of the averaged student, with the same noise at every call; of a stream its last clip."""
        prompts = (held_out or self.data.held_out) * per_prompt
        size, videos = self.config.eval_batch or len(prompts), []
        for number, start in enumerate(range(0, len(prompts), size)):
            rng = generator(0, 0, "evaluation", number)
            part, length = prompts[start : start + size], self.config.stream or self.state.system.shape[1]
            latents = sample_policy(self.state, self.config, part, rng, average=True, frames=length)
            videos.append(clip(self.state.system, self.config, latents, length - self.state.system.shape[1]).cpu())
        return torch.cat(videos), prompts

    def evaluate(self) -> dict[str, float]:
        """The judge's scores on held-out prompts and, for the discriminator, accuracy there and agreement with the judge."""
        clips, prompts = self.student_clips(self.config.eval_rollouts)
        first = self.data.first_held_out
        first_clips, _ = self.student_clips(self.config.eval_rollouts, first) if first else (None, None)
        if not self.ranks.lead:
            return {}
        self.sample = torch.cat(list(clips[: min(4, len(self.data.held_out))]), -1)  # beside each other
        row = {"step": self.state.step, **self.judge(clips, prompts)}
        if first:
            again = first * self.config.eval_rollouts
            scores = physics_judge.evaluate(first_clips.numpy(), again, self.first_reference.numpy())
            row |= {f"first_{key}": scores[key] for key in ("residual_px", "general", "background")}
        if self.config.method == "sft":  # has no use for a discriminator
            return row
        teacher = (
            torch.stack([self.data.videos[p][i % len(self.data.videos[p])] for i, p in enumerate(prompts)]).float()
            / 255
        )
        home = next(self.state.discriminator.parameters()).device
        with torch.no_grad():
            scores = self.state.discriminator.score(clips.to(home), prompts).cpu()
            of_teacher = self.state.discriminator.score(teacher.to(home), prompts).cpu()
            row["held_out_accuracy"] = (of_teacher > scores).float().mean().item()
        if self.data.judged and self.config.eval_rollouts > 1:
            residual = physics_judge.physics_residual(clips.numpy(), prompts)
            centred = [a.reshape(-1, len(self.data.held_out)) for a in (scores.numpy(), -residual)]
            centred = [(a - a.mean(0)).ravel() for a in centred]
            row["reward_physics_correlation"] = float(np.corrcoef(*centred)[0, 1])
        return row

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, on_step: Callable[[dict], None] | None = None) -> dict:
        """Train to the end and return result.json's content ({} on ranks that do not lead). Interrupted after a
        saved stop."""
        config, state, lead = self.config, self.state, self.ranks.lead
        elapsed = 0.0
        folder = self.out / "checkpoints"
        if resume and (path := checkpoint.latest(folder)):
            sharded = path.suffix == ".dcp"
            blank = lambda keys: {"state": state.blank(keys), "elapsed": 0.0}
            saved = checkpoint.load_sharded(path, blank, self.ranks) if sharded else checkpoint.load(path)
            state.load_state_dict(saved["state"])
            elapsed = saved["elapsed"]
            self.console.print(f"resuming after iteration {state.step} ({path})")
        if lead:
            rewind(self.out / "metrics.jsonl", state.step)
            rewind(self.out / "evaluations.jsonl", state.step + bool(state.step))
        writer = SummaryWriter(self.out / "tensorboard", purge_step=state.step) if lead else None
        started = time.perf_counter() - elapsed
        try:
            with on_stop_signal(self._ask_to_stop), self.progress:
                task = self.progress.add_task(config.name, total=config.iterations, completed=state.step, note="")
                if state.step == 0:
                    self._record_evaluation(writer)
                iterate = stream_step if config.stream else baselines.STEPS[config.method]
                while state.step < config.iterations:
                    batch = self.data.batch(config, state.step, self.shards)
                    metrics = iterate(state, config, batch, self.ranks)
                    self._check(metrics)
                    stop, last = self.ranks.any(self._stop), state.step == config.iterations
                    self._watch(metrics)
                    if lead:
                        row = {"step": state.step - 1, "elapsed": time.perf_counter() - started, **metrics}
                        append(self.out / "metrics.jsonl", row)
                        for key, value in metrics.items():
                            writer.add_scalar(key if "/" in key else f"train/{key}", value, state.step)
                        note = " ".join(f"{k} {metrics[k]:.2f}" for k in NOTED if k in metrics)
                        self.progress.update(task, completed=state.step, note=note)
                        if on_step:
                            on_step(row)
                    if state.step % config.eval_every == 0 or last:
                        self._record_evaluation(writer)
                    if state.step % config.checkpoint_every == 0 or last or stop:
                        payload = {"state": state.state_dict(), "elapsed": time.perf_counter() - started}
                        if config.fsdp:
                            checkpoint.save_sharded(folder, state.step, payload, self.ranks)
                        elif lead:
                            checkpoint.save(folder, state.step, payload)
                    if stop and not last:
                        raise Interrupted(f"stopped after iteration {state.step}; continue with --resume")
                return self._finish(time.perf_counter() - started)
        finally:
            if writer:
                writer.close()

    def _watch(self, metrics: dict) -> None:
        """Say it when the student leaves the frozen one, and when the discriminator gives no signal (Figure 5 of the
        paper), with the remedy; with disc_lr_auto, apply it: the discriminator's learning rate twice or half what it was."""
        ratio = metrics.get("velocity_norm_ratio", 1.0)
        if not NORM_RATIO[0] <= ratio <= NORM_RATIO[1] and self.state.step >= self._drift_said + WATCHED:
            self._drift_said = self.state.step
            self.console.print(
                f"[yellow]iteration {self.state.step}:[/] the student's velocities are {ratio:.2f} times as long as the "
                "frozen student's: it drifts (blur, collapse); raise prior_weight or lower student_lr"
            )
        if "pair_r" not in metrics:
            return
        seen = self.state.pair_r = [*self.state.pair_r, metrics["pair_r"]][-WATCHED:]
        r = sum(seen) / len(seen)
        if len(seen) < WATCHED or PAIR_R[0] <= r <= PAIR_R[1]:
            return
        stale = r > PAIR_R[1]
        what = (
            "stale: raise disc_lr or disc_steps" if stale else "overpowering: lower disc_lr, raise r1 or instance_noise"
        )
        if self.config.disc_lr_auto:
            (group,) = self.state.disc_optimizer.param_groups
            low, high = self.config.disc_lr / AUTO_RANGE, self.config.disc_lr * AUTO_RANGE
            group["lr"] = min(max(group["lr"] * (2 if stale else 0.5), low), high)
            what = f"{what.partition(':')[0]}: disc_lr is now {group['lr']:.3g}"
        self.console.print(
            f"[yellow]iteration {self.state.step}:[/] sigmoid(D(student) - D(teacher)) has been {r:.3f} over {WATCHED} "
            f"iterations; the discriminator is {what}"
        )
        self.state.pair_r = []

    def _ask_to_stop(self, *_):
        self._stop = True
        self.console.print("stopping after this iteration ...")

    def _check(self, metrics: dict) -> None:
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        if bad:
            raise TrainingError(
                f"iteration {self.state.step}: {', '.join(bad)} not finite; stopped before a checkpoint could be overwritten"
            )

    def _record_evaluation(self, writer: SummaryWriter | None) -> None:
        row = self.evaluate() if self.ranks.lead or self.lockstep else {}
        if not self.ranks.lead:
            return
        append(self.out / "evaluations.jsonl", row)
        for key, value in row.items():
            if key != "step" and math.isfinite(value):
                writer.add_scalar(f"held_out/{key}", value, row["step"])
        add_video(writer, "held_out/sample", self.sample, self.state.system.fps, row["step"])
        keys = ("residual_px", "frechet", "general") if self.data.judged else ("dynamic", "frechet")
        shown = ", ".join(f"{k} {row[k]:.3f}" for k in keys)
        if "held_out_accuracy" in row:
            shown += f", held-out accuracy {row['held_out_accuracy']:.2f}"
        self.console.print(f"iteration {row['step']:4d}: {shown}")

    def _finish(self, seconds: float) -> dict:
        """Judge the final student and the teacher, keep samples, weights and the result."""
        weights, adapters = self._weights() if self.ranks.lead or self.lockstep else ({}, {})
        self._save_samples()
        if not self.ranks.lead:
            return {}
        evaluations = read_rows(self.out / "evaluations.jsonl")
        held, count = self.data.held_out, self.config.eval_rollouts
        seeds = [TEACHER_ROW_SEEDS + i // len(held) for i in range(len(held) * count)]
        teacher = self.data.clips(held * count, seeds) if self.data.judged else self.reference
        teacher_row = self.judge(teacher, held * count if self.data.judged else [])
        result = {
            "rows": {"base": evaluations[0], "student": evaluations[-1], "teacher": teacher_row},
            "prompts": {"train": len(self.data.train_prompts), "held_out": len(held)},
            "clips_judged": len(held) * count,
            "problems": self.data.problems,
            "seconds": seconds,
            "config": to_dict(self.config),
            "environment": environment(),
        }
        self.state.system.save(weights, adapters, to_dict(self.config), self.out)
        partial = self.out / "result.part"
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(self.out / "result.json")
        return result

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averaged student's own weights with adapters merged, and the adapters."""
        with self.state.ema.applied(self.state.student), merged_lora(self.state.student):
            state = {n: whole(p).clone() for n, p in self.state.student.state_dict().items()}
        return (
            {n.replace(".base_layer", ""): p for n, p in state.items() if ".lora_" not in n},
            {n: p for n, p in state.items() if ".lora_" in n},
        )

    def _save_samples(self) -> None:
        """Clips of the first held-out prompts: base student, the trained one from the same noise, and the teacher."""
        count = SAMPLES_PER_PROMPT
        shown = self.data.held_out[:SAMPLE_PROMPTS]
        pick = lambda clips: clips.view(count, len(self.data.held_out), *clips.shape[1:])[:, : len(shown)]
        student = pick(self.student_clips(count)[0])
        trained, reference = self.state.ema.shadow, self.state.reference
        if reference is not None:
            self.state.ema.shadow = dict(reference.named_parameters())
        else:
            self.state.ema.shadow = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in trained.items()}
        base = pick(self.student_clips(count)[0])
        self.state.ema.shadow = trained
        if not self.ranks.lead:
            return
        teacher = torch.stack(
            [torch.stack([self.data.videos[p][i % len(self.data.videos[p])] for p in shown]) for i in range(count)]
        )
        to8 = lambda x: (x * 255).round().to(torch.uint8).contiguous()
        clips = {"base": to8(base), "student": to8(student), "teacher": teacher.contiguous()}
        save_file(clips, self.out / "samples.safetensors", {"prompts": json.dumps(shown)})


def facts(config: TrainConfig, system: System) -> dict[str, str]:
    """What a run would be, without running it: sizes of the networks and of their trained part, and the teacher's cost."""
    state, count = new_state(config, system), lambda parameters: sum(p.numel() for p in parameters)
    millions = lambda module: (
        f"{count(module.parameters()) / 1e6:.2f} M, {count(trainable(module).values()) / 1e6:.2f} M of them trained"
    )
    b = config.prompts_per_step * config.rollouts_per_prompt
    said = {
        "student parameters": millions(state.student),
        "discriminator parameters": millions(state.discriminator),
        "videos an iteration": f"{b} of {system.video[0]} frames, {system.video[1]}x{system.video[2]} pixels, {system.fps} fps",
        "optimiser and average": f"{16 * count(trainable(state.student).values()) / 2**30:.2f} GiB",
    }
    if config.teacher.startswith("api:"):
        teacher = api.from_file(config.teacher[4:], frames=system.video[0], size=system.video[1:], fps=system.fps)
        left = teacher.missing([(p, seed) for p in teacher.prompts for seed in range(config.teacher_clips)])
        said["teacher"] = (
            f"{len(left)} videos to buy for {len(left) * teacher.api.usd_per_video:.2f} USD; {teacher.summary()}"
        )
    return said


def start(
    config: TrainConfig,
    system: System,
    out: Path,
    *,
    overwrite=False,
    resume=False,
    console: Console | None = None,
    cache: Path | None = None,
    ranks: Ranks = Ranks(),
) -> dict:
    """Prepare the folder, train, return the result ({} on ranks that do not lead). A finished run is returned as it is."""
    ranks.share(config.shards)  # a wrong number of processes is said before a folder is touched
    with ranks.lead_first():
        if ranks.lead:
            prepare_folder(out, config, overwrite=overwrite, resume=resume)
        if resume and (out / "result.json").exists():
            return json.loads((out / "result.json").read_text()) if ranks.lead else {}
    cache = cache or out.parent / "teacher-cache"
    trainer = Trainer(config, system, out, cache=cache, console=console or Console(quiet=not ranks.lead), ranks=ranks)
    return trainer.run(resume=resume)
