"""Judging a run on held-out prompts, from pixels alone; and the clips its report shows.

Legend: N clips, n clips per prompt, P prompts, F frames, H x W pixels.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afd_fast.files.tensors import save_tensors
from afd_fast.judges import JUDGES, Scores
from afd_fast.students.lora import merged_lora
from afd_fast.students.student import TrainedWeights
from afd_fast.teachers.dataset import TeacherVideos, Track, shown
from afd_fast.teachers.teacher import Request
from afd_fast.training.distributed import whole
from afd_fast.training.methods import METHODS
from afd_fast.training.rollouts import clip, sample_policy
from afd_fast.training.run import Run
from afd_fast.training.state import generator
from afd_fast.video_io import to_uint8

REFERENCE_SEEDS, TEACHER_ROW_SEEDS = 10_000, 20_000  # apart from the training clips' 0, 1, 2 ...
REFERENCE_CLIPS = 32  # teacher clips per held-out prompt behind the Frechet distance, where they are free
SAMPLE_PROMPTS, SAMPLES_PER_PROMPT, SAMPLE_COLUMNS = 8, 2, 4  # shown in the report and in TensorBoard


@dataclass
class References:
    """Teacher clips [N, 3, F, H, W] uint8 that the student's are compared with: of the held-out prompts, and of the same
    prompts in the domain the base student knows (None where there is no other domain)."""

    held_out: Tensor
    familiar: Tensor | None


class Evaluator:
    """Scores of a run's averaged student. Only rank 0 judges; with FSDP every rank takes part in the rollouts."""

    def __init__(self, run: Run, data: TeacherVideos, track: Track):
        self.run, self.data = run, data
        self.judge = JUDGES[data.teacher.judge]
        self.familiar = data.teacher.familiar(data.held_out)
        self.references = self._references(track) if run.ranks.lead else None
        self.sample: Tensor | None = None  # [3, F, H, W] uint8 of the last evaluation
        self.by_prompt: list[float] = []  # and its first headline score, a mean for each held-out prompt

    def _references(self, track: Track) -> References:
        if not self.judge.free_reference:  # the videos that there are, as many of each prompt
            held, videos = self.data.held_out, self.data.videos
            count = max(len(videos[p]) for p in held)
            return References(torch.stack([videos[p][i] for p, i in self.data.rounds(held, count)]), None)
        familiar = self._reference(self.familiar, track) if self.familiar else None
        return References(self._reference(self.data.held_out, track), familiar)

    def _reference(self, prompts: Sequence[str], track: Track) -> Tensor:
        pairs = [Request(p, REFERENCE_SEEDS + i) for i in range(REFERENCE_CLIPS) for p in prompts]
        return torch.cat([to_uint8(self.data.clips([p], [s])) for p, s in track(pairs, "judge's reference videos")])

    def student_clips(self, per_prompt: int, prompts: Sequence[str] | None = None) -> Tensor:
        """Rollouts [n * P, 3, F, H, W] uint8 of the averaged student on held-out prompts (all of them n times), with the
        same noise at every call; of a stream its last clip."""
        run, family = self.run, self.run.family
        names = list(prompts or self.data.held_out) * per_prompt
        size, videos = run.config.evaluation.batch or len(names), []
        length = run.config.stream.frames or family.latents.frames
        for number, start in enumerate(range(0, len(names), size)):
            rng = generator(0, 0, "evaluation", number)
            latents = sample_policy(run, names[start : start + size], rng, average=True, frames=length)
            videos.append(to_uint8(clip(run, latents, length - family.latents.frames)).cpu())
        return torch.cat(videos)

    @contextlib.contextmanager
    def _base_student(self) -> Iterator[None]:
        """The averaged student is the base student inside the block."""
        state, trained = self.run.state, self.run.state.ema.shadow
        if state.reference is not None:
            state.ema.shadow = {n: p.detach() for n, p in state.reference.named_parameters()}
        else:
            state.ema.shadow = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in trained.items()}
        try:
            yield
        finally:
            state.ema.shadow = trained

    def evaluate(self, *, base: bool = False) -> Scores:
        """The judge's scores on held-out prompts and, of the discriminator, its accuracy there and its agreement with the
        judge. Empty on ranks other than 0. base: of the base student, by the judge alone."""
        count, held = self.run.config.evaluation.rollouts, self.data.held_out
        with self._base_student() if base else contextlib.nullcontext():
            clips = self.student_clips(count)
            familiar = self.student_clips(count, self.familiar) if self.familiar else None
        if self.references is None:
            return {}
        self.sample = torch.cat(list(clips[: min(SAMPLE_COLUMNS, len(held))]), -1)  # next to each other
        prompts = held * count
        measured = self.judge.by_clip(clips.numpy(), prompts)
        self.by_prompt = measured.reshape(count, len(held)).mean(0).tolist()
        row: Scores = {
            "step": 0 if base else self.run.state.step,
            **self.judge(clips, prompts, self.references.held_out),
        }
        if familiar is not None and self.references.familiar is not None:
            scores = self.judge(familiar, self.familiar * count, self.references.familiar)
            row |= {f"first_{key}": scores[key] for key in ("residual_px", "general", "background")}
        if METHODS[self.run.config.method].uses_discriminator and not base:
            row |= self._of_discriminator(clips, prompts, measured)
        return row

    @torch.no_grad()
    def _of_discriminator(self, clips: Tensor, prompts: list[str], measured: np.ndarray) -> Scores:
        """Accuracy on held-out pairs, correlation with the judge within prompts, and the scores of the model that the
        discriminator was before training."""
        run, held = self.run, self.data.held_out
        keys = self.data.rounds(held, run.config.evaluation.rollouts)
        size, mine, theirs = run.config.evaluation.batch or len(prompts), [], []
        before: list[dict[str, Tensor]] = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            teacher = run.encoded(keys[part], self.data.picked(keys[part]))
            student = run.discriminator.encode(shown(clips[part], run.discriminator_device))
            mine.append(run.discriminator.score(student, prompts[part]).cpu())
            theirs.append(run.discriminator.score(teacher, prompts[part]).cpu())
            before.append(run.discriminator.reference_scores(student, prompts[part]))
        scores, of_teacher = torch.cat(mine), torch.cat(theirs)
        row: Scores = {"held_out_accuracy": (of_teacher > scores).float().mean().item()}
        for name in before[0]:
            row[f"reference_{name}"] = torch.cat([found[name] for found in before]).mean().item()
        if self.judge.fault and run.config.evaluation.rollouts > 1:
            tables = [a.reshape(-1, len(held)) for a in (scores.numpy(), -measured)]
            centred = [(a - a.mean(0)).ravel() for a in tables]
            row["reward_physics_correlation"] = float(np.corrcoef(*centred)[0, 1])
        return row

    def teacher_row(self) -> Scores:
        """The teacher's scores, on videos that are not the reference's where it makes more for nothing."""
        held, count = self.data.held_out, self.run.config.evaluation.rollouts
        assert self.references is not None
        reference = self.references.held_out
        if not self.judge.free_reference:
            return self.judge(reference, [], reference)
        prompts = held * count
        seeds = [TEACHER_ROW_SEEDS + i // len(held) for i in range(len(prompts))]
        return self.judge(to_uint8(self.data.clips(prompts, seeds)), prompts, reference)

    # -- what a run leaves -----------------------------------------------------------------------------------

    def weights(self) -> TrainedWeights:
        """The averaged student's weights with adapters merged, and the adapters."""
        student = self.run.family.student
        with self.run.state.ema.applied(student), merged_lora(student):
            state = {n: whole(p).clone() for n, p in student.state_dict().items()}
        merged = {n.replace(".base_layer", ""): p for n, p in state.items() if ".lora_" not in n}
        return TrainedWeights(merged, {n: p for n, p in state.items() if ".lora_" in n})

    def save_samples(self, path: Path) -> None:
        """Clips [n, P, 3, F, H, W] of the first held-out prompts: base student, the trained one from the same noise, and
        the teacher."""
        count, held = SAMPLES_PER_PROMPT, self.data.held_out
        prompts = held[:SAMPLE_PROMPTS]

        def pick(clips: Tensor) -> Tensor:
            return clips.view(count, len(held), *clips.shape[1:])[:, : len(prompts)]

        student = pick(self.student_clips(count))
        with self._base_student():
            base = pick(self.student_clips(count))
        if not self.run.ranks.lead:
            return
        teacher = torch.stack([self.data.videos[p][i] for p, i in self.data.rounds(prompts, count)])
        clips = {"base": base, "student": student, "teacher": teacher.view_as(student)}
        fps = json.dumps(self.run.family.video.fps)
        about = {"prompts": json.dumps(prompts), "fps": fps, "judge": self.data.teacher.judge}
        save_tensors({name: x.contiguous() for name, x in clips.items()}, path, about)
