"""Rollouts by the projects' own pipelines, for `benchmarks.parity`."""

import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, TwoExperts
from benchmarks.checkouts import (
    HEIGHT,
    SIZES,
    TOKENS,
    WIDTH,
    FastVideo,
    Options,
    Pixels,
    TextStandIn,
    VAEStandIn,
    drawn,
)

BOUNDARY = 875  # of two experts


@dataclass(frozen=True)
class Case:
    """A rollout both ways. batch: 1 where theirs turns the keys of the first sample only. switches: frames at which another
    prompt begins. options: of their pipeline's arguments."""

    name: str
    config: RolloutConfig
    frames: int = 21
    batch: int = 2
    switches: tuple[int, ...] = ()
    recache: Any = False
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "causal_model"  # module of the model
    cut: bool = False  # each switch is also a scene cut
    experts: bool = False  # two of them
    given: int = 0  # frames to continue from


class Prepared(NamedTuple):
    """What both sides are given."""

    model: CausalWan | TwoExperts
    noise: Tensor  # [B, C, F, H, W]
    texts: list[Tensor]  # embeddings, one per prompt; under guidance the second is the negative prompt's
    draws: Tensor  # [n, B * f, C, H, W] noise between steps
    initial: Tensor | None = None  # [B, C, F0, H, W]

    def whole(self) -> Tensor:
        """The noise after the frames to continue from."""
        return self.noise if self.initial is None else torch.cat([self.initial, self.noise], 2)


class FastVideoExpert(FastVideo):
    """An expert as FastVideo's stage calls it, with the text of its own layers."""

    def __init__(self, model: CausalWan, config: RolloutConfig, batch: int, context: Tensor) -> None:
        super().__init__(model, config, batch)
        self.text = model.encode_text(context[None])
        self.local_attn_size, self.sink_size = config.window or -1, config.sink
        self.num_attention_heads, self.attention_head_dim = SIZES.num_heads, SIZES.dim // SIZES.num_heads
        sizes = {"num_frames_per_block": config.chunk, "sliding_window_num_frames": 21, "patch_size": (1, 2, 2)}
        self.config = SimpleNamespace(arch_config=SimpleNamespace(**sizes))

    def __call__(self, x: Tensor, _: Any, t: Tensor, *, kv_cache: Any, start_frame: int, **__: Any) -> Tensor:  # type: ignore[override]
        self.caches = kv_cache
        return super().__call__(x, t.expand(-1, x.shape[2]), self.text, cache=None, start_frame=start_frame)


