"""What one training iteration costs on a named GPU: FLOPs, bytes moved, memory, and the time by phase, a floor and a model.

The products of the student and of VideoReward are counted by the formulas of `formulas.py`; the VAE, the toy discriminator,
all kernels that are no products and what autograd keeps by `meters.py`, which runs the real modules on the meta device. Not
counted: noise, the loss, the merge of adapters, pixels' preparation. No checkpoint is read. A sum of memory leaves out what an
allocator and kernels need for themselves.

Legend: b samples of a shard, F x H x W frames and pixels of a video, L tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.discriminators.config import DISCRIMINATORS, new_discriminator
from afd_fast.errors import ConfigError, extra
from afd_fast.estimate import formulas
from afd_fast.estimate.formulas import GPUS, Student, Work, total
from afd_fast.estimate.meters import Kept, Traffic, graph_bytes, metered, student_traffic
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.student import WAN, Family, StudentConfig, entry
from afd_fast.students.student import family as make_family
from afd_fast.students.toy.model import ToyStudent
from afd_fast.students.wan.family import latent_size
from afd_fast.students.wan.supported import check_trained
from afd_fast.students.wan.vae import WanDecoder

with extra("train"):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

OPTIMISER = 4 * (3 + 7)  # bytes a parameter: clipping reads twice and writes, AdamW reads 4 and writes 3, in float32
AVERAGE = 4 * 3  # the EMA reads two and writes one
REWARD_TEXT = 900  # tokens of VideoReward's input apart from the video's: about 780 of the template, 120 of a prompt


@dataclass
class Networks:
    """A configuration's family on the meta device, the student with its adapters, and what was assumed."""

    family: Family
    formulas: Student
    name: str
    size: int  # bytes of the student's weights
    real: bool  # with a text encoder

    @property
    def decoder(self) -> WanDecoder | None:
        """Wan's VAE; None where latents are pixels."""
        return self.family.vae if isinstance(self.family.vae, WanDecoder) else None


def networks(config: TrainConfig) -> Networks:
    """ConfigError for what a student cannot have, and for what is not counted."""
    uncounted = config.stream.frames or config.rollout.window or config.teacher_r
    if config.method != "afd" or config.update.history != "detached" or uncounted:
        raise ConfigError(
            "estimate counts method=afd with update.history=detached, without stream.frames, rollout.window and teacher_r"
        )
    if config.fsdp or config.sequence_parallel > 1:
        raise ConfigError("estimate counts one GPU that holds the whole student: leave out fsdp and sequence_parallel")
    if not config.student.lora_rank:
        raise ConfigError("estimate counts adapters: set student.lora_rank above 0")
    wan = entry(config.student.name) is WAN
    found = _wan(config) if wan else _toy(config)
    if found.decoder is not None:
        found.family.vae = WanDecoder(found.decoder.vae.to("meta"))
    found.family.student.to("meta")
    add_lora(found.family.student, config.student.lora_rank, list(found.family.lora_targets))
    return found


def _toy(config: TrainConfig) -> Networks:
    family = make_family(config.student, chunk=config.rollout.chunk)
    if not isinstance(family.student, ToyStudent):
        raise ConfigError(f"estimate has no formulas for the family {family.name!r}")
    return Networks(family, formulas.toy(family.student.config), "ToyStudent", 4, False)


def _wan(config: TrainConfig) -> Networks:
    options, chunk = config.student, config.rollout.chunk
    check_trained(options.name)
    size = latent_size(options, chunk)
    frames, height, width = size.frames, size.height, size.width
    tiny = StudentConfig("tiny", None, frames, height, width, lora_rank=options.lora_rank, device="cpu")
    family = make_family(tiny, chunk=chunk)
    name, size_of, real = "CausalWan (tiny)", 4, False
    if options.name != "tiny":
        with extra("train"):
            from diffusers import AutoencoderKLWan

        large = "14b" in options.name.lower()
        name, size_of, real = f"CausalWan {'14B' if large else '1.3B'} in bfloat16", 2, True
        with torch.device("meta"):
            family.student = CausalWan(CausalWanConfig.wan_14b() if large else CausalWanConfig.wan_1_3b())
            vae: Any = AutoencoderKLWan()  # diffusers has no types
            family.vae = WanDecoder(vae.bfloat16())
        family.student.bfloat16()
    assert isinstance(family.student, CausalWan)
    counted = formulas.wan(family.student.config, *family.latents[1:], chunk, size_of)
    return Networks(family, counted, name, size_of, real)


