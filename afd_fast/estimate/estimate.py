"""What one training iteration costs at least on a named GPU: FLOPs, bytes moved, memory, and a floor of the time by phase.

The student's rollout and update and VideoReward are counted by the formulas of `flops.py`; the VAE, the toy discriminator
and what autograd keeps are counted by running the real modules on the meta device, where there are shapes and no numbers.
No checkpoint is read. A sum of memory leaves out what an allocator and kernels need for themselves.

Legend: b samples of a shard, F x H x W frames and pixels of a video, L tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError
from afd_fast.estimate import formulas as flops
from afd_fast.estimate.formulas import GPUS, Student, Work, total, work
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.toy import shipped as base_student
from afd_fast.students.wan.family import wan_system
from afd_fast.training.state import System, toy_system
from afd_fast.training.update import chunk_velocities

OPTIMISER = 4 * (3 + 7)  # bytes a parameter: clipping reads twice and writes, AdamW reads 4 and writes 3, in float32
AVERAGE = 4 * 3  # the EMA reads two and writes one
REWARD_TEXT = 900  # tokens of VideoReward's input beside a video's: about 780 of the template, 120 of a prompt


class Meter(TorchDispatchMode):
    """Bytes of the operands and results of what FlopCounterMode counts, and the most a single call takes."""

    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.bytes, self.largest = self.bytes + moved, max(self.largest, moved)
        return out


def metered(call: Callable, size: int) -> tuple[Work, int]:
    """The products of a call on the meta device with operands of `size` bytes, and the largest one's bytes."""
    with Meter() as meter, FlopCounterMode(display=False) as counter:
        call()
    return work(counter.get_total_flops(), meter.bytes / size, size), meter.largest


class Kept(saved_tensors_hooks):
    """Bytes autograd saves inside the block since the last `take`; every storage once, parameters not at all."""

    def __init__(self, module: nn.Module):
        own = {p.untyped_storage()._cdata for p in module.parameters()}
        self.storages = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                self.storages[storage._cdata] = storage
            return x

        super().__init__(pack, lambda x: x)

    def take(self) -> int:
        found = sum(s.nbytes() for s in self.storages.values())
        self.storages.clear()
        return found


class _Flash(torch.autograd.Function):
    """What a flash kernel keeps: queries, keys, values, the result (and a log-sum-exp, 1 / head width of it)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def graph_bytes(student: nn.Module, shape: tuple[int, int, int, int], chunk: int, batch: int = 1) -> list[int]:
    """What autograd keeps of every chunk of the update, the text's graph included: the real forward of a meta student."""
    for block in student.blocks:
        for attn in (getattr(block, name, None) for name in ("self_attn", "cross_attn")):
            if attn is not None:
                attn.attend = _Flash.apply
    dtype = next(p.dtype for p in student.parameters() if not p.requires_grad)
    empty = lambda *size: torch.empty(size, device="meta", dtype=dtype)
    c, x = student.config, empty(batch, *shape)
    if isinstance(student, CausalWan):
        words = empty(batch, c.text_len, c.text_dim)
    else:
        words = torch.zeros(batch, c.text_len, dtype=torch.long, device="meta")
    with (kept := Kept(student)):
        text = student.encode_text(words)
        in_text, sizes = kept.take(), []
        for _ in chunk_velocities(student, x, empty(batch, shape[1]), text, x, chunk):
            sizes.append(in_text + kept.take())
    return sizes


@dataclass
class Networks:
    """A configuration's student and VAE on the meta device, the student with its adapters, and what was assumed."""

    system: System
    formulas: Student
    name: str
    size: int  # bytes of the student's weights
    real: bool  # with a text encoder


def networks(config: TrainConfig) -> Networks:
    """ConfigError for what a student cannot have, and for what is not counted."""
    if config.method != "afd" or config.update != "detached" or config.stream or config.window:
        raise ConfigError('estimate counts method="afd" with update="detached", without stream= and window=')
    if config.student in base_student.SHIPPED:
        system, name, size, real = toy_system(base_student.load(name=config.student)), "ToyStudent", 4, False
        formulas = flops.toy(system.student.config)
    else:
        system, name, size, real = wan_system(replace(config, student="tiny")), "CausalWan (tiny)", 4, False
        if config.student != "tiny":
            from diffusers import AutoencoderKLWan

            large = "14b" in config.student.lower()
            name, size, real = f"CausalWan {'14B' if large else '1.3B'} in bfloat16", 2, True
            with torch.device("meta"):
                system.student = CausalWan(CausalWanConfig.wan_14b() if large else CausalWanConfig.wan_1_3b())
                system.decode.vae = AutoencoderKLWan()
            system.student.bfloat16(), system.decode.vae.bfloat16()
        system.decode.vae.requires_grad_(False).to("meta")
        formulas = flops.wan(system.student.config, *system.shape[1:], config.chunk, size)
    system.student.to("meta")
    add_lora(system.student, config.lora_rank, system.lora_targets)
    return Networks(system, formulas, name, size, real)


