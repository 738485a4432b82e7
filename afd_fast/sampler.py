"""How a causal student is sampled: `RolloutConfig`, the denoising steps on the schedule, presets of public projects by name, what
a checkpoint's config.json says, and the noise between the steps.

A `Sampler` holds fields of `RolloutConfig`. The numbers of a preset are those of the project's public configuration, named beside them;
fields that are left out are Self-Forcing's, which are the defaults.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, check_at_least, check_fields, extra
from afd_fast.reference.schedule import Step, step_table, unipc_table

Sampler = dict[str, Any]  # fields of RolloutConfig
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]  # one, or one per sample
FirstFrame: TypeAlias = Callable[[Tensor], Tensor]  # a chunk [B, C, f, H, W] -> [B, C, 1, H, W]: see `rollout`

FOUR_STEPS = (1000, 750, 500, 250)
_STREAM: Sampler = {"warp": False, "cache_pass": False, "shift": 8.0}
PRESETS: dict[str, Sampler] = {
    # guandeh17/Self-Forcing 33593df: configs/self_forcing_{dmd,sid}.yaml
    "self_forcing": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    # thu-ml/Causal-Forcing 1fc7bbc: configs/causal_forcing_dmd_{chunkwise,framewise,framewise_2step,framewise_1step}.yaml
    "causal_forcing": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    "causal_forcing_framewise": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    "causal_forcing_pp_2step": {"steps": (1000, 500), "first_chunk_steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    "causal_forcing_pp_1step": {"steps": (1000,), "first_chunk_steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    # the same, configs/ar_diffusion_tf_{chunkwise,framewise}.yaml, steps of pipeline/causal_diffusion_inference.py: ar_diffusion.pt
    "ar_diffusion": {"unipc_steps": 50, "guidance": 3.0, "shift": 5.0, "chunk": 3},
    "ar_diffusion_framewise": {"unipc_steps": 50, "guidance": 3.0, "shift": 5.0, "chunk": 1},
    # NVlabs/LongLive, branch v1.0: configs/longlive_inference.yaml
    "longlive": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3, "window": 12, "sink": 3},
    # the same, configs/longlive_inference_infinity.yaml: use_infinite_attention
    "longlive_infinity": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3, "window": 12, "sink": 3, "rope": "relative"},
    # the same, main 7860ad9: configs/inference.yaml, one shot; LongLive 2.0 on Wan2.2-TI2V-5B
    "longlive2": {"unipc_steps": 4, "shift": 5.0, "chunk": 8, "window": 32, "sink": 8},
    # yesiltepe-hidir/infinity-rope 63d7b84: configs/self_forcing_dmd.yaml
    "infinity_rope": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3, "window": 6, "sink": 1, "rope": "relative"},
    # JaydenLyh/Reward-Forcing 4317f5a: configs/reward_forcing.yaml, compression_alpha of wan/modules/causal_model.py
    "reward_forcing": {
        "steps": FOUR_STEPS,
        "shift": 5.0,
        "chunk": 3,
        "window": 9,
        "sink": 3,
        "rope": "relative",
        "sink_ema": 0.999,
    },
    # hao-ai-lab/FastVideo 2f3d407: SelfForcingWanT2V480PConfig in fastvideo/configs/pipelines/wan.py
    "fastvideo": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    # the same, SelfForcingWan2_2_T2V480PConfig; pipelines/stages/causal_denoising.py begins with one frame where there are two experts
    "fastvideo_a14b": {
        "steps": (1000, 850, 700, 550, 350, 275, 200, 125),
        "shift": 12.0,
        "chunk": 3,
        "independent_first_frame": True,
    },
    # tianweiy/CausVid ca21150: configs/wan_causal_dmd.yaml, configs/wan_causal_dmd_warp_4step_cfg2.yaml
    "causvid": {"steps": (1000, 757, 522), "warp": False, "shift": 8.0, "chunk": 3},
    "causvid_4step": {"steps": FOUR_STEPS, "shift": 8.0, "chunk": 3},
    # chenfengxu714/StreamDiffusionV2 c5a0f20: configs/wan_causal_dmd_{t2v,v2v}.yaml; v2v starts from a video noised to 0.7. The last step at 0 stays
    # for t2v (models/wan/causal_stream_inference.py:76-78), no forward follows a chunk's last step (298-351, `inference_wo_batch`)
    "streamdiffusionv2": {**_STREAM, "steps": FOUR_STEPS, "zero_step": True, "chunk": 3, "window": 21},
    "streamdiffusionv2_v2v": {**_STREAM, "steps": (700, 500, 400, 200), "chunk": 1, "window": 6, "sink": 3},
    # krea-ai/realtime-video acf4b7b: release_server.py, GenerateParams (328-334: kv_cache_num_frames 3; 5 steps, the last at t = 0; 396: chunks of
    # 3) and `v2v.get_denoising_schedule`; sample.py runs the same. denoising_step_list of configs/*.yaml is read by neither
    "krea": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3, "window": 6, "recompute": True, "zero_step": True},
}
NEAR = 0.1  # noise that may be left where the second of two experts begins
HOW_FAST = ("fuse_cache_pass", "merge_lora", "graphs")  # fields of RolloutConfig that do not belong to the student
KEY = "sampler"  # in the config.json that `save_student` writes
# FastVideo's names in its causal transformer's config.json (fastvideo/configs/models/dits/wanvideo.py); Self-Forcing's
# CausalWanModel writes the first two as well
_WINDOW, _SINK, _CHUNK, _ROPE = "local_attn_size", "sink_size", "num_frames_per_block", "rope_cache_policy"


def preset(name: str) -> Sampler:
    """A copy of the preset of this name. ConfigError that lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def of_config(settings: Mapping[str, Any]) -> Sampler:
    """What a transformer's config.json says about sampling: of `save_student`, of FastVideo or of Self-Forcing's class. Empty
    where it says nothing. ConfigError for values of other types, and for a policy of positions that is not known."""
    if KEY in settings:
        if not isinstance(settings[KEY], dict):
            raise ConfigError(
                f"{KEY} in config.json must hold settings by name, got {settings[KEY]!r}: restore the file"
            )
        return {name: tuple(v) if isinstance(v, list) else v for name, v in settings[KEY].items()}
    found: Sampler = {}
    given = {name: settings[name] for name in (_WINDOW, _SINK, _CHUNK, _ROPE) if settings.get(name) is not None}
    for name, value in given.items():
        if name != _ROPE and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name} in config.json must be a whole number, got {value!r}: restore the file")
    if _CHUNK in given:
        found["chunk"] = given[_CHUNK]
    if given.get(_WINDOW, -1) > 0:  # -1: everything
        found |= {"window": given[_WINDOW], "sink": given.get(_SINK, 0)}
    policy = given.get(_ROPE, "absolute")
    if policy not in ("absolute", "relativistic"):
        raise ConfigError(f"{_ROPE}={policy!r} in config.json is not known here: absolute and relativistic are")
    if policy == "relativistic" and found.get("sink"):  # without a sink or a window it changes nothing
        found["rope"] = "relative"
    return found


