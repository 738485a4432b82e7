"""Networks on a GPU: operators, attention, CausalWan, CUDA graphs, VAE, VideoReward, an iteration. Skipped without one.

Tolerances: error against float64 at most twice that of PyTorch's operators in the same dtype, and a rounding more.
"""

import copy
import functools
import math

import pytest
import torch

from afd_fast.discriminators.objective import Objective
from afd_fast.generate import GenerateOptions, generate, jobs
from afd_fast.ops import transformer as ops
from afd_fast.ops.attention import BACKENDS, attention, attention_varlen, resolve_backend
from afd_fast.reference import transformer as reference
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.wan.family import LORA_TARGETS, HashText, Networks
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.students.wan.layers import Block
from tests.test_transformer_ops import call, norm_cases, rope_case, to
from tests.tiny_videoalign import clips, reward_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["norm_modulate", "gate_modulate", "gate_affine", "add_modulate", "rms_norm"]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """float32 convolutions are compared with the CPU's; cuDNN's default rounds their operands to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(args):
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)


def within_rounding(ours, eager, exact):
    """Rule: twice the error of PyTorch's own, and a rounding of the largest value."""
    assert len(ours) == len(eager) == len(exact)
    for a, b, c in zip(ours, eager, exact):
        assert a.shape == c.shape and a.isfinite().all()
        top = c.abs().max().item()
        allowed = 2 * ((b.double() - c).abs().max().item() + torch.finfo(a.dtype).eps * top)
        found = (a.double() - c).abs().max().item()
        assert found <= allowed, f"error {found:.3e}, allowed {allowed:.3e}"


def gradients(function, args):
    """Of a sum over all outputs, weighted differently, for every tensor."""
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    outs = function(leaves)
    loss = sum(
        (o.double() * torch.linspace(-1, 1, o.shape[-1], device=o.device, dtype=torch.float64)).sum() for o in outs
    )
    return torch.autograd.grad(loss, [a for a in leaves if isinstance(a, torch.Tensor)])