@dataclass
class Judge:
    """A discriminator on b samples: one update on pairs, scores, and bytes of what it holds and of what its graph keeps."""

    name: str
    update: Work
    score: Work
    weights: int
    trained: int
    kept: int


def toy_judge(config: TrainConfig, family: Family, b: int) -> Judge:
    """The real ToyDiscriminator on the meta device, in float32."""
    model = new_discriminator(config.discriminator, family.video, torch.device("meta"))
    video = family.video

    def clips(n: int) -> Tensor:
        return torch.empty(n, 3, video.frames, video.height, video.width, device="meta", dtype=torch.float32)

    calls = 2 if config.discriminator.r1 else 1
    with (kept := Kept(model)):
        model.score(clips(2 * b), ["a"] * 2 * b)
    update, _ = metered(lambda: model.score(clips(2 * b), ["a"] * 2 * b).sum().backward(), 4)
    with torch.no_grad():
        score, _ = metered(lambda: model.score(clips(b), ["a"] * b), 4)
    trained = sum(p.numel() for p in trainable(model).values())
    return Judge("ToyDiscriminator", calls * update, score, 4 * trained, trained, calls * kept.take())


def reward_judge(config: TrainConfig, family: Family, b: int) -> Judge:
    """VideoReward of the published size (Qwen2-VL-2B, tower frozen, language model checkpointed, adapters in bfloat16)."""
    with extra("train"):
        from transformers import Qwen2VLModel

    from afd_fast.discriminators.videoalign.inputs import PATCH, TEMPORAL, sample_frames, smart_size
    from afd_fast.discriminators.videoalign.model import RewardOptions, RewardSettings, qwen2_vl_2b

    c, s = qwen2_vl_2b(), RewardSettings()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2VLModel(c).parameters())
    height, width = smart_size(family.video.height, family.video.width, s.min_pixels, s.max_pixels)
    grid = (
        len(sample_frames(family.video.frames, RewardOptions().clip_fps, s.fps)) // TEMPORAL,
        height // PATCH,
        width // PATCH,
    )
    critic, lm = config.discriminator, formulas.language_model(c.text_config)
    rank, calls = critic.lora_rank or 64, 2 if critic.r1 else 1
    length = grid[0] * grid[1] * grid[2] // 4 + REWARD_TEXT
    trained = lm.layers * rank * sum(i + o for i, o in lm.linears) + lm.width

    def one(n: int) -> formulas.Work:
        light = formulas.reward_traffic(c, n, family.video[:3], grid, length)
        products = formulas.vision_tower(c.vision_config, n, grid) + lm.forward(*formulas.causal(n, length), rank)
        return products + light.encode + light.forward

    train = (
        one(2 * b)
        + lm.forward(*formulas.causal(2 * b, length), rank)
        + lm.backward(*formulas.causal(2 * b, length), rank)
        + formulas.reward_traffic(c, 2 * b, family.video[:3], grid, length).backward
    )
    kept = 2 * b * length * 2 * (lm.layers * lm.width + sum(i + o for i, o in lm.linears))  # inputs, one block's rest
    weights = 2 * parameters + 4 * trained
    return Judge("VideoReward (Qwen2-VL-2B)", calls * train, one(b), weights, trained, calls * kept)


Held = list[tuple[str, float, tuple[str, ...]]]  # what, bytes, the phases it is there in; none: always


def peak_of(memory: Held) -> tuple[float, str]:
    """(bytes, phase) of the largest phase."""
    phases = dict.fromkeys(phase for _, _, where in memory for phase in where)
    return max((sum(n for _, n, where in memory if not where or p in where), p) for p in phases)


@dataclass
class Measured:
    """A configuration's networks, and what one sample needs of them: metered once, whatever the batch is."""

    net: Networks
    decode: Work
    decoding: int  # bytes at the decoder's peak
    graphs: list[int]  # bytes that autograd keeps of each chunk


def measure(config: TrainConfig) -> Measured:
    """Run what does not depend on the batch. ConfigError for what is not counted."""
    net, decode, decoding = networks(config), Work(), 0  # the toy's latents are pixels
    if net.decoder is not None:
        decoder, latents = net.decoder, torch.empty(1, *net.family.latents, device="meta", dtype=torch.float32)
        with torch.no_grad():
            decode, decoding = metered(lambda: decoder.decode(latents), net.size)
    return Measured(net, decode, decoding, graph_bytes(net.family))


