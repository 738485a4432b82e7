"""Rollouts of public causal students by their projects' own pipelines, against `rollout`: same random weights, same noise.

    python -m benchmarks.parity PROJECT CHECKOUT [--dtype float32|float64] [--case NAME]

PROJECT and the commit that was compared: self_forcing 33593df, causal_forcing 1fc7bbc, longlive e52d9ef (branch v1.0), longlive2
7860ad9 (main), infinity_rope 63d7b84, reward_forcing 4317f5a; fastvideo 2f3d407, of which the self-attention runs, with its cache and positions,
inside CausalWan and `rollout`, or with two experts inside CausalWan and its own stage, scheduler and caches; each expert there is given its
text, where the stage caches the first one's for both; causvid ca21150; streamdiffusionv2 c5a0f20, whose chunks run one by one; krea
acf4b7b, of which the server's session runs, FlexAttention included. CHECKOUT is a folder with that
repository. Runs on the CPU with a small CausalWan. What is theirs: the model, the cache, the wrapper, the schedule and the
pipeline's loop. What is not: text encoder and VAE (stand-ins that pass embeddings and latents on, for krea `Pixels`), flash-attn
(PyTorch's SDPA), krea's bfloat16 and HTTP,
and what is replaced in the source as it is read: the sizes that it holds as numbers (1560 tokens per frame, 12 heads of 128, 30
layers), and casts to float32 in RMSNorm and FastVideo's RoPE, so that float64 is float64. Prints the largest difference of each case; ends with 1 if one exceeds 1e-5 in float32, 1e-9 in float64.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, TwoExperts
from benchmarks.checkouts import (
    HEIGHT,
    SIZES,
    WIDTH,
    Pixels,
    drawn,
    load,
    load_causvid,
    load_fastvideo,
    load_krea,
    load_longlive2,
    load_streamdiffusionv2,
)
from benchmarks.pipelines import BOUNDARY, Case, Prepared, official
from benchmarks.rows import Arguments

BOUNDS = {"float32": 1e-5, "float64": 1e-9}


def _windowed(**more: Any) -> RolloutConfig:
    return RolloutConfig(window=12, sink=3, **more)


TWO_STEP = RolloutConfig(steps=(1000, 500), first_chunk_steps=(1000, 750, 500, 250), chunk=1)
ONE_STEP = RolloutConfig(steps=(1000,), first_chunk_steps=(1000, 750, 500, 250), chunk=1)
DIFFUSION = RolloutConfig.preset("ar_diffusion")
ABSOLUTE, INFINITE = _windowed(), _windowed(rope="relative")
A14B, KREA = RolloutConfig.preset("fastvideo_a14b"), RolloutConfig.preset("krea")
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
        Case("three steps, from 6 frames", RolloutConfig.preset("causvid"), 6, 1, given=6),
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
        Case("context of 6, from 6 frames", replace(KREA, window=9), 15, 1, given=6),
    ],
    "fastvideo": [
        Case("absolute", RolloutConfig()),
        Case("absolute, window 12, sink 3", ABSOLUTE, frames=30),
        Case("relativistic, window 12, sink 3", INFINITE, frames=30),
        Case("relativistic, window 9, sink 0", RolloutConfig(window=9, rope="relative"), frames=30),
        Case("two experts", A14B, frames=10, batch=1, experts=True),
        Case("two experts, window 6, sink 1", replace(A14B, window=6, sink=1), frames=16, batch=1, experts=True),
        Case("two experts, from an image", A14B, frames=9, batch=1, experts=True, given=1),
    ],
}


def prepared(case: Case, dtype: torch.dtype) -> Prepared:
    """From fixed seeds; the weights' and the noise's numbers are those of float64, rounded."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    model = TwoExperts(CausalWan(SIZES), CausalWan(SIZES), BOUNDARY) if case.experts else CausalWan(SIZES)
    model = model.to(dtype).eval()
    for name, p in model.named_parameters():
        scale = 0.1 if p.ndim == 1 or "modulation" in name else p.shape[1:].numel() ** -0.5
        p.data = randn(*p.shape) * scale + ("norm" in name and name.endswith("weight"))
    noise = randn(case.batch, SIZES.in_dim, case.frames, HEIGHT, WIDTH)
    prompts = len(case.switches) + (1 if case.config.guidance is None else 2)
    texts = [randn(SIZES.text_len, SIZES.text_dim) for _ in range(prompts)]
    draws = randn(case.frames * 4, case.batch * case.config.chunk, SIZES.in_dim, HEIGHT, WIDTH)
    initial = randn(case.batch, SIZES.in_dim, case.given, HEIGHT, WIDTH).float().to(dtype) if case.given else None
    return Prepared(model, noise, texts, draws, initial)


def ours(case: Case, given: Prepared) -> Tensor:
    """Latents [B, C, F, H, W] of `rollout`."""
    encoded = [given.model.encode_text(text[None]) for text in given.texts]
    if case.experts:
        with drawn(given.draws):
            return rollout(given.model, encoded[0], given.noise, case.config, initial_latent=given.initial)
    if case.config.guidance is not None:
        return rollout(given.model, encoded[0], given.noise, case.config, negative=encoded[1])
    schedule = [(0, encoded[0]), *zip(case.switches, encoded[1:])] if case.switches else encoded[0]
    cuts = case.switches if case.cut else ()
    first_frame = Pixels(given.model.dtype).first_frame if case.config.reencodes else None
    return rollout(
        given.model, schedule, given.noise, case.config, renoise=given.draws, recache=case.recache, scene_cuts=cuts,
        initial_latent=given.initial, first_frame=first_frame,
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