@dataclass
class Judge:
    """A discriminator on b samples: one update on pairs, scores, and bytes of what it holds and of what its graph keeps."""

    name: str
    update: Work
    score: Work
    weights: int
    trained: int
    kept: int


def toy_judge(config: TrainConfig, system: System, b: int) -> Judge:
    """The real ToyDiscriminator on the meta device, in float32."""
    model = system.new_discriminator(config).to("meta")
    clips = lambda n: torch.empty(n, 3, *system.video, device="meta")
    calls = 2 if config.r1 else 1
    with (kept := Kept(model)):
        model.score(clips(2 * b), ["a"] * 2 * b)
    update, _ = metered(lambda: model.score(clips(2 * b), ["a"] * 2 * b).sum().backward(), 4)
    with torch.no_grad():
        score, _ = metered(lambda: model.score(clips(b), ["a"] * b), 4)
    trained = sum(p.numel() for p in trainable(model).values())
    return Judge("ToyDiscriminator", calls * update, score, 4 * trained, trained, calls * kept.take())


def reward_judge(config: TrainConfig, system: System, b: int) -> Judge:
    """VideoReward of the published size (Qwen2-VL-2B, tower frozen, language model checkpointed, adapters in bfloat16)."""
    from transformers import Qwen2VLModel

    from afd_fast.discriminators.videoalign.inputs import PATCH, TEMPORAL, sample_frames, smart_size
    from afd_fast.discriminators.videoalign.model import RewardOptions, RewardSettings, qwen2_vl_2b

    c, s = qwen2_vl_2b(), RewardSettings()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2VLModel(c).parameters())
    height, width = smart_size(*system.video[1:], s.min_pixels, s.max_pixels)
    grid = (
        len(sample_frames(system.video[0], RewardOptions().clip_fps, s.fps)) // TEMPORAL,
        height // PATCH,
        width // PATCH,
    )
    rank, calls, lm = config.disc_lora_rank, 2 if config.r1 else 1, flops.language_model(c.text_config)
    length = grid[0] * grid[1] * grid[2] // 4 + REWARD_TEXT
    trained = lm.layers * rank * sum(i + o for i, o in lm.linears) + lm.width
    one = lambda n: flops.vision_tower(c.vision_config, n, grid) + lm.forward(*flops.causal(n, length), rank)
    train = (
        one(2 * b) + lm.forward(*flops.causal(2 * b, length), rank) + lm.backward(*flops.causal(2 * b, length), rank)
    )
    kept = 2 * b * length * 2 * (lm.layers * lm.width + sum(i + o for i, o in lm.linears))  # inputs, one block's rest
    weights = 2 * parameters + 4 * trained
    return Judge("VideoReward (Qwen2-VL-2B)", calls * train, one(b), weights, trained, calls * kept)


@dataclass
class Estimate:
    """phases: work of an iteration on one device. memory: (what, bytes, phases it is there in; none: always)."""

    about: list[str]
    phases: dict[str, Work]
    memory: list[tuple[str, float, tuple[str, ...]]]

    @property
    def peak(self) -> tuple[float, str]:
        """(bytes, phase) of the largest phase."""
        held = {p: sum(n for _, n, where in self.memory if not where or p in where) for p in self.phases}
        return max((n, p) for p, n in held.items())


