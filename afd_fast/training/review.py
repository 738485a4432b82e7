"""Which of a teacher's clips look wrong: by their pixels alone, and by discriminators that have not seen them.

A discriminator is fitted several times, each time without one part of the clips, which it then scores (cross-fitting): a clip that it
has learnt would look right whatever it holds. It learns one of two contrasts, by which its scores are named:

* physics: to prefer a clip to the base student's rollouts of the same prompt. A clip that moves as they do scores low.
* prompt: to prefer a clip to clips of other prompts. A clip that does not show its prompt scores low.

The loss compares scores of one prompt alone, so a score means something only next to others of its prompt: the base student's rollouts,
and the prompt's other clips, with which a good clip agrees.

Legend: N clips, F frames, H x W pixels.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.judges.defects import Defects, defects, robust
from afd_fast.students.lora import trainable
from afd_fast.teachers.dataset import TeacherVideos, Track
from afd_fast.teachers.teacher import Request
from afd_fast.training.rollouts import clip, sample_policy
from afd_fast.training.run import Run
from afd_fast.training.state import generator
from afd_fast.training.update import DISC_GRAD_NORM, Pair, clip_gradients
from afd_fast.video_io import to_uint8

Contrast = Literal["physics", "prompt"]
CONTRASTS: dict[Contrast, str] = {"physics": "moves like the base student", "prompt": "does not show its prompt"}
FOLDS = 4
ROLLOUTS = 4  # of the base student per prompt
BATCH = 32  # pairs of a step, at most
LR = 5.0  # in units of the run's: a fit starts from nothing, has few steps and no student that it must not outrun
LISTED, GONE = -2.0, -4.0  # robust deviations: below the first a clip is listed, at the second its weight is 0


class Reviewed(NamedTuple):
    """A clip of the teacher's: what is wrong with it, nothing where it looks sound, and how often training should draw it.

    name, number: of the video and among its prompt's, as `TeacherVideos` has them. scores: by contrast, in robust deviations from the other
    clips, bad ones negative; empty for a clip with defects, or where none was fitted."""

    prompt: str
    name: str
    number: int
    weight: float
    reasons: list[str]
    defects: Defects
    scores: dict[Contrast, float]


def review(run: Run, data: TeacherVideos, track: Track, steps: int) -> list[Reviewed]:
    """Every clip of the data, worst first. steps: of each fit; 0: pixels alone. ConfigError where the clips are too few to fit on."""
    keys = [Request(prompt, i) for prompt, videos in data.videos.items() for i in range(len(videos))]
    found = defects(data.videos[p][i].numpy() for p, i in track(keys, "measuring pixels"))
    reasons, notes = {key: one.reasons for key, one in zip(keys, found)}, defaultdict[Request, list[str]](list)
    for key, one in zip(keys, found):
        if (first := keys[one.copy]) != key:
            said = f"a copy of {data.names[first.prompt][first.seed]} of {first.prompt!r}"
            (reasons if first.prompt == key.prompt else notes)[key].append(said)  # two prompts may fit one video
    sound = [key for key in keys if not reasons[key]]
    scores: dict[Request, dict[Contrast, float]] = defaultdict(dict)
    if steps:
        if len(sound) < 2 * FOLDS:
            raise ConfigError(
                f"{len(sound)} clips look sound, and a discriminator needs {2 * FOLDS} to be fitted: give more, or look at their "
                "pixels alone with --steps 0"
            )
        clips = _Clips(run, data, track)
        for contrast in CONTRASTS:
            if contrast == "prompt" and len({key.prompt for key in sound}) == 1:
                continue  # there is no other prompt
            for key, score in zip(sound, _cross_fitted(clips, sound, contrast, steps, track)):
                scores[key][contrast] = score
    listed = [
        Reviewed(
            key.prompt,
            data.names[key.prompt][key.seed],
            key.seed,
            *_verdict(reasons[key], notes[key], scores[key]),
            one,
            scores[key],
        )
        for key, one in zip(keys, found)
    ]
    return sorted(listed, key=lambda r: (r.weight, not r.reasons, min(r.scores.values(), default=-np.inf)))


def _verdict(reasons: list[str], notes: list[str], scores: dict[Contrast, float]) -> tuple[float, list[str]]:
    """Weight and reasons of a clip. reasons: for which alone it is left out. notes: for which it is only listed."""
    learned = [f"{CONTRASTS[c]} ({score:.1f})" for c, score in scores.items() if score < LISTED]
    weight = round(max(0.0, 1 - min(scores.values()) / GONE), 2) if learned else 1.0
    return 0.0 if reasons else weight, reasons + learned + notes


class _Clips:
    """The teacher's clips and the base student's, as the discriminator takes them. The student's have the numbers -1, -2 ..."""

    def __init__(self, run: Run, data: TeacherVideos, track: Track):
        self.run, self.data = run, data
        config = run.config
        self.size = min(
            BATCH, config.prompts_per_step * config.rollouts_per_prompt // config.shards
        )  # which its memory holds
        self.student: dict[Request, Tensor] = {}
        keys = [Request(p, -1 - i) for p in data.videos for i in range(ROLLOUTS)]
        batches = [keys[i : i + self.size] for i in range(0, len(keys), self.size)]
        for number, batch in enumerate(track(batches, "base student's rollouts")):
            rng = generator(config.seed, 0, "review", number)
            latents = sample_policy(run, [key.prompt for key in batch], rng, average=False)
            self.student |= zip(batch, to_uint8(clip(run, latents)).cpu())

    def pixels(self, key: Request) -> Tensor:
        """[3, F, H, W] uint8."""
        return self.student[key] if key.seed < 0 else self.data.videos[key.prompt][key.seed]

    def pair(self, teacher: Sequence[Request], others: Sequence[Request]) -> Pair:
        run = self.run
        return Pair(*(run.encoded(list(k), torch.stack([self.pixels(x) for x in k])) for k in (teacher, others)))

    @torch.no_grad()
    def scores(self, keys: Sequence[Request]) -> list[float]:
        """D of clips for their prompts."""
        found: list[float] = []
        for start in range(0, len(keys), self.size):
            part = list(keys[start : start + self.size])
            videos = self.run.encoded(part, torch.stack([self.pixels(key) for key in part]))
            found += self.run.discriminator.score(videos, [key.prompt for key in part]).tolist()
        return found