# -- operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 1536])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, width, dtype):
    wide = on_device(norm_cases(torch.float64, width)[name])
    args = to(wide, dtype)
    exact = to(args, torch.float64)
    kind = "norm_modulate" if name == "norm_modulate" else "rms_norm" if name == "rms_norm" else "residual_norm"
    with torch.no_grad():
        within_rounding(call(kind, args, ops), call(kind, args, reference), call(kind, exact, reference))
    grads = [
        gradients(lambda a, m=m: call(kind, a, m), x) for m, x in ((ops, args), (reference, args), (reference, exact))
    ]
    within_rounding(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim", [(2, 6), (12, 128)])
def test_rope(heads, dim, dtype):
    args = on_device(to(rope_case(torch.float64, heads, dim), dtype))
    q, k, v, wq, wk, cos, sin = args
    cos, sin = (a.to(torch.float64).to(torch.promote_types(dtype, torch.float32)) for a in (cos, sin))

    def run(module, a):
        return module.qk_norm_rope(*a, cos.to(a[0].dtype) if a[0].dtype == torch.float64 else cos,
                                   sin.to(a[0].dtype) if a[0].dtype == torch.float64 else sin)  # fmt: skip

    given = (q, k, wq, wk)
    exact = to(given, torch.float64)
    with torch.no_grad():
        within_rounding(run(ops, given), run(reference, given), run(reference, exact))
        caches = [torch.full((len(q), q.shape[1], heads, dim), math.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
        roped = ops.qk_norm_rope_write(q, k, v, wq, wk, cos, sin, *caches, tokens=q.shape[1] // 3, start_frame=0)
        q_only, k_only = ops.qk_norm_rope(q, k, wq, wk, cos, sin)
    assert torch.equal(roped, q_only) and torch.equal(caches[0], k_only) and torch.equal(caches[1].flatten(2), v)
    within_rounding(
        *(gradients(lambda a, m=m: run(m, a), x) for m, x in ((ops, given), (reference, given), (reference, exact)))
    )


def test_gelu_in_a_rollouts_product():
    """tanh's, as the network's, with at most the errors of the product and GELU apart."""
    block = Block(CausalWanConfig.tiny(), {"attention": "auto", "official_rounding": True}).to(DEVICE, torch.bfloat16)
    h = random(2, 300, block.ffn[0].in_features)
    with torch.no_grad():
        exact = copy.deepcopy(block).double().ffn(h.double())
        within_rounding([block.feed_forward(h, rolled=True)], [block.ffn(h)], [exact])


# -- attention -----------------------------------------------------------------------------------------------------


def installed(backend):
    try:
        return resolve_backend(backend, DEVICE, torch.bfloat16)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))


def random(*shape, seed=0, dtype=torch.bfloat16):
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=g).to(dtype)


def keys_and_values(layout):
    """[2, 300, 4, 64]: packed; the first frames of a longer cache; one prompt's, expanded over the batch (stride 0)."""
    if layout == "packed":
        return random(2, 300, 4, 64, seed=1), random(2, 300, 4, 64, seed=2)
    if layout == "cache":
        return random(2, 900, 4, 64, seed=1)[:, :300], random(2, 900, 4, 64, seed=2)[:, :300]
    return tuple(random(1, 300, 4, 64, seed=s).expand(2, -1, -1, -1) for s in (1, 2))


@pytest.mark.parametrize("layout", ["packed", "cache", "one prompt"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_attention(backend, layout):
    installed(backend)
    q, (k, v) = random(2, 96, 4, 64), keys_and_values(layout)
    exact = reference.attention(q.double(), k.double(), v.double())[0]
    with torch.no_grad():
        within_rounding([attention(q, k, v, backend=backend)], [reference.attention(q, k, v)[0]], [exact])
    ours = lambda a: [attention(*a, backend=backend)]
    plain = lambda a: [reference.attention(*a)[0]]
    args = (q, k, v)
    # a flash kernel's backward rounds the probabilities once more than the definition, which is in float32 inside
    found, eager, wide = gradients(ours, args), gradients(plain, args), gradients(plain, to(args, torch.float64))
    for a, b, c in zip(found, eager, wide):
        top = c.abs().max()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 4 * torch.finfo(a.dtype).eps * top


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_attention_of_packed_segments(backend, causal):
    installed(backend)
    lengths, q, k, v = (70, 70, 131), random(271, 4, 64), random(271, 2, 64, seed=1), random(271, 2, 64, seed=2)
    begin, exact, eager = 0, [], []
    for n in lengths:
        parts = [a[None, begin : begin + n] for a in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
        for out, dtype in ((exact, torch.float64), (eager, torch.bfloat16)):
            heads = (a.to(dtype).transpose(1, 2) for a in parts)
            out.append(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)[0])
        begin += n
    within_rounding(
        [attention_varlen(q, k, v, lengths, causal=causal, backend=backend)], [torch.cat(eager)], [torch.cat(exact)]
    )


# -- CausalWan -----------------------------------------------------------------------------------------------------

CONFIG = CausalWanConfig(dim=256, ffn_dim=512, num_heads=4, num_layers=3, text_len=20, text_dim=32, freq_dim=64)
SIZE = (8, 12)


def student(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return CausalWan(CONFIG).to(DEVICE, dtype).eval()


def text_of(model, batch=1, seed=5):
    with torch.no_grad():
        return model.encode_text(random(batch, CONFIG.text_len, CONFIG.text_dim, seed=seed).to(model.dtype))


def latents(model, batch=1, frames=9, seed=7):
    return random(batch, 16, frames, *SIZE, seed=seed, dtype=torch.float32).to(model.dtype)


def chunk_by_chunk(model, x, clean, t):
    """Cached forwards of chunks of three frames over the clean ones before them."""
    text, cache, out = text_of(model, len(x)), model.new_cache(len(x), x.shape[2], *SIZE), []
    for start in range(0, x.shape[2], 3):
        part = slice(start, start + 3)
        out.append(model(x[:, :, part], t[:, part], text, cache=cache, start_frame=start))
        with torch.no_grad():
            model(clean[:, :, part], torch.zeros_like(t[:, part]), text, cache=cache, start_frame=start)
    return torch.cat(out, 2)


PATTERNS = {
    "bidirectional": lambda m, x, clean, t: m(x, t, text_of(m, len(x))),
    "cached": chunk_by_chunk,
    "teacher forcing": lambda m, x, clean, t: m.forward_teacher_forcing(x, t, text_of(m, len(x)), clean, chunk=3),
    "block causal": lambda m, x, clean, t: m.forward_block_causal(x, t, text_of(m, len(x)), chunk=3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_and_backward(pattern, dtype):
    """Kernels against the reference's operators (those with a gradient) in the same dtype, both against float64."""
    model, wide = student(dtype), copy.deepcopy(student(dtype)).double()
    x, clean = latents(model, 2), latents(model, 2, seed=8)
    t = torch.rand(2, 3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).repeat_interleave(3, 1) * 1000
    run = PATTERNS[pattern]
    with torch.no_grad():
        ours = run(model, x, clean, t)
    eager, exact = run(model, x, clean, t), run(wide, x.double(), clean.double(), t)
    within_rounding([ours], [eager.detach()], [exact.detach()])
    weights = [m.blocks[0].ffn[0].weight for m in (model, wide)]
    grads = [torch.autograd.grad(v.double().square().mean(), w)[0].double() for v, w in zip((eager, exact), weights)]
    assert (grads[0] - grads[1]).norm() <= 16 * torch.finfo(dtype).eps * grads[1].norm()


def test_cached_forwards_equal_teacher_forcing():
    model = student(torch.float32)
    x, clean, t = latents(model), latents(model, seed=8), torch.full((1, 9), 600.0, device=DEVICE)
    with torch.no_grad():
        a, b = (PATTERNS[name](model, x, clean, t) for name in ("cached", "teacher forcing"))
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def draws(model, batch=1, frames=9):
    return random(frames // 3 * 3, batch, 16, 3, *SIZE, seed=9, dtype=torch.float32).to(model.dtype)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"fuse_cache_pass": True}], ids=str)
def test_rollout_equals_the_cpus(options):
    model, config = student(torch.float32), RolloutConfig(**options)
    text, x, noise = text_of(model, 2), latents(model, 2), draws(model, 2)
    found = rollout(model, text, x, config, renoise=noise)
    cpu = copy.deepcopy(model).cpu()
    expected = rollout(cpu, text.map(torch.Tensor.cpu), x.cpu(), config, renoise=noise.cpu())
    assert (found.cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()


def same(a, b):
    """Recorded products may run with another of cuBLAS's algorithms."""
    assert (a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max()


def test_graphs_equal_the_model_and_are_used_again():
    """Other prompts, another batch, the first again, adapters that are merged, an optimiser's step: each time as the model."""
    model = student()
    add_lora(model, 4, list(LORA_TARGETS))
    graphed = GraphedStudent(model)
    for round_, batch in enumerate((1, 1, 2, 1, 2)):
        text, x, noise = text_of(model, batch, seed=round_), latents(model, batch, seed=round_), draws(model, batch)
        expected = rollout(model, text, x, renoise=noise)
        for _ in range(3):  # as it is, recorded, replayed
            same(rollout(graphed, text, x, renoise=noise), expected)
        with torch.no_grad():
            for p in trainable(model).values():
                p.add_(0.02 * torch.randn_like(p))


def test_the_rollouts_graphs_of_two_students():
    for model in (first := student(), student()):
        text, x, noise = text_of(model), latents(model), draws(model)
        for _ in range(2):
            same(
                rollout(model, text, x, RolloutConfig(graphs=True), renoise=noise),
                rollout(model, text, x, renoise=noise),
            )
    text, x, noise = text_of(first, seed=3), latents(first, seed=3), draws(first)
    same(rollout(first, text, x, RolloutConfig(graphs=True), renoise=noise), rollout(first, text, x, renoise=noise))


@pytest.mark.parametrize("more", [{}, {"rope": "relative"}, {"rope": "relative", "sink_ema": 0.9}], ids=str)
def test_a_windowed_streams_graphs(more):
    """A ring that goes round replays its few recordings, with RoPE tables and the sink's keys brought up to date between."""
    model = student()
    config = RolloutConfig(steps=(1000, 500), window=9, sink=3, **more)
    text, x, noise = text_of(model), latents(model, frames=30), draws(model, frames=30)
    graphed = GraphedStudent(model)
    for _ in range(2):
        same(rollout(graphed, text, x, config, renoise=noise), rollout(model, text, x, config, renoise=noise))
    assert len(graphed._graphs) == 4 * 3  # two places while it fills, two after; two steps and the cache pass


# -- VAE -----------------------------------------------------------------------------------------------------------


def decoder(chunk=3, dtype=torch.float32, device=DEVICE):
    diffusers = pytest.importorskip("diffusers")
    from afd_fast.students.wan.vae import WanDecoder

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=16, num_res_blocks=1).to(dtype)
    return WanDecoder(vae.to(device), chunk=chunk)


def test_vae_equals_the_cpus():
    """Also with the layout that the GPU's weights have; one latent frame per call and three; in bfloat16 nearly."""
    x = random(2, 16, 6, 4, 6, dtype=torch.float32)
    expected = decoder(device="cpu")(x.cpu())
    for chunk in (1, 3):
        assert (decoder(chunk)(x).cpu() - expected).abs().max() <= 1e-4
    half = decoder(dtype=torch.bfloat16)(x)
    eager = decoder(dtype=torch.bfloat16, device="cpu")(x.cpu())
    assert half.dtype == torch.float32
    assert (half.cpu() - expected).abs().mean() <= 2 * (eager - expected).abs().mean() + 1e-3
    pixels = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0))
    codes = decoder().encode(pixels.to(DEVICE)).cpu()
    assert (codes - decoder(device="cpu").encode(pixels)).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlapped_decoding_equals_serial(tmp_path, dtype):
    """`generate` decodes on a side stream while the next chunk is made; a race would change pixels."""
    model, decode = student(dtype), decoder(dtype=dtype)
    networks, todo = (
        Networks(model, HashText(CONFIG.text_dim, CONFIG.text_len), decode),
        jobs(["a ball", "a box"], seed=3),
    )
    options, found = GenerateOptions(9, *SIZE, batch=2), []
    for _ in range(3):
        found.append({})
        generate(
            networks,
            todo,
            tmp_path,
            options,
            write=lambda path, video, fps: found[-1].update({path.name: video.clone()}),
        )
    generators = [torch.Generator(DEVICE).manual_seed(job.seed) for job in todo]
    noise = torch.stack([torch.randn(16, 9, *SIZE, generator=g, device=DEVICE, dtype=dtype) for g in generators])
    with torch.no_grad():
        text = model.encode_text([row.to(DEVICE) for row in networks.text([job.prompt for job in todo])])
        serial = rollout(model, text, noise, generator=generators)
        torch.cuda.synchronize()
        stream = decode.stream()
        pixels = torch.cat([stream(part) for part in serial.split(3, 2)], 2)
    for made in found:
        for job, expected in zip(todo, pixels):
            assert torch.equal(made[job.name], expected)


# -- discriminator and a whole iteration ---------------------------------------------------------------------------


def test_video_reward():
    prompts, videos, other = ["a cat", "a dog that runs"], clips(2), clips(2, seed=1)
    scores, losses = {}, {}
    for device, dtype in (("cpu", torch.float32), (DEVICE, torch.float32), (DEVICE, torch.bfloat16)):
        model = reward_model(dtype=dtype).to(device)
        with torch.no_grad():
            scores[device, dtype] = model.score(videos.to(device), prompts).float().cpu()
        loss = model.paired_loss(videos.to(device), other.to(device), prompts, Objective()).loss
        loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        norm = torch.stack([p.grad.double().norm() for p in parameters]).norm().item()
        losses[device, dtype] = (loss.item(), norm)
    exact, single, half = scores
    assert (scores[single] - scores[exact]).abs().max() <= 1e-4 * scores[exact].abs().max() + 1e-5
    assert (scores[half] - scores[exact]).abs().max() <= 0.1 * scores[exact].abs().max() + 0.05
    assert losses[single] == pytest.approx(losses[exact], rel=1e-3, abs=1e-6)
    assert losses[half] == pytest.approx(losses[exact], rel=0.3, abs=0.02)


@functools.cache
def steps():
    pytest.importorskip("diffusers")
    from benchmarks import step

    return step


@pytest.mark.parametrize("keys", [[], ["rollout.graphs=true"], ["loss=diffusionnft", "update.v_old=ema"]], ids=str)
def test_an_iteration(keys):
    """afd_table3 with the tiny student: every network on the GPU, finite metrics, weights that move."""
    from afd_fast.config import with_overrides
    from afd_fast.teachers.dataset import collect
    from afd_fast.training.loop import train_step
    from afd_fast.training.run import Run
    from afd_fast.training.state import new_state
    from afd_fast.training.teacher import batch_plan

    step = steps()
    config = with_overrides(step.config_of("tiny"), keys)
    family = step.build(config, DEVICE.type)
    data = collect(step.noise_teacher(family.video), config.teacher_clips, None, step.untracked)
    run = Run(config, new_state(config, family))
    before = {name: p.detach().clone() for name, p in trainable(run.state.student).items()}
    for iteration in range(2):
        metrics = train_step(run, data.batch(batch_plan(config), iteration, range(config.shards)))
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    networks = [*run.state.student.parameters(), *run.discriminator.parameters(), *family.vae.vae.parameters()]
    assert {p.device.type for p in networks} == {DEVICE.type}
    assert any(not torch.equal(p, before[name]) for name, p in trainable(run.state.student).items())
