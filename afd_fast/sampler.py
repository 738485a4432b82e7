"""How a causal student is sampled: `RolloutConfig`, the denoising steps on the schedule, presets of public projects by name, and what
a checkpoint's config.json says.

A `Sampler` holds fields of `RolloutConfig`. The numbers of a preset are those of the project's public configuration, named beside them;
fields that are left out are Self-Forcing's, which are the defaults.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from afd_fast.errors import ConfigError, check_at_least, check_fields, extra
from afd_fast.reference.flow import shift_sigma

Sampler = dict[str, Any]  # fields of RolloutConfig

FOUR_STEPS = (1000, 750, 500, 250)
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
    # chenfengxu714/StreamDiffusionV2 c5a0f20: configs/wan_causal_dmd_{t2v,v2v}.yaml; v2v starts from a video noised to 0.7
    "streamdiffusionv2": {"steps": FOUR_STEPS, "warp": False, "shift": 8.0, "chunk": 3, "window": 21},
    "streamdiffusionv2_v2v": {"steps": (700, 500, 400, 200), "warp": False, "shift": 8.0, "chunk": 1},
    # krea-ai/realtime-video acf4b7b: configs/self_forcing_server_14b.yaml; its server also computes the context again
    "krea": {"steps": (1000, 937, 833, 625), "warp": False, "shift": 5.0, "chunk": 3},
}
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
    warp: move the steps along the shifted schedule (750 is 937.5 at shift 5); false: they are on it already (CausVid, Krea).
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
    warp: bool = True
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
        check_at_least(self, 1, "chunk", "unipc_steps")
        check_at_least(self, 0, "guidance")
        if self.unipc_steps is not None and (self.steps != FOUR_STEPS or self.first_chunk_steps or not self.warp):
            raise ConfigError(
                f"unipc_steps={self.unipc_steps} makes its own steps: leave out steps, first_chunk_steps and warp=false, which "
                "are for few-step students"
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
        for steps, table in ((self.steps, self.timetable()), (self.first_chunk_steps, self.timetable(first=True))):
            sigmas = [step.sigma for step in table]
            if not all(a > b for a, b in itertools.pairwise([*sigmas, 0.0])):
                raise ConfigError(
                    f"shift={self.shift} gives the steps {steps} the noise levels {sigmas}: they must fall and stay above 0; "
                    "set steps to different whole numbers from 1000 to 1, or shift closer to 1"
                )

    def timetable(self, first: bool = False) -> "list[Step]":
        """The denoising steps of a chunk, or of the first one."""
        if self.unipc_steps is not None:
            return unipc_table(self.unipc_steps, self.shift)
        return step_table((first and self.first_chunk_steps) or self.steps, self.shift, self.warp)

    def boundary_level(self, boundary: float | None) -> float:
        """The noise level of a student of two experts at the t where the low-noise one takes over: few-step predictions above it
        end there (FastVideo `pred_noise_to_x_bound`, at its table's nearest time). 0 for one network, and for UniPC, which follows
        the velocity through it. ConfigError for settings that two experts cannot have."""
        if boundary is None:
            return 0.0
        if self.fuse_cache_pass:
            raise ConfigError(
                "fuse_cache_pass=True is for students of one network, and this one has two experts: leave it out"
            )
        for name, table in (("steps", self.timetable()), ("first_chunk_steps", self.timetable(first=True))):
            if table[-1].t >= boundary:
                raise ConfigError(
                    f"{name} must end below the boundary of the two experts, t = {boundary:g}, got {table[-1].t:g}: the high-noise "
                    "expert leaves noise; add lower steps"
                )
        return 0.0 if self.unipc_steps is not None else step_table((boundary,), self.shift, warp=False)[0].sigma

    @property
    def history(self) -> dict[str, Any]:
        """What `new_cache` is told of a rollout's history; settings that many students lack, only where they are set."""
        more = {"rope": self.rope, "sink_ema": self.sink_ema}
        return {"window": self.window, "sink": self.sink} | {
            k: v for k, v in more.items() if v not in ("absolute", None)
        }

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


class Step(NamedTuple):
    """One denoising step: the network's t in 0..1000, and the noise level sigma in [0, 1]."""

    t: float
    sigma: float


def step_table(steps: tuple[float, ...], shift: float, warp: bool = True) -> list[Step]:
    """Every step on the shifted schedule, both rounded to float32 as in the official table (1000 sigmas; steps are looked
    up by their integer part). Without warp, t is the step and sigma that of the table's nearest time."""
    sigmas = shift_sigma(torch.linspace(1, 0, 1001, dtype=torch.float32)[:-1], shift)
    times = sigmas * 1000
    if not warp:
        nearest = [int((times.double() - step).abs().argmin()) for step in steps]
        return [Step(float(step), float(sigmas[i])) for step, i in zip(steps, nearest)]
    rows = [1000 - int(s) for s in steps]
    return [Step(float(times[i]), float(sigmas[i])) if i < 1000 else Step(0.0, 0.0) for i in rows]


def renoise_weights(sigma: float, level: float) -> tuple[float, float]:
    """Of latents that have the noise level `level` < sigma, and of the fresh noise that takes them to sigma, so that the clean part and the
    noise's variance are those of sigma; float32 as in the official schedules (FastVideo `calculate_alpha_beta_high`)."""
    kept = np.float32(1 - sigma) / np.float32(1 - level)
    fresh = np.sqrt(np.float32(sigma) ** 2 - (kept * np.float32(level)) ** 2)
    return float(kept), float(fresh)


def unipc_table(steps: int, shift: float) -> list[Step]:
    """The steps of `unipc`: sigmas evenly from 0.999 towards 0 and shifted, t their whole thousandths (Wan2.1
    `wan/utils/fm_solvers_unipc.py`, `set_timesteps`)."""
    even = torch.from_numpy(np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    return [Step(float(int(s * 1000)), float(np.float32(s))) for s in shift_sigma(even, shift).tolist()]


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
