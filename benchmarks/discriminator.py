"""Times of the video discriminator with random weights: pairs per second, tokens, memory, attention backend.

    python -m benchmarks.discriminator [--size tiny|2b] [--pairs N] [--repeats N] [--attention auto] [--csv FILE]

Rows: preprocess and encode (vision tower) alone; score and train (Bradley-Terry forward, backward, AdamW) of a batch of
pairs: `packed` as shipped, `cached` with the teacher's features kept, `padded` as transformers does it (the same modules
with its sdpa, right padding, masks, one tower call per side, nothing kept). No row has an lm_head. Prompts have
different lengths (20 to 200 tokens). The text is words with made-up ids, as long as the template.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig

from afd_fast.discriminators.discriminator import Features, PairScores
from afd_fast.discriminators.objective import Objective
from afd_fast.discriminators.videoalign.inputs import REWARD_TOKENS, VIDEO_TOKEN, to_patches
from afd_fast.discriminators.videoalign.model import (
    ATTENTION,
    RewardOptions,
    RewardSettings,
    VideoReward,
    qwen2_vl_2b,
)
from afd_fast.ops.attention import BACKENDS, resolve_backend
from benchmarks.rows import CUDA, DEVICE, DTYPE, Arguments, Row, Table, ranged, timed


class Words:
    """A tokenizer with made-up ids, one per word; the special tokens are the last of the vocabulary."""

    def __init__(self, vocab: int) -> None:
        self.special = {VIDEO_TOKEN: vocab - 4} | {t: vocab - 3 + i for i, t in enumerate(REWARD_TOKENS)}
        self.split = re.compile("|".join(map(re.escape, self.special)) + r"|[^\s<]+|<")

    def __call__(self, text: str, add_special_tokens: bool = False) -> "Words":
        self.input_ids = [self.special.get(w) or 1 + hash(w) % 200 for w in self.split.findall(text)]
        return self

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.special[token]

    def get_vocab(self) -> dict[str, int]:
        return self.special

    get_added_vocab = get_vocab


def template(tokens: int) -> str:
    """A stand-in with as many tokens and the reward tokens where VideoAlign has them."""

    def part(share: float) -> str:
        return " ".join(["word"] * int(tokens * share))

    return f"{part(0.35)} {REWARD_TOKENS[0]} {part(0.35)} {REWARD_TOKENS[1]} {part(0.3)} {{text_prompt}} {REWARD_TOKENS[2]}"


def tiny() -> Qwen2VLConfig:
    """The architecture at its smallest."""
    text = dict(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    vision = dict(depth=4, embed_dim=64, mlp_ratio=2, num_heads=4, hidden_size=128)
    return Qwen2VLConfig(text_config=text, vision_config=vision)


class Bench:
    """A model with random weights, a batch of pairs, and the ways to score and train them."""

    def __init__(self, size: str, pairs: int, attention: str) -> None:
        torch.manual_seed(0)
        big = size == "2b"
        config = qwen2_vl_2b() if big else tiny()
        settings = RewardSettings() if big else RewardSettings(min_pixels=56 * 56, max_pixels=112 * 112)
        with torch.device(DEVICE):
            words = Words(config.get_text_config().vocab_size)
            prompt = template(780 if big else 60)
            self.model = VideoReward(config, words, prompt, settings, RewardOptions(attention=attention), DTYPE)
            self.model.add_lora(64, 128)
        self.model.to(DEVICE)
        shape = (pairs, 3, 81, 480, 832) if big else (pairs, 3, 33, 96, 160)
        self.teacher, self.student = (torch.rand(shape, device=DEVICE) for _ in range(2))
        self.prompts = [" ".join(["w"] * (20 + 180 * i // max(1, pairs - 1))) for i in range(pairs)]
        self.kept = self.model.encode(self.teacher)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-5)
        video = [len(c) for c in self.kept.clips]
        text = [len(self.model.prompts.prefix) + len(self.model.prompts.suffix(p)) for p in self.prompts]
        self.tokens = 2 * (sum(video) + sum(text))
        self.padding = 2 * pairs * (max(video) + max(text)) - self.tokens

    def every(self) -> PairScores:
        """Scores of both sides from pixels."""
        return self.model.pair_scores(self.teacher, self.student, self.prompts)

    def cached(self) -> PairScores:
        """The same with the teacher's features kept."""
        return self.model.pair_scores(Features(self.kept.clips), self.student, self.prompts)

    def train(self, scores: Callable[[], PairScores]) -> None:
        """One step of AdamW on Bradley-Terry."""
        loss = Objective()(*scores())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[None]:
        """transformers' sdpa inside the block; around a backward too, as checkpointing runs the forward again."""
        modules = (self.model.backbone, self.model.backbone.visual, self.model.backbone.language_model)
        for m in modules:
            m.config._attn_implementation_internal = "sdpa"
        try:
            yield
        finally:
            for m in modules:
                m.config._attn_implementation_internal = ATTENTION

    def padded(self) -> PairScores:
        """The same through transformers' padded path, with the same weights."""
        return PairScores(*(self._padded(x, self.model.settings) for x in (self.teacher, self.student)))

    def _padded(self, videos: Tensor, s: RewardSettings) -> Tensor:
        model, lm = self.model, self.model.backbone.language_model
        prompts: Any = model.prompts  # ids come from a tokenizer, which has no types
        with torch.no_grad():
            x, grid = to_patches(videos, clip_fps=16.0, fps=s.fps, min_pixels=s.min_pixels, max_pixels=s.max_pixels)
            grids = torch.tensor([grid] * len(videos), device=DEVICE)
            seen = model.backbone.visual(x.flatten(0, 1).to(DTYPE), grid_thw=grids).pooler_output
        mark, pad = prompts.video_id, 0
        rows = [[*prompts.prefix, *[mark] * (len(seen) // len(videos)), *prompts.suffix(p)] for p in self.prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=DEVICE)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=DEVICE)
        embeds = lm.embed_tokens(ids)
        embeds = embeds.masked_scatter(ids.eq(mark)[..., None], seen.to(embeds))
        with model._autocast():
            hidden = lm(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                position_ids=torch.arange(longest, device=DEVICE).expand(3, len(rows), -1),
            ).last_hidden_state  # fmt: skip
        states = torch.stack([h[[r.index(i) for i in prompts.reward_ids]] for h, r in zip(hidden, rows)])
        return model.logits(states).sum(1)


class Report:
    """Rows of a bench's batch of pairs, with pairs per second."""

    def __init__(self, bench: Bench, repeats: int, table: Table) -> None:
        self.bench, self.repeats, self.table = bench, repeats, table

    def add(
        self, name: str, variant: str, call: Callable[[], Any], kind: str = "forward", error: float | None = None
    ) -> None:
        pairs = len(self.bench.prompts)
        shape = f"{pairs} pairs, {self.bench.tokens} tok"
        row = Row(f"discriminator_{name}", variant, shape, timed(call, self.repeats), kind, max_err=error)
        self.table.add(row)
        peak = "" if row.times.peak_mib is None else f", peak {row.times.peak_mib:.0f} MiB"
        print(f"{'':42s} {pairs / row.times.ms * 1e3:.2f} pairs/s{peak}", flush=True)


def measure(b: Bench, report: Report, error: float) -> None:
    """Every row. error: of the packed scores against the padded ones."""
    settings = b.model.settings

    def preprocess() -> Any:
        return to_patches(
            b.student, clip_fps=16.0, fps=2.0, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
        )

    with torch.no_grad():
        report.add("preprocess", "device", preprocess)
        report.add("encode", "packed", lambda: b.model.encode(b.student))
        report.add("score", "packed", b.every, error=error)
        report.add("score", "cached", b.cached)
        with b.plain_attention():
            report.add("score", "padded", b.padded)
    report.add("train", "packed", lambda: b.train(b.every), "train")
    report.add("train", "cached", lambda: b.train(b.cached), "train")
    with b.plain_attention():
        report.add("train", "padded", lambda: b.train(b.padded), "train")


@torch.no_grad()
def checked_error(b: Bench) -> float:
    """The largest difference of packed and padded scores. SystemExit where they disagree."""
    with b.plain_attention():
        padded = torch.cat(b.padded())
    error = (torch.cat(b.every()) - padded).abs().max().item()
    if error > (0.1 if CUDA else 1e-4):
        raise SystemExit(f"packed and padded scores differ by {error:g}: nothing is timed")
    return error


def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("--size", choices=("tiny", "2b"), default="2b" if CUDA else "tiny")
    parser.add_argument("--pairs", type=ranged(int, 1), default=4)
    parser.add_argument("--repeats", type=ranged(int, 1), default=5)
    parser.add_argument("--attention", choices=("auto", *BACKENDS), default="auto")
    args = parser.parsed()
    b = Bench(args.size, args.pairs, args.attention)
    tower, text = (
        resolve_backend(args.attention, b.teacher.device, DTYPE, without="fa3" if width % 64 else "")
        for width in (80, 128)
    )
    print(f"attention: {tower} (tower), {text} (language model); {b.tokens} tokens, padding would be {b.padding}")
    measure(b, Report(b, args.repeats, Table(args.csv)), checked_error(b))


if __name__ == "__main__":
    main()