def judged(config: TrainConfig, family: Family) -> Judge:
    """The configuration's discriminator on a shard."""
    judge = toy_judge if config.discriminator.name in DISCRIMINATORS else reward_judge
    return judge(config, family, samples(config)[0])


def samples(config: TrainConfig) -> tuple[int, int]:
    """Of a shard, and of one backward."""
    b = config.prompts_per_step * config.rollouts_per_prompt // config.shards
    return b, min(b, config.update.batch or b)


def memory(config: TrainConfig, measured: Measured, judge: Judge) -> Held:
    """What an iteration holds, with any batch, shards and `update` of the configuration that was measured."""
    net, graphs, (b, rows) = measured.net, measured.graphs, samples(config)
    family, s = net.family, net.formulas
    trained = sum(p.numel() for p in trainable(family.student).values())
    vae = 0 if net.decoder is None else sum(p.nbytes for p in net.decoder.vae.parameters())
    clips = 12 * b * config.shards * math.prod(family.video[:3])
    merged = s.stack.layers * s.stack.size * sum(i * o for i, o in s.stack.linears)
    return [
        ("student's weights", sum(p.nbytes for p in family.student.parameters()) - 4 * trained, ()),
        ("adapters, gradients, AdamW, EMA", 20 * trained, ()),
        ("discriminator's weights", judge.weights, ()),
        ("its gradients and AdamW states", 12 * judge.trained, ()),
        ("VAE's weights", vae, ()),
        ("text encoder's weights", 2 * formulas.T5_PARAMETERS if net.real else 0, ()),
        (f"KV cache of {b} samples", b * s.cache_bytes, ("rollout",)),
        (f"KV cache of {rows} samples", rows * s.cache_bytes, ("reference", "backward")),
        ("merged weights next to them", merged, ("rollout", *(["reference"] if config.update.v_old == "ema" else []))),
        (f"VAE: activations and pixels of {b} samples", b * measured.decoding, ("decode",)),
        ("student's clips", clips, ("decode", "discriminator", "score")),
        ("teacher's clips", clips, ("discriminator", "score")),
        ("discriminator's activations", judge.kept, ("discriminator",)),
        (f"activations of {'a chunk' if config.update.chunked else 'all chunks'}",
         rows * (max(graphs) if config.update.chunked else sum(graphs)), ("backward",)),
    ]  # fmt: skip


@dataclass
class Estimate:
    """phases: work of an iteration on one device."""

    config: TrainConfig
    about: list[str]
    phases: dict[str, Work]
    memory: Held
    measured: Measured

    @property
    def peak(self) -> tuple[float, str]:
        """(bytes, phase) of the largest phase."""
        return peak_of(self.memory)

    def fitting(self, gpu: formulas.GPU) -> list[str]:
        """The first settings that fit the GPU's memory with the same work: one sample for each backward, then more shards.
        Empty where none does."""
        config = self.config
        more = [n for n in range(config.shards + 1, config.prompts_per_step + 1) if config.prompts_per_step % n == 0]
        single = ["update.batch=1"] if config.update.batch != 1 else []
        for keys in ([single] if single else []) + [[*single, f"shards={n}"] for n in more]:
            other = with_overrides(config, keys)
            if peak_of(memory(other, self.measured, judged(other, self.measured.net.family)))[0] < gpu.memory:
                return keys
        return []


