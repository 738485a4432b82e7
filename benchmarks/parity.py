"""Rollouts of public causal students by their projects' own pipelines, against `rollout`: same random weights, same noise.

    python -m benchmarks.parity PROJECT CHECKOUT [--dtype float32|float64] [--case NAME]

PROJECT and the commit that was compared: self_forcing 33593df, causal_forcing 1fc7bbc, longlive e52d9ef (branch v1.0), longlive2
7860ad9 (main), infinity_rope 63d7b84, reward_forcing 4317f5a; fastvideo 2f3d407, of which the self-attention runs, with its cache and positions,
inside CausalWan and `rollout`; causvid ca21150; streamdiffusionv2 c5a0f20, whose chunks run one by one; krea acf4b7b, of which the server's session runs, FlexAttention included. CHECKOUT is a folder with that
repository. Runs on the CPU with a small CausalWan. What is theirs: the model, the cache, the wrapper, the schedule and the
pipeline's loop. What is not: text encoder and VAE (stand-ins that pass embeddings and latents on, for krea `Pixels`), flash-attn
(PyTorch's SDPA), krea's bfloat16 and HTTP,
and what is replaced in the source as it is read: the sizes that it holds as numbers (1560 tokens per frame, 12 heads of 128, 30
layers), and casts to float32 in RMSNorm and FastVideo's RoPE, so that float64 is float64. Prints the largest difference of each case; ends with 1 if one exceeds 1e-5 in float32, 1e-9 in float64.
"""

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan
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
    load,
    load_causvid,
    load_fastvideo,
    load_krea,
    load_longlive2,
    load_streamdiffusionv2,
)
from benchmarks.rows import Arguments

BOUNDS = {"float32": 1e-5, "float64": 1e-9}


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
    given: int = 0  # the first of the frames are given


def _windowed(**more: Any) -> RolloutConfig:
    return RolloutConfig(window=12, sink=3, **more)


TWO_STEP = RolloutConfig(steps=(1000, 500), first_chunk_steps=(1000, 750, 500, 250), chunk=1)
ONE_STEP = RolloutConfig(steps=(1000,), first_chunk_steps=(1000, 750, 500, 250), chunk=1)
DIFFUSION = RolloutConfig.preset("ar_diffusion")
ABSOLUTE, INFINITE = _windowed(), _windowed(rope="relative")
KREA = RolloutConfig.preset("krea")
KEPT, REWRITTEN = {"global_sink": True}, {"global_sink": False}
CASES = {
    "self_forcing": [
        Case("chunks of 3", RolloutConfig()),
        Case("frame by frame", RolloutConfig(chunk=1), frames=9),
        Case("window 9", RolloutConfig(window=9)),
        Case("window 12, sink 3", ABSOLUTE),
        Case("UniPC, guidance", DIFFUSION, frames=9),
    ],
    "causal_forcing": [
        Case("chunks of 3", RolloutConfig()),
        Case("frame by frame", RolloutConfig(chunk=1), frames=9),
        Case("++ two steps", TWO_STEP, frames=9),
        Case("++ one step", ONE_STEP, frames=9),
        Case("AR diffusion", RolloutConfig.preset("ar_diffusion", unipc_steps=20), frames=6),
        Case("AR diffusion, frame by frame", RolloutConfig.preset("ar_diffusion_framewise", unipc_steps=8), frames=4),
    ],
    "longlive": [
        Case("window 12, sink 3", ABSOLUTE, frames=30),
        Case("prompt switch before the ring is full", ABSOLUTE, 15, 2, (9,), True, KEPT),
        Case("prompt switches after it has rolled", ABSOLUTE, 30, 2, (16, 24), True, KEPT),
        Case("sink rewritten at the switches", ABSOLUTE, 30, 2, (16, 24), "sink", REWRITTEN),
        Case("infinite", INFINITE, frames=42, batch=1, model="causal_model_infinity"),
        Case("infinite, prompt switches", INFINITE, 30, 1, (9, 16, 24), True, KEPT, "causal_model_infinity"),
        Case("infinite, sink rewritten", INFINITE, 30, 1, (16, 24), "sink", REWRITTEN, "causal_model_infinity"),
    ],
    "longlive2": [
        Case("UniPC, window 32, sink 8", RolloutConfig.preset("longlive2"), frames=56),
        Case("UniPC, guidance", RolloutConfig.preset("longlive2", window=16, guidance=3.0), frames=32),
    ],
    "infinity_rope": [
        Case("window 6, sink 1", RolloutConfig(window=6, sink=1, rope="relative"), frames=30, batch=1),
        Case("window 12, sink 1", RolloutConfig(window=12, sink=1, rope="relative"), frames=30, batch=1),
        Case("window 6, sink 1, flushed at a switch", RolloutConfig(window=6, sink=1, rope="relative"), 30, 1, (12,)),
        Case(
            "window 6, sink 1, after a scene cut",
            RolloutConfig(window=6, sink=1, rope="relative"),
            18,
            1,
            (12,),
            cut=True,
        ),
        Case("window 6, sink 1, scene cut", RolloutConfig(window=6, sink=1, rope="relative"), 9, 1, (6,), cut=True),
    ],
    "reward_forcing": [
        Case("window 9, sink 3, averaged", RolloutConfig(window=9, sink=3, rope="relative", sink_ema=0.999), frames=30),
        Case("window 12, sink 3, averaged", _windowed(rope="relative", sink_ema=0.999), frames=30),
    ],
    "causvid": [
        Case("three steps", RolloutConfig.preset("causvid"), batch=1),
        Case("four steps", RolloutConfig.preset("causvid_4step"), frames=12, batch=1),
        Case("three steps, from 6 frames", RolloutConfig.preset("causvid"), 12, 1, given=6),
    ],
    "streamdiffusionv2": [
        Case("text to video, until its cache is full", RolloutConfig.preset("streamdiffusionv2"), frames=18, batch=1),
        Case(
            "video to video, until its cache is full", RolloutConfig.preset("streamdiffusionv2_v2v"), frames=5, batch=1
        ),
    ],
    "krea": [
        Case("its server", KREA, batch=1),
        Case("context of 6", replace(KREA, window=9), batch=1),
        Case("context of 6, first frame kept", replace(KREA, window=9, sink=1), batch=1),
        Case("context of 6, another prompt", replace(KREA, window=9), 15, 1, (12,)),
        Case("context of 6, from 6 frames", replace(KREA, window=9), 21, 1, given=6),
    ],
    "fastvideo": [
        Case("absolute", RolloutConfig()),
        Case("absolute, window 12, sink 3", ABSOLUTE, frames=30),
        Case("relativistic, window 12, sink 3", INFINITE, frames=30),
        Case("relativistic, window 9, sink 0", RolloutConfig(window=9, rope="relative"), frames=30),
    ],
}