def _check_steps(name: str, steps: tuple[float, ...]) -> None:
    if not steps or any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in itertools.pairwise(steps)):
        raise ConfigError(f"{name} must fall from at most 1000 to above 0, got {steps}")


@dataclass(frozen=True)
class RolloutConfig:
    """How to sample.

    steps: denoising steps in 0..1000, falling; a 0 at the end, which some configurations have, is left out.
    shift: of the timestep schedule; 5.0 in Self-Forcing's configs, 8.0 in its demo: explicit on purpose.
    chunk: latent frames generated together.
    context_noise: t of the cache pass, 0..1000 (the frames themselves are not noised, as officially).
    independent_first_frame: the first frame is a chunk by itself.
    first_chunk_steps: other steps for the first chunk (Causal-Forcing++ `denoising_step_list_first_chunk`).
    window: latent frames a chunk attends to; none: all.
    sink: how many of the first frames are always among the window's.
    rope: absolute, or relative: positions count from the start of the window, so that the sink stays near (LongLive's infinite
        attention, Infinity-RoPE, FastVideo's relativistic, Reward-Forcing).
    sink_ema: weight of the old sink where chunks that leave the window are averaged into it (Reward-Forcing: 0.999); none: a fixed sink.
    recompute: before each chunk, compute the window's frames before it anew, from their latents, at positions from 0 on (Krea's
        `recompute_kv_cache`, with a window of its kv_cache_num_frames + chunk, and with sink=1 its keep_first_frame; see `Context`).
    warp: move the steps along the shifted schedule (750 is 937.5 at shift 5); false: they are on it already (CausVid).
    zero_step: one more forward at the end of each chunk, at t = 0, of latents noised to the schedule's lowest level (Krea, StreamDiffusionV2).
    cache_pass: a finished chunk goes through the student once more, at t = context_noise, for its keys and values; false: those of
        its last step stay (StreamDiffusionV2).
    unipc_steps: so many steps of UniPC, Wan's own solver, instead of `steps` with fresh noise between them: for checkpoints that are not
        distilled to few steps (`ar_diffusion.pt`).
    guidance: scale of classifier-free guidance against a negative prompt, which takes two forwards and two caches; none: no guidance.
    fuse_cache_pass: run chunk i's cache pass together with chunk i + 1's first step, one longer forward.
    merge_lora: merge LoRA layers into the weights for the rollout and restore them bit for bit after it.
    graphs: record each forward once as a CUDA graph and replay it in later rollouts of the same shape.
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    chunk: int = 3
    context_noise: float = 0.0
    independent_first_frame: bool = False
    first_chunk_steps: tuple[float, ...] | None = None
    window: int | None = None
    sink: int = 0
    rope: Literal["absolute", "relative"] = "absolute"
    sink_ema: float | None = None
    recompute: bool = False
    warp: bool = True
    zero_step: bool = False
    cache_pass: bool = True
    unipc_steps: int | None = None
    guidance: float | None = None
    fuse_cache_pass: bool = False
    merge_lora: bool = True
    graphs: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "first_chunk_steps"):
            if (given := getattr(self, name)) and given[-1] == 0:
                object.__setattr__(self, name, given[:-1])
        _check_steps("steps", self.steps)
        if self.first_chunk_steps is not None:
            _check_steps("first_chunk_steps", self.first_chunk_steps)
        if not 0 <= self.context_noise <= 1000:
            raise ConfigError(f"context_noise must lie in 0..1000, got {self.context_noise}")
        if self.shift <= 0:
            raise ConfigError(f"shift must be a positive number, got {self.shift}")
        check_at_least(self, 1, "chunk", "window", "unipc_steps")
        check_at_least(self, 0, "guidance")
        others = self.steps != FOUR_STEPS or self.first_chunk_steps or not self.warp or self.zero_step
        if self.unipc_steps is not None and others:
            raise ConfigError(
                f"unipc_steps={self.unipc_steps} makes its own steps: leave out steps, first_chunk_steps, warp=false and zero_step, "
                "which are for few-step students"
            )
        if self.guidance is not None and self.graphs:
            raise ConfigError("graphs cannot replay a rollout with guidance: leave out one of graphs and guidance")
        if self.window is None and self.sink:
            raise ConfigError(f"sink={self.sink} needs a window larger than it: set window")
        if self.window is not None and not 0 <= self.sink < self.window:
            raise ConfigError(f"sink={self.sink} must be at least 0 and below window={self.window}")
        if self.rope == "relative" and self.window is None:
            raise ConfigError("rope=relative counts positions from the start of the window: set window")
        if self.sink_ema is not None:
            if not 0 <= self.sink_ema <= 1:
                raise ConfigError(f"sink_ema must lie in 0..1, got {self.sink_ema}")
            whole = self.window is not None and self.window % self.chunk == 0 and not self.independent_first_frame
            if self.rope != "relative" or self.sink != self.chunk or not whole:
                raise ConfigError(
                    f"sink_ema averages chunks into the sink: it needs rope=relative, a sink of one chunk ({self.chunk}) and a "
                    f"window of whole chunks, without independent_first_frame; got rope={self.rope}, sink={self.sink}, "
                    f"window={self.window}"
                )
        if not self.cache_pass and (self.recompute or self.fuse_cache_pass):
            raise ConfigError(
                "cache_pass=false leaves nothing to recompute or to fuse: leave out recompute and fuse_cache_pass"
            )
        if self.recompute:
            whole = self.window is not None and self.window % self.chunk == 0 and self.window > self.chunk
            plain = self.rope == "absolute" and not self.independent_first_frame and not self.fuse_cache_pass
            if not whole or not plain or self.sink > 1:
                raise ConfigError(
                    f"recompute makes the history anew of whole chunks ({self.chunk}): it needs a window of two chunks or more, sink=0 "
                    "or 1 and rope=absolute, without independent_first_frame and fuse_cache_pass; got "
                    f"window={self.window}, sink={self.sink}, rope={self.rope}"
                )
        for steps, table in ((self.steps, self.timetable()), (self.first_chunk_steps, self.timetable(first=True))):
            sigmas = [step.sigma for step in table]
            if not all(a > b for a, b in itertools.pairwise([*sigmas, 0.0])):
                raise ConfigError(
                    f"shift={self.shift} gives the steps {steps}{' and zero_step' if self.zero_step else ''} the noise levels "
                    f"{sigmas}: they must fall and stay above 0; "
                    "set steps to different whole numbers from 1000 to 1, or shift closer to 1"
                )

    def timetable(self, first: bool = False) -> list[Step]:
        """The denoising steps of a chunk, or of the first one."""
        if self.unipc_steps is not None:
            return unipc_table(self.unipc_steps, self.shift)
        table = step_table((first and self.first_chunk_steps) or self.steps, self.shift, self.warp)
        return [*table, Step(0.0, step_table((1,), self.shift)[0].sigma)] if self.zero_step else table

    def boundary_level(self, boundary: float | None) -> float:
        """The noise level of a student of two experts at the t where the low-noise one takes over: few-step predictions above it
        end there (FastVideo `pred_noise_to_x_bound`, at its table's nearest time). 0 for one network, and for UniPC, which follows
        the velocity through it. ConfigError for settings that two experts cannot have."""
        if boundary is None:
            return 0.0
        if self.fuse_cache_pass or not self.cache_pass:
            name = "fuse_cache_pass=True" if self.fuse_cache_pass else "cache_pass=False"
            raise ConfigError(f"{name} is for students of one network, and this one has two experts: leave it out")
        level = 0.0 if self.unipc_steps is not None else step_table((boundary,), self.shift, warp=False)[0].sigma
        for name, table in (("steps", self.timetable()), ("first_chunk_steps", self.timetable(first=True))):
            low = [step for step in table if 0 < step.t < boundary]
            if not low or (table[0].t >= boundary and level - low[0].sigma > NEAR):
                found = f"goes on at t = {low[0].t:.0f}, noise level {low[0].sigma:.2f}" if low else "has none there"
                raise ConfigError(
                    f"{name if self.unipc_steps is None else 'unipc_steps'} needs a step below the boundary of the two experts, t = {boundary:g}, "
                    f"and near it, where the noise that the high-noise expert leaves is taken; it {found}: add one"
                )
        return level

    @property
    def history(self) -> dict[str, Any]:
        """What `new_cache` is told of a rollout's history; settings that many students lack, only where they are set."""
        if self.recompute:  # each chunk has a cache of its window alone
            return {"window": None, "sink": 0}
        more = {"rope": self.rope, "sink_ema": self.sink_ema}
        return {"window": self.window, "sink": self.sink} | {
            k: v for k, v in more.items() if v not in ("absolute", None)
        }

    @property
    def reencodes(self) -> bool:
        """Whether a rollout asks `first_frame` for the first frame of its histories."""
        return self.recompute and not self.sink

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RolloutConfig":
        """As a public project samples its students (`PRESETS`), with other settings changed."""
        return cls(**{**preset(name), **changes})

    @classmethod
    def of(cls, sampler: Mapping[str, Any], **changes: Any) -> "RolloutConfig":
        """As a checkpoint says (`student.sampler`; Self-Forcing's where it says nothing), with settings changed. ConfigError
        for settings that are not known here."""
        found = {**sampler, **changes}
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ConfigError(
                f"the checkpoint is to be sampled with {unknown[0]}={found[unknown[0]]!r}, which is not known here"
            )
        return cls(**found)

    def sampler(self) -> dict[str, Any]:
        """The settings that change the result, ready for JSON: what `save_student` keeps with a student."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in HOW_FAST}


def unipc(steps: list[Step]) -> Any:
    """Wan's solver for one chunk: diffusers' UniPCMultistepScheduler, which equals Wan's own to the bit on the steps of
    `unipc_table`."""
    with extra("train"):
        from diffusers import UniPCMultistepScheduler

    solver: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(len(steps))
    solver.sigmas = torch.tensor([*(step.sigma for step in steps), 0.0], dtype=torch.float32)
    solver.timesteps = torch.tensor([int(step.t) for step in steps])
    return solver


class Noise:
    """The noise drawn between steps, in the official order and layout ([B * f, C, H, W] per draw).

    From a tensor ([draws, B * f, C, H, W] or [draws, B, C, f, H, W]), from one generator, or from one generator
    per sample, which makes a batch equal to single rollouts.
    """

    def __init__(self, like: Tensor, generator: Generators | None, renoise: Tensor | None):
        kept = generator if isinstance(generator, Sequence) else [generator]
        if generator is not None and not all(isinstance(g, torch.Generator) for g in kept):
            raise TypeError(
                "generator must be a torch.Generator or a list of them, one per sample, got "
                f"{generator!r}: torch.Generator(device).manual_seed(0)"
            )
        if generator is not None and renoise is not None:
            raise ValueError("give generator= or renoise=, not both")
        if isinstance(generator, Sequence) and len(generator) != like.shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {like.shape[0]}")
        if renoise is not None and renoise.ndim not in (5, 6):
            raise ValueError(
                f"renoise must be [draws, B*f, C, H, W] or [draws, B, C, f, H, W], got {tuple(renoise.shape)}"
            )
        self.like, self.generator, self.renoise, self.draws = like, generator, renoise, 0

    def draw(self, frames: int) -> Tensor:
        """[B, C, f, H, W]"""
        batch, channels, _, height, width = self.like.shape
        self.draws += 1
        if self.renoise is not None:
            if self.draws > len(self.renoise):
                raise ValueError(f"renoise holds {len(self.renoise)} draws, the rollout needs more")
            noise = self.renoise[self.draws - 1]
            if noise.ndim == 4:
                noise = noise.unflatten(0, (batch, -1)).transpose(1, 2)
            if tuple(noise.shape) != (batch, channels, frames, height, width):
                raise ValueError(
                    f"renoise draw is {tuple(noise.shape)}, want {(batch, channels, frames, height, width)}"
                )
            return noise.to(self.like)
        dtype, device, shape = self.like.dtype, self.like.device, (frames, channels, height, width)
        if isinstance(self.generator, Sequence):
            noise = torch.stack([torch.randn(shape, generator=g, dtype=dtype, device=device) for g in self.generator])
        else:
            noise = torch.randn((batch, *shape), generator=self.generator, dtype=dtype, device=device)
        return noise.transpose(1, 2)


class Context:
    """The clean frames of which `recompute` makes the history anew before each chunk, as Krea's server and its `sample.py` do
    (realtime-video acf4b7b, release_server.py; its pipeline/causal_inference.py caches chunk by chunk, and neither calls it):

    * the cache is emptied (607-609) and filled by one forward at t = 0 (619-631) of the last window - chunk frames
      (`kv_cache_num_frames`, 328, 543), at positions from 0 on (wan/modules/causal_model.py:306-311), each block of `chunk` seeing itself
      and those before (causal_model.py:109-141), which is what blocks in order see; the chunk stands right after them (603);
    * the text is still that of the chunk before: the new one is set after it (647, 662-666);
    * the first of the frames is the video's first, as it is, while (chunks made - 1) * chunk < kv_cache_num_frames, or always with
      `keep_first_frame` (566-570; here sink=1); later it is encoded anew as a video's first frame from the last frame of video that
      its latent gave (573-575; the deque of 1 + 4 (kv_cache_num_frames - 1) frames of video begins with it, 388-389, 721).
    """

    def __init__(self, config: RolloutConfig, first_frame: FirstFrame | None):
        assert config.window is not None
        self.chunk, self.length, self.sink = config.chunk, config.window - config.chunk, config.sink
        self.first_frame = first_frame
        self.first: Tensor | None = None  # the video's first frame
        self.latest: list[Tensor] = []  # the last blocks; [B, C, chunk, H, W] each
        self.heads: list[Tensor] = []  # what is to stand for the first frame of each, if it comes first

    def start(self, given: Tensor) -> None:
        """The frames [B, C, F0, H, W] that the rollout continues."""
        for block in given.split(self.chunk, 2):
            self._add(block, block[:, :, :1])

    def before(self, made: int, finished: Tensor | None) -> Tensor | None:
        """The history [B, C, F, H, W] of the chunk after `made` others, of which `finished` is the last; None: there is none."""
        if finished is not None:
            head = finished[:, :, :1] if self.first_frame is None else self.first_frame(finished)
            if not isinstance(head, Tensor) or head.shape != finished[:, :, :1].shape:
                given = f"a tensor {tuple(head.shape)}" if isinstance(head, Tensor) else f"a {type(head).__name__}"
                raise ValueError(
                    f"first_frame must give a latent {tuple(finished[:, :, :1].shape)} of a chunk {tuple(finished.shape)}, gave {given}"
                )
            self._add(finished, head.to(finished))
        if self.first is None:
            return None
        kept = self.sink > 0 or (made - 1) * self.chunk < self.length
        return torch.cat([self.first if kept else self.heads[0], self.latest[0][:, :, 1:], *self.latest[1:]], 2)

    def _add(self, block: Tensor, head: Tensor) -> None:
        self.first = block[:, :, :1] if self.first is None else self.first
        count = self.length // self.chunk
        self.latest, self.heads = [*self.latest, block][-count:], [*self.heads, head][-count:]
