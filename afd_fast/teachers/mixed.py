"""Several teachers at once, each prompt with exactly one of them.

A prompt that a single teacher knows is that one's. One that several know is theirs whose clips of it have the largest mean weight. What
the weights leave open is divided by the shares, in an order that is a hash of the prompts: the same in every run, and independent of what
a list begins with.
"""

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.teachers.teacher import PromptSplit, Request, Teacher, TeacherBase, nothing


def parse(spec: str) -> dict[str, float] | None:
    """Teachers and their shares of "[a, b]" (equal shares), '["a", "b"]' or '{"a": 0.7, "b": 0.3}'; None for the spec of a single
    teacher. ConfigError for fewer than two, for one that is there twice, and for shares that are not positive with the sum 1."""
    if not spec.startswith(("[", "{")):
        return None
    try:
        given = json.loads(spec, object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        if not (spec.startswith("[") and spec.endswith("]")) or '"' in spec:
            raise ConfigError(
                f"teacher={spec} is no list of teachers: write [a,b], or as JSON "
                '["a", "b"] or, with shares, {"a": 0.7, "b": 0.3}'
            ) from None
        given = [name.strip() for name in spec[1:-1].split(",")]
    pairs = spec.startswith("{")
    names = [name for name, _ in given] if pairs else given
    if len(names) < 2 or not all(isinstance(n, str) and n for n in names) or len(set(map(_same, names))) < len(names):
        raise ConfigError(
            f"teacher={spec} must name two teachers or more, each once: a single one is written without brackets"
        )
    if not pairs:
        return dict.fromkeys(names, 1 / len(names))
    shares = [share for _, share in given]
    if not all(type(share) in (int, float) and share > 0 for share in shares) or not math.isclose(
        sum(shares), 1, abs_tol=1e-6
    ):
        raise ConfigError(f"the shares of teacher={spec} must be positive numbers with the sum 1")
    return {name: float(share) for name, share in given}


def _same(spec: str) -> str:
    """A teacher's spec, with the path of its files in one form."""
    kind, colon, place = spec.partition(":")
    return f"{kind}:{Path(place).resolve()}" if colon and kind in ("folder", "api") else spec


CLIPS = 64  # of a prompt whose weights are asked for


class MixedTeacher(TeacherBase):
    """Teachers by their specs; shares as of `parse`. ConfigError for teachers that no one judge can score, for shares where no prompt is
    known to two of them, and for a teacher that is left without a prompt."""

    def __init__(self, teachers: Mapping[str, Teacher], shares: Mapping[str, float]):
        self.teachers = teachers
        first, *others = teachers.values()
        self.name, self.fps, self.judge = f"[{', '.join(t.name for t in teachers.values())}]", first.fps, first.judge
        if odd := {t.judge for t in others} - {self.judge}:
            raise ConfigError(
                f"{self.name}: the videos are judged by {self.judge} and by {', '.join(sorted(odd))}, expected one judge: "
                "train on one teacher, or on folders of videos alone"
            )
        self.parts = {spec: teacher.split() for spec, teacher in teachers.items()}
        for teacher, part in zip(teachers.values(), self.parts.values()):
            if teacher.familiar(part.held_out):
                raise ConfigError(f"{teacher.name} shows another look, which is judged by itself: train on it alone")
        self.owner = self._divided(shares)
        if idle := [spec for spec in teachers if spec not in self.owner.values()]:
            raise ConfigError(
                f"teacher={idle[0]} is left without a prompt: give it a larger share or its clips larger weights, or leave it out"
            )

    def _divided(self, shares: Mapping[str, float]) -> dict[str, str]:
        """By prompt, the spec of its teacher."""
        known = defaultdict[str, list[str]](list)
        for spec, part in self.parts.items():
            for prompt in dict.fromkeys([*part.train, *part.held_out]):
                known[prompt].append(spec)
        groups = defaultdict[tuple[str, ...], list[str]](list)
        for prompt, specs in known.items():
            quality = {spec: self._quality(spec, prompt) for spec in specs}
            best = max(quality.values())
            groups[tuple(spec for spec in specs if math.isclose(quality[spec], best))].append(prompt)
        if len(set(shares.values())) > 1 and all(len(specs) == 1 for specs in groups):
            raise ConfigError(f"{self.name} have no prompt in common to share: leave the shares out")
        owner = dict[str, str]()
        for among, prompts in groups.items():
            prompts.sort(key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
            total, start, upto = sum(shares[spec] for spec in among), 0, 0.0
            for spec in among:
                upto += shares[spec] / total
                end = round(upto * len(prompts))
                owner |= dict.fromkeys(prompts[start:end], spec)
                start = end
        return owner

    def _quality(self, spec: str, prompt: str) -> float:
        """The mean weight of a teacher's clips of a prompt; 1 where it has none yet."""
        teacher = self.teachers[spec]
        weights = [teacher.weight(prompt, seed) for seed in teacher.seeds(prompt, range(CLIPS))]
        return statistics.fmean(weights) if weights else 1.0

    def _of(self, prompt: str) -> Teacher:
        if prompt not in self.owner:
            raise ConfigError(f"no teacher of {self.name} knows the prompt {prompt!r}")
        return self.teachers[self.owner[prompt]]

    def split(self) -> PromptSplit:
        """Each teacher's prompts in its order, and all of them evenly mixed, so that the first few are everybody's."""

        def merged(lists: Mapping[str, Sequence[str]]) -> list[str]:
            mine = [[p for p in prompts if self.owner[p] == spec] for spec, prompts in lists.items()]
            placed = [((i + 0.5) / len(prompts), p) for prompts in mine for i, p in enumerate(prompts)]
            return [prompt for _, prompt in sorted(placed, key=lambda place: place[0])]

        return PromptSplit(
            merged({spec: part.train for spec, part in self.parts.items()}),
            merged({spec: part.held_out for spec, part in self.parts.items()}),
        )

    def counts(self, split: PromptSplit) -> dict[str, str]:
        """Of each teacher how many of these prompts are its, in words."""
        train, held_out = ([self.owner[p] for p in prompts] for prompts in split)
        return {s: f"{train.count(s)} trained on, {held_out.count(s)} held out" for s in self.teachers}

    def __call__(self, prompt: str, seed: int) -> Tensor:
        return self._of(prompt)(prompt, seed)

    def _shared(self, requests: Sequence[Request]) -> dict[str, list[Request]]:
        """The requests of each teacher."""
        found: dict[str, list[Request]] = {spec: [] for spec in self.teachers}
        for request in requests:
            found[self.owner[request.prompt]].append(request)
        return found

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        """One teacher after the other; an error of the first leaves the others for the next run."""
        for spec, mine in self._shared(requests).items():
            self.teachers[spec].fetch(mine, done)

    def cost(self, requests: Sequence[Request]) -> str:
        shared = self._shared(requests)
        said = {spec: self.teachers[spec].cost(mine) for spec, mine in shared.items()}
        return (
            "; ".join(f"{spec} ({len(shared[spec])} videos): {text or 'free'}" for spec, text in said.items())
            if any(said.values())
            else ""
        )

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        return self._of(prompt).seeds(prompt, wanted)

    def weight(self, prompt: str, seed: int) -> float:
        return self._of(prompt).weight(prompt, seed)

    def file(self, prompt: str, seed: int) -> str:
        return self._of(prompt).file(prompt, seed)

    @property
    def problems(self) -> list[str]:
        return [line for teacher in self.teachers.values() for line in teacher.problems]