def estimate(config: TrainConfig) -> Estimate:
    """ConfigError for a configuration that cannot run or is not counted."""
    measured = measure(config)
    net, shards, (b, rows) = measured.net, config.shards, samples(config)
    family, s = net.family, net.formulas
    judge = judged(config, family)
    text = formulas.text_encoder(config.prompts_per_step // shards, s.text_len) if net.real else Work()
    trained, sampler = sum(p.numel() for p in trainable(family.student).values()), config.rollout
    whole = student_traffic(family, b)
    graph = whole if rows == b else student_traffic(family, rows)
    phases = {
        "prompts": shards * text,
        "rollout": shards * (s.rollout(b, sampler, config.student.lora_rank) + whole.rollout(sampler)),
        "decode": shards * b * measured.decode,
        "discriminator": config.discriminator.steps * (shards * judge.update + Work(bytes=OPTIMISER * judge.trained)),
        "score": shards * judge.score,
        **{name: shards * work for name, work in update(config, s, b, graph).items()},
        "optimiser": Work(bytes=(OPTIMISER + AVERAGE) * trained),
    }
    about = [f"student: {net.name}; discriminator: {judge.name}; {shards} x {b} videos of {family.video.frames} frames, "
             f"{family.video.height} x {family.video.width} pixels; no checkpoint was read"]  # fmt: skip
    if net.real:
        about.append("prompts: a pass of UMT5-XXL for those that are new; later iterations have none")
    if judge.name.startswith("VideoReward"):
        about.append(f"the discriminator's text is taken to be {REWARD_TEXT} tokens")
    return Estimate(config, about, phases, memory(config, measured, judge), measured)


def update(config: TrainConfig, s: Student, b: int, traffic: Traffic) -> dict[str, Work]:
    """The update of b samples: v_ref and v_old, and the policy's forward and backward. traffic: of a backward's samples."""
    rows = min(b, config.update.batch or b)
    passes, frozen = b / rows, s.velocity(b) + s.encode(b) + b / rows * traffic.velocity(traffic.plain)
    reference = (1 / config.update.ref_every if config.loss.ref_coef else 0) * frozen
    policy = passes * traffic.policy()
    if config.update.chunked and config.loss.weighting != "none":  # first without a graph
        policy += passes * traffic.velocity(traffic.adapted)
    if config.update.v_old == "ema":
        reference += frozen + passes * s.merge(config.student.lora_rank)
    return {"reference": reference, "backward": s.policy(b, config) + policy}


def floor(config: TrainConfig) -> dict[str, str]:
    """Memory and least time for a dry run, by arithmetic; nothing for what is not counted."""
    try:
        e = estimate(config)
    except ConfigError:
        return {}
    peak, phase = e.peak
    return {
        "memory by arithmetic": f"{peak / 1e9:.3g} GB in {phase}",
        "least time of an iteration": f"{sum(w.seconds(GPUS['h100']) for w in e.phases.values()):.3g} s on one {GPUS['h100'].name}",
    }


def gpu_of(name: str) -> formulas.GPU:
    """A row of `formulas.GPUS`; ConfigError that names them."""
    if name.lower() not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def tables(e: Estimate, gpu: formulas.GPU) -> tuple[Table, Table]:
    """Work and times of every phase, and memory."""
    title = f"one iteration on {gpu.name}: a floor, not a measurement"
    time = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # whole names in 80 columns
    for column in (
        "phase",
        "TFLOP bf16",
        "TFLOP fp32",
        "GB, GEMMs",
        "GB, rest",
        "floor, ms",
        "likely, ms",
        "bound by",
    ):
        named = column in ("phase", "bound by")
        time.add_column(column, justify="left" if named else "right", no_wrap=named)
    floor, likely = (sum(w.seconds(g) for w in e.phases.values()) for g in (gpu, gpu.likely()))
    for name, w in (e.phases | {"all": total(e.phases.values())}).items():
        seconds = (floor, likely) if name == "all" else (w.seconds(gpu), w.seconds(gpu.likely()))
        figures = (w.half / 1e12, w.single / 1e12, w.bytes / 1e9, w.light / 1e9, *(1e3 * s for s in seconds))
        if w.bytes:
            time.add_row(name, *map(short, figures), "" if name == "all" else w.bound(gpu))
    products, bandwidth = formulas.LIKELY
    time.caption = f"likely: {products:.0%} of the products' peak, {bandwidth:.0%} of the bandwidth (an assumption); rest: no products"
    size = Table(title="memory, without what the allocator and kernels need", title_justify="left")
    size.add_column("what")
    size.add_column("GB", justify="right")
    size.add_column("in")
    for name, n, where in e.memory:
        if n:
            size.add_row(name, short(n / 1e9), ", ".join(where) or "always")
    peak, phase = e.peak
    size.add_row("at the peak", short(peak / 1e9), phase)
    if peak >= gpu.memory:
        keys = e.fitting(gpu)
        way = f"{' '.join(keys)} does" if keys else "lower rollouts_per_prompt or the size of the videos"
        size.caption = f"[red]does not fit[/] in {gpu.memory / 1e9:.0f} GB: {way}"
    return time, size