def estimate(config: TrainConfig) -> Estimate:
    """ConfigError for a configuration that cannot run or is not counted."""
    net = networks(config)
    system, s, shards = net.system, net.formulas, config.shards
    b = config.prompts_per_step * config.rollouts_per_prompt // shards
    judge = (toy_judge if config.discriminator == "toy" else reward_judge)(config, system, b)
    decode, vae, vae_needs = Work(), 0, 0  # the toy's latents are pixels
    if isinstance(system.student, CausalWan):
        stream, latents = system.decode.stream(), torch.empty(1, *system.shape, device="meta")
        with torch.no_grad():
            decode, largest = metered(lambda: stream(latents), net.size)
        vae = sum(p.nbytes for p in system.decode.vae.parameters())
        vae_needs = b * (largest + sum(x.nbytes for x in stream.features if isinstance(x, Tensor)))
    text = flops.text_encoder(config.prompts_per_step // shards, s.text_len) if net.real else Work()
    trained = sum(p.numel() for p in trainable(system.student).values())
    phases = {
        "prompts": shards * text,
        "rollout": shards * s.rollout(b, len(config.steps), config.lora_rank),
        "decode": shards * b * decode,
        "discriminator": config.disc_steps * (shards * judge.update + Work(bytes=OPTIMISER * judge.trained)),
        "score": shards * judge.score,
        "update": shards * s.update(b, config),
        "optimiser": Work(bytes=(OPTIMISER + AVERAGE) * trained),
    }
    rows = min(b, config.update_batch or b)  # of one backward
    graphs, clips = graph_bytes(system.student, system.shape, system.chunk), 12 * b * shards * math.prod(system.video)
    merged = s.stack.layers * s.stack.size * sum(i * o for i, o in s.stack.linears)
    memory = [
        ("student's weights", sum(p.nbytes for p in system.student.parameters()) - 4 * trained, ()),
        ("adapters, gradients, AdamW, EMA", 20 * trained, ()),
        ("discriminator's weights", judge.weights, ()),
        ("its gradients and AdamW states", 12 * judge.trained, ()),
        ("VAE's weights", vae, ()),
        ("text encoder's weights", 2 * flops.T5_PARAMETERS if net.real else 0, ()),
        (f"KV cache of {b} samples", b * s.cache_bytes, ("rollout",)),
        (f"KV cache of {rows} samples", rows * s.cache_bytes, ("update",)),
        ("merged weights beside them", merged, ("rollout", *(["update"] if config.v_old == "ema" else []))),
        ("VAE: past frames, largest product", vae_needs, ("decode",)),
        ("student's clips", clips, ("decode", "discriminator", "score")),
        ("teacher's clips", clips, ("discriminator", "score")),
        ("discriminator's activations", judge.kept, ("discriminator",)),
        (f"activations of {'a chunk' if config.chunked_update else 'all chunks'}",
         rows * (max(graphs) if config.chunked_update else sum(graphs)), ("update",)),
    ]  # fmt: skip
    about = [f"student: {net.name}; discriminator: {judge.name}; {shards} x {b} videos of {system.video[0]} frames, "
             f"{system.video[1]} x {system.video[2]} pixels; no checkpoint was read"]  # fmt: skip
    if net.real:
        about.append("prompts: a pass of UMT5-XXL for those that are new; later iterations have none")
    if judge.name.startswith("VideoReward"):
        about.append(f"the discriminator's text is taken to be {REWARD_TEXT} tokens")
    return Estimate(about, phases, memory)


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


def gpu_of(name: str) -> flops.GPU:
    """A row of `flops.GPUS`; ConfigError that names them."""
    if name.lower() not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def tables(e: Estimate, gpu: flops.GPU) -> tuple[Table, Table]:
    """Work and floor of every phase, and memory."""
    time = Table(title=f"one iteration on {gpu.name}: a floor, not a measurement", title_justify="left")
    for column in ("phase", "TFLOP bf16", "TFLOP fp32", "GB moved", "floor, ms", "bound by"):
        time.add_column(column, justify="left" if column in ("phase", "bound by") else "right")
    floor = sum(w.seconds(gpu) for w in e.phases.values())
    for name, w in (e.phases | {"all": total(e.phases.values())}).items():
        seconds, bound = (floor, "") if name == "all" else (w.seconds(gpu), w.bound(gpu))
        figures = (w.half / 1e12, w.single / 1e12, w.bytes / 1e9, seconds * 1e3)
        if w.bytes:
            time.add_row(name, *map(short, figures), bound)
    size = Table(title="memory, without what the allocator and kernels need", title_justify="left")
    size.add_column("what"), size.add_column("GB", justify="right"), size.add_column("in")
    for name, n, where in e.memory:
        if n:
            size.add_row(name, short(n / 1e9), ", ".join(where) or "always")
    peak, phase = e.peak
    size.add_row("at the peak", short(peak / 1e9), phase)
    if peak >= gpu.memory:
        size.caption = f"[red]does not fit[/] in {gpu.memory / 1e9:.0f} GB: lower update_batch, or make shards smaller (shards= divides prompts_per_step)"
    return time, size