def _cross_fitted(clips: _Clips, keys: list[Request], contrast: Contrast, steps: int, track: Track) -> list[float]:
    """Of every clip the score by the fit that has not seen it, in robust deviations."""
    run = clips.run
    rng = generator(run.config.seed, 0, f"review {contrast}")
    part = (torch.randperm(len(keys), generator=rng) % FOLDS).tolist()
    before = {name: p.detach().clone() for name, p in trainable(run.discriminator).items()}
    margin = dict[Request, float]()  # over the base student's rollouts of the prompt
    ticks = iter(track(range(FOLDS * steps), f"fitting: {contrast}"))
    for fold in range(FOLDS):
        with torch.no_grad():
            for name, p in trainable(run.discriminator).items():
                p.copy_(before[name])
        _fit(clips, [key for key, f in zip(keys, part) if f != fold], contrast, steps, rng, ticks)
        held = [key for key, f in zip(keys, part) if f == fold]
        prompts = list(dict.fromkeys(key.prompt for key in held))
        rollouts = clips.scores([Request(p, -1 - i) for p in prompts for i in range(ROLLOUTS)])
        level = dict(zip(prompts, np.array(rollouts).reshape(-1, ROLLOUTS).mean(1).tolist()))
        margin |= {key: score - level[key.prompt] for key, score in zip(held, clips.scores(held))}
    next(ticks, None)  # to the end of the bar
    of_prompt = defaultdict[str, list[Request]](list)
    for key in keys:
        of_prompt[key.prompt].append(key)
    evidence = []
    for key in keys:
        others = [margin[other] for other in of_prompt[key.prompt] if other != key]
        agreement = margin[key] - float(np.median(others)) if others else 0.0
        evidence.append(margin[key] + agreement / 2)
    return [float(x) for x in robust(np.array(evidence))]


def _fit(
    clips: _Clips, seen: list[Request], contrast: Contrast, steps: int, rng: torch.Generator, ticks: Iterator[int]
) -> None:
    """Fit the discriminator, from where it is, to prefer these clips to those of the contrast."""
    run = clips.run
    parameters, optimizer = trainable(run.discriminator), run.state.disc_optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = LR * run.config.discriminator.lr
    objective = replace(run.config.discriminator.objective, r1=0.0)  # the penalty doubles the time

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    foreign = {prompt: [x for x in seen if x.prompt != prompt] or seen for prompt in {x.prompt for x in seen}}
    for _ in range(steps):
        next(ticks, None)
        picks = [seen[draw(len(seen))] for _ in range(clips.size)]
        if contrast == "physics":
            others = [Request(key.prompt, -1 - draw(ROLLOUTS)) for key in picks]
        else:
            others = [foreign[key.prompt][draw(len(foreign[key.prompt]))] for key in picks]
        optimizer.zero_grad()
        pair = clips.pair(picks, others)
        run.discriminator.paired_loss(*pair, [key.prompt for key in picks], objective, rng=rng).loss.backward()
        clip_gradients(parameters, DISC_GRAD_NORM, 0)
        optimizer.step()