class Prepared(NamedTuple):
    """What both sides are given."""

    model: CausalWan
    noise: Tensor  # [B, C, F, H, W]
    texts: list[Tensor]  # embeddings, one per prompt; under guidance the second is the negative prompt's
    draws: Tensor  # [n, B * f, C, H, W] noise between steps


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
    latents = given.noise.transpose(1, 2)
    start = latents[:, : case.given] if case.given else None
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
        prompt="0", width=8 * WIDTH, height=8 * HEIGHT, seed=0, num_blocks=case.frames // config.chunk,
        kv_cache_num_frames=config.window - config.chunk, keep_first_frame=config.sink == 1, timestep_shift=config.shift,
    )  # fmt: skip
    session = server.GenerationSession(params, settings, frame_callback=lambda *_: None, models=models)
    session.noise = given.noise.transpose(1, 2).clone()
    session.resume_latents = session.noise[:, : case.given] if case.given else None
    with drawn(given.draws, "randn"), redirect_stdout(StringIO()):
        for start in range(case.given, case.frames, config.chunk):
            if start in case.switches:
                session.interpolated_prompt_embeds = [given.texts[1 + case.switches.index(start)][None]]
            session.generate_block_internal(models)
    return session.all_latents.transpose(1, 2).clone()


def official(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of their pipeline."""
    ours, noise, texts, draws = given
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


def prepared(case: Case, dtype: torch.dtype) -> Prepared:
    """From fixed seeds; the weights' and the noise's numbers are those of float64, rounded."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    model = CausalWan(SIZES).to(dtype).eval()
    for name, p in model.named_parameters():
        scale = 0.1 if p.ndim == 1 or "modulation" in name else p.shape[1:].numel() ** -0.5
        p.data = randn(*p.shape) * scale + ("norm" in name and name.endswith("weight"))
    noise = randn(case.batch, SIZES.in_dim, case.frames, HEIGHT, WIDTH)
    prompts = len(case.switches) + (1 if case.config.guidance is None else 2)
    texts = [randn(SIZES.text_len, SIZES.text_dim) for _ in range(prompts)]
    draws = randn(case.frames * 4, case.batch * case.config.chunk, SIZES.in_dim, HEIGHT, WIDTH)
    return Prepared(model, noise, texts, draws)


def ours(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of `rollout`."""
    encoded = [given.model.encode_text(text[None]) for text in given.texts]
    if case.config.guidance is not None:
        return rollout(given.model, encoded[0], given.noise, case.config, negative=encoded[1])
    schedule = [(0, encoded[0]), *zip(case.switches, encoded[1:])] if case.switches else encoded[0]
    cuts, noise = case.switches if case.cut else (), given.noise
    pixels = Pixels(given.model.dtype).first_frame if case.config.reencodes else None
    return rollout(
        given.model, schedule, noise[:, :, case.given :], case.config, renoise=given.draws, recache=case.recache, scene_cuts=cuts,
        initial_latent=noise[:, :, : case.given] if case.given else None, first_frame=pixels,
    )  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("project", choices=list(CASES))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--dtype", choices=list(BOUNDS), default="float64")
    parser.add_argument("--case", help="only this one")
    parser.add_argument("--record", type=Path, help="write their last chunks here, as tests/golden/rollouts has them")
    args = parser.parsed()
    {
        "causvid": load_causvid,
        "fastvideo": load_fastvideo,
        "longlive2": load_longlive2,
        "krea": load_krea,
        "streamdiffusionv2": load_streamdiffusionv2,
    }.get(args.project, load)(args.checkout)
    failed, recorded = False, {}
    for case in CASES[args.project]:
        if args.case in (None, case.name):
            given = prepared(case, getattr(torch, args.dtype))
            theirs = official(case, given)
            found = ((ours(case, given) - theirs).abs().max() / theirs.abs().max()).item()
            failed |= not found <= BOUNDS[args.dtype]
            recorded[case.name] = theirs[:, :, -case.config.chunk :].float().contiguous()
            print(f"{args.project}: {case.name}: {found:.1e}", flush=True)
    if args.record:
        save_file(recorded, args.record)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