def fastvideo_stage(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of FastVideo's stage for two experts."""
    assert isinstance(given.model, TwoExperts)
    config, modules = case.config, sys.modules
    where: Any = modules["fastvideo.pipelines.stages.causal_denoising"]
    where.DTYPE = given.model.dtype
    schedulers: Any = modules["fastvideo.models.schedulers.scheduling_self_forcing_flow_match"]
    scheduler = schedulers.SelfForcingFlowMatchScheduler(1000, shift=config.shift, sigma_min=0.0, extra_one_step=True)
    high, low = (FastVideoExpert(e, config, case.batch, given.texts[0]) for e in (given.model.high, given.model.low))
    stage = where.CausalDMDDenosingStage(
        high, scheduler, low, SimpleNamespace(encode=lambda x: SimpleNamespace(mean=x), to=lambda _: None)
    )
    stage.vae.to, stage.vae.scaling_factor = lambda _: stage.vae, 1.0
    stage.scheduler, stage.device = scheduler, "cpu"
    stage.prepare_extra_func_kwargs, stage.progress_bar = lambda *_: {}, lambda **_: nullcontext()
    settings = SimpleNamespace(
        dmd_denoising_steps=list(config.steps), warp_denoising_step=True, context_noise=0,
        dit_config=SimpleNamespace(boundary_ratio=BOUNDARY / 1000),
        text_encoder_configs=[SimpleNamespace(arch_config=SimpleNamespace(text_len=SIZES.text_len))],
    )  # fmt: skip
    spare = torch.zeros_like(
        given.noise[:, :, : config.chunk - 1]
    )  # its first chunk is a frame, and it drops the last two
    frame = [] if given.initial is None else [given.initial]
    batch = SimpleNamespace(
        latents=torch.cat([*frame, given.noise, spare], 2), prompt_embeds=[given.texts[0][None]], prompt_attention_mask=None,
        pil_image=given.initial, image_latent=None, generator=None,
    )  # fmt: skip
    above, steps = sum(step.t >= BOUNDARY for step in config.timetable()), len(config.steps)
    unused = torch.zeros_like(given.draws[0])  # it draws where the experts change too, and does not use it
    order: list[Tensor] = []
    for row in given.draws:
        order += [unused] * (len(order) % (steps - 1) == above - 1) + [row]
    with drawn(order):
        return stage.forward(
            batch, SimpleNamespace(disable_autocast=True, vae_cpu_offload=False, pipeline_config=settings)
        ).latents


def wrapped(case: Case, given: Prepared) -> Any:
    """Their model with the weights, in their wrapper."""
    config, modules, ours = case.config, sys.modules, given.model
    layers, models, wrappers, schedules = "wan.modules", "wan.modules", "utils.wan_wrapper", "utils.scheduler"
    places: dict[str, Any] = {"local_attn_size": config.window or -1, "sink_size": config.sink}
    if "wan_5b" in modules:  # LongLive 2.0
        layers, models, wrappers = "wan_5b.modules", "wan_5b.modules", "utils.wan_5b_wrapper"
    elif root := next((name for name in ("causvid.models.wan", "models.wan") if name in modules), None):
        places = {}
        layers, models, wrappers, schedules = (
            f"{root}.wan_base.modules",
            root,
            f"{root}.wan_wrapper",
            f"{root}.flow_match",
        )
    with torch.device("meta"):
        model = modules[f"{models}.{case.model}"].CausalWanModel(
            **{n: getattr(SIZES, n) for n in ("dim", "ffn_dim", "num_heads", "num_layers", "text_len", "text_dim", "freq_dim", "in_dim", "out_dim")},
            cross_attn_norm=True, **places,
        )  # fmt: skip
    model = model.to_empty(device="cpu").to(ours.dtype).eval()
    model.load_state_dict(ours.state_dict())
    d = SIZES.dim // SIZES.num_heads
    rope = modules[f"{layers}.model"].rope_params
    model.freqs = torch.cat([rope(1024, d - 4 * (d // 6)), rope(1024, 2 * (d // 6)), rope(1024, 2 * (d // 6))], 1)
    wrapper = modules[wrappers].WanDiffusionWrapper.__new__(modules[wrappers].WanDiffusionWrapper)
    torch.nn.Module.__init__(wrapper)
    wrapper.model, wrapper.uniform_timestep, wrapper.seq_len = model, False, 10**6
    wrapper.scheduler = modules[schedules].FlowMatchScheduler(shift=config.shift, sigma_min=0.0, extra_one_step=True)
    wrapper.scheduler.set_timesteps(1000, training=True)
    wrapper.post_init()
    return wrapper


def causvid(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of CausVid's pipeline."""
    config, wrapper, text, vae = case.config, wrapped(case, given), TextStandIn(given.texts), VAEStandIn()
    pipeline: Any = sys.modules["causvid.models.wan.causal_inference"]
    pipeline.get_diffusion_wrapper = lambda **_: lambda: wrapper
    pipeline.get_text_encoder_wrapper = lambda **_: lambda: text
    pipeline.get_vae_wrapper = lambda **_: lambda: vae
    settings = Options(
        model_name="wan", denoising_step_list=[*config.steps, 0], warp_denoising_step=config.warp, num_frame_per_block=config.chunk
    )  # fmt: skip
    latents, start = given.whole().transpose(1, 2), None if given.initial is None else given.initial.transpose(1, 2)
    with drawn(given.draws), redirect_stdout(StringIO()):
        made = pipeline.InferencePipeline(settings, "cpu").inference(latents, ["0"], start, return_latents=True)
    return made[1].transpose(1, 2)


def streamed(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of StreamDiffusionV2's pipeline, one chunk after the other."""
    config, wrapper, text, vae = case.config, wrapped(case, given), TextStandIn(given.texts), VAEStandIn()
    stream: Any = sys.modules["models.wan.causal_stream_inference"]
    stream.get_diffusion_wrapper = lambda **_: lambda **_: wrapper
    stream.get_text_encoder_wrapper = lambda **_: lambda **_: text
    stream.get_vae_wrapper = lambda **_: lambda **_: vae
    settings = Options(
        model_type="T2V-1.3B", model_name="wan", denoising_step_list=[*config.steps, 0], t2v=config.zero_step, warp_denoising_step=config.warp,
        height=8 * HEIGHT, width=8 * WIDTH, num_kv_cache=config.window, num_sink_tokens=config.sink, adapt_sink_threshold=-1,
        num_frame_per_block=config.chunk,
    )  # fmt: skip
    pipeline = stream.CausalStreamInferencePipeline(settings, "cpu")
    latents, n, made = given.noise.transpose(1, 2), config.chunk, []
    first = pipeline.denoising_step_list[0].clone()
    with drawn(given.draws):
        for start in range(0, case.frames, n):
            noise, place = latents[:, start : start + n], (start * TOKENS, (start + n) * TOKENS)
            if start == 0:
                made = [pipeline.prepare(["0"], "cpu", noise.dtype, "input", noise, *place, batch_denoise=False)]
            else:
                made.append(pipeline.inference_wo_batch(noise, *place, first))
    return torch.cat(made, 1).transpose(1, 2)


def served(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of a session of Krea's server, block by block."""
    config, server = case.config, sys.modules["release_server"]
    assert config.window is not None
    dtype = given.model.dtype
    server.DTYPE = dtype  # type: ignore[attr-defined]
    pixels, whole = Pixels(dtype), replace(config, window=None, sink=0, recompute=False)  # `init_models` sets -1
    wrapper = wrapped(replace(case, config=whole), given)
    for block in wrapper.model.blocks:
        block.self_attn.fuse_projections()
    settings = Options(
        denoising_step_list=[0], warp_denoising_step=False, num_frame_per_block=config.chunk, independent_first_frame=False,
        use_taehv=False,
    )  # fmt: skip

    def decode(latents: Tensor, *cache: Any) -> tuple[Tensor, list[Any]]:
        return pixels.decode(latents.transpose(1, 2)).transpose(1, 2), list(cache)

    def encode(frames: Tensor, cache: list[Any], stream: bool) -> tuple[Tensor, list[Any]]:
        return pixels.encode(frames), cache

    text = TextStandIn(given.texts)
    pipeline = sys.modules["pipeline.causal_inference"].CausalInferencePipeline(settings, "cpu", wrapper, text, decode)
    models = server.Models(text, wrapper, pipeline, encode, decode)
    params = server.GenerateParams(
        prompt="0", width=8 * WIDTH, height=8 * HEIGHT, seed=0, num_blocks=(case.given + case.frames) // config.chunk,
        kv_cache_num_frames=config.window - config.chunk, keep_first_frame=config.sink == 1, timestep_shift=config.shift,
    )  # fmt: skip
    session = server.GenerationSession(params, settings, frame_callback=lambda *_: None, models=models)
    session.noise = given.whole().transpose(1, 2).clone()
    session.resume_latents = None if given.initial is None else given.initial.transpose(1, 2)
    with drawn(given.draws), redirect_stdout(StringIO()):
        for start in range(case.given, case.given + case.frames, config.chunk):
            if start in case.switches:
                session.interpolated_prompt_embeds = [given.texts[1 + case.switches.index(start)][None]]
            session.generate_block_internal(models)
    return session.all_latents.transpose(1, 2).clone()


def official(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of their pipeline."""
    if case.experts:
        return fastvideo_stage(case, given)
    ours, noise, texts, draws = given[:4]
    assert isinstance(ours, CausalWan)
    if "fastvideo" in sys.modules:
        student = FastVideo(ours, case.config, case.batch)
        return rollout(student, ours.encode_text(texts[0][None]), noise, case.config, renoise=draws)
    if "release_server" in sys.modules:
        return served(case, given)
    if "models.wan" in sys.modules:
        return streamed(case, given)
    if "causvid" in sys.modules:
        return causvid(case, given)
    config, modules = case.config, sys.modules
    wrapper, second = wrapped(case, given), "wan_5b" in modules  # LongLive 2.0
    settings = Options(
        denoising_step_list=list(config.steps), warp_denoising_step=True, num_frame_per_block=config.chunk, context_noise=0,
        independent_first_frame=False, denoising_step_list_first_chunk=config.first_chunk_steps and list(config.first_chunk_steps),
        checkpoint_path="", model_kwargs=Options(local_attn_size=config.window or -1), **case.options,
    )  # fmt: skip
    latents = noise.transpose(1, 2)
    text, vae = TextStandIn(texts), VAEStandIn()
    if config.unipc_steps is not None:
        settings |= Options(
            num_train_timestep=1000,
            timestep_shift=config.shift,
            guidance_scale=config.guidance or 1.0,
            negative_prompt="1",
        )
        texts_of_rows: list[Any] = ["0"] * case.batch
        if second:  # a text for each chunk
            wrapper._compiled_model_call = None
            settings |= Options(
                image_or_video_shape=[case.batch, case.frames, SIZES.in_dim, HEIGHT, WIDTH],
                inference=Options(sink_size=config.sink, local_attn_size=config.window),
            )
            texts_of_rows = [["0"] * (case.frames // config.chunk)] * case.batch
        diffusion = modules["pipeline.causal_diffusion_inference"].CausalDiffusionInferencePipeline(
            Options(settings), "cpu", generator=wrapper, text_encoder=text, vae=vae
        )
        diffusion.sampling_steps = config.unipc_steps
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            found = diffusion.inference(latents, texts_of_rows, return_latents=True)
        return (found if second else found[1]).transpose(1, 2)
    interactive = "pipeline.interactive_causal_inference" in modules and bool(case.switches)
    where = modules["pipeline.interactive_causal_inference" if interactive else "pipeline.causal_inference"]
    pipeline = getattr(where, "InteractiveCausalInferencePipeline" if interactive else "CausalInferencePipeline")(
        settings, "cpu", generator=wrapper, text_encoder=text, vae=vae
    )
    prompts: dict[str, Any] = {"text_prompts": ["0"] * case.batch}
    if interactive:
        rows = [[str(i)] * case.batch for i in range(len(texts))]
        prompts = {"text_prompts_list": rows, "switch_frame_indices": list(case.switches)}
    elif case.switches:  # Infinity-RoPE: scenes in one string, with their seconds
        prompts = {"text_prompts": [f"0[{case.switches[0] * 4 / 16}s{'#' * case.cut}] | 1"]}
    with drawn(draws), redirect_stdout(StringIO()):
        return pipeline.inference(latents, return_latents=True, **prompts)[1].transpose(1, 2)
