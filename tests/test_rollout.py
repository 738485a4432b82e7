"""The sampler against the official pipeline's numbers, and its identities in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from afd_fast.reference.schedule import step_table
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.toy.model import ToyConfig, ToyStudent
from afd_fast.students.toy.text import tokenize
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.training import train
from tests.test_graphs import Recorder

FOUR = RolloutConfig()


@pytest.fixture(scope="module")
def golden():
    import json
    from pathlib import Path

    from safetensors import safe_open

    with safe_open(Path(__file__).parent / "golden" / "causal_wan_tiny_fp32.safetensors", "pt") as file:
        keys = [k for k in file.keys() if k.startswith(("sd.", "roll.", "in.context", "sched."))]
        return {k: file.get_tensor(k) for k in keys}, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def official(golden):
    tensors, config = golden
    model = CausalWan(**{k: v for k, v in config.items() if k in CausalWanConfig.__dataclass_fields__})
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")})
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).double()


def inputs(model, batch=2, frames=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 16, frames, 4, 6, generator=g, dtype=torch.float64)
    return noise, model.encode_text(torch.randn(batch, 12, 24, generator=g, dtype=torch.float64))


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_schedule(golden):
    table = step_table((1000, 750, 500, 250), 5.0)
    assert torch.equal(torch.tensor([t for t, _ in table]), golden[0]["sched.warped_steps"])
    every = step_table(tuple(range(1000, 0, -1)), 5.0)
    assert torch.equal(torch.tensor([s for _, s in every]), golden[0]["sched.sigmas"])
    assert torch.equal(torch.tensor([t for t, _ in every]), golden[0]["sched.timesteps"])
    assert [round(t, 1) for t, _ in step_table((1000, 750, 500, 250), 8.0)] == [1000, 960, 888.9, 727.3]  # demo.py


def test_equals_the_official_pipeline(official, golden):
    """Every call of the official rollout: its x, t, flow; then the latents. The last cache pass is not made."""
    data, calls = golden[0], []
    text = official.encode_text(data["in.context"])
    noise = data["roll.noise"].transpose(1, 2)
    times = dict(step_table(FOUR.steps, FOUR.shift))
    hook = official.register_forward_hook(lambda m, args, out: calls.append((args[0], args[1], out)))
    latents = rollout(official, text, noise, FOUR, renoise=data["roll.renoise"])
    hook.remove()
    assert len(calls) == 14 and set(times) == set(data["roll.call_t"].unique().tolist()) - {0.0}
    for (x, _, flow), x_ref, flow_ref in zip(calls, data["roll.call_x"], data["roll.call_flow"]):
        assert (x.transpose(1, 2) - x_ref).abs().max() < 1e-5
        assert (flow.transpose(1, 2) - flow_ref).abs().max() < 1e-5
    assert (latents.transpose(1, 2) - data["roll.latents"]).abs().max() < 1e-5
    ours = data["roll.renoise"].unflatten(1, (2, 3)).transpose(2, 3)  # [draws, B, C, f, H, W]
    assert torch.equal(rollout(official, text, noise, FOUR, renoise=ours), latents)


def test_a_seed_draws_in_the_official_order(official, golden):
    text = official.encode_text(golden[0]["in.context"])
    noise = golden[0]["roll.noise"].transpose(1, 2)
    g = torch.Generator().manual_seed(5)
    drawn = torch.stack([torch.randn(6, 16, 6, 10, generator=g) for _ in range(9)])
    by_seed = rollout(official, text, noise, FOUR, generator=generators(5)[0])
    assert torch.equal(by_seed, rollout(official, text, noise, FOUR, renoise=drawn))


@torch.no_grad()
@pytest.mark.parametrize("window, sink", [(None, 0), (6, 0), (7, 1)])
def test_batch_equals_single_rollouts(model, window, sink):
    config = RolloutConfig(window=window, sink=sink)
    noise, text = inputs(model)
    both = rollout(model, text, noise, config, generator=generators(3, 4))
    for b in range(2):
        one = rollout(model, text[b : b + 1], noise[b : b + 1], config, generator=generators(3 + b)[0])
        assert (both[b : b + 1] - one).abs().max() < 1e-12
    shared = rollout(model, text[:1], noise, config, generator=generators(3, 4))  # one prompt for the batch
    assert (shared[:1] - both[:1]).abs().max() < 1e-12 and (shared[1:] - both[1:]).abs().max() > 1e-6


@torch.no_grad()
def test_prompts_of_different_lengths(model):
    noise, _ = inputs(model)
    prompts = [torch.randn(n, 24, dtype=torch.float64) for n in (3, 12)]
    both = rollout(model, model.encode_text(prompts), noise, generator=generators(1, 2))
    one = rollout(model, model.encode_text(prompts[:1]), noise[:1], generator=generators(1))
    assert (both[:1] - one).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("window, sink, frames", [(None, 0, 9), (6, 0, 15), (7, 1, 15)])
def test_fused_cache_pass_is_exact(model, window, sink, frames):
    noise, text = inputs(model, frames=frames)
    config = RolloutConfig(window=window, sink=sink, context_noise=20)
    plain = rollout(model, text, noise, config, generator=generators(3, 4))
    fused = rollout(
        model, text, noise, RolloutConfig(window=window, sink=sink, context_noise=20, fuse_cache_pass=True),
        generator=generators(3, 4),
    )  # fmt: skip
    assert (plain - fused).abs().max() < 1e-12


@torch.no_grad()
def test_independent_first_frame_and_first_chunk_steps(model):
    noise, text = inputs(model, frames=7)
    calls = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((args[0].shape[2], kwargs["start_frame"])), with_kwargs=True
    )
    config = RolloutConfig(steps=(1000, 500), first_chunk_steps=(1000, 750, 500, 250), independent_first_frame=True)
    out = rollout(model, text, noise, config, generator=generators(1, 2))
    hook.remove()
    assert out.shape == noise.shape
    assert calls == [(1, 0)] * 5 + [(3, 1)] * 3 + [(3, 4)] * 2


@torch.no_grad()
def test_continuation_equals_the_long_rollout(model):
    """Feeding the first chunks back as initial latents and going on gives the rest of the rollout."""
    noise, text = inputs(model, frames=9)
    draws = torch.randn(9, 2, 16, 3, 4, 6, dtype=torch.float64)
    whole = rollout(model, text, noise, renoise=draws)
    rest = rollout(model, text, noise[:, :, 6:], renoise=draws[6:], initial_latent=whole[:, :, :6])
    assert (rest - whole).abs().max() < 1e-12


@torch.no_grad()
def test_continuations_share_one_history(model):
    """K rollouts from one given video and prompt: the history is run once, not K times, with the same result."""
    noise, text = inputs(model, batch=3, frames=6)
    text, given = text[:1], torch.randn(1, 16, 6, 4, 6, dtype=torch.float64)
    batches = []
    hook = model.register_forward_pre_hook(lambda m, args: batches.append(args[0].shape[0]))
    shared = rollout(model, text, noise, generator=generators(1, 2, 3), initial_latent=given)
    hook.remove()
    assert batches == [1, 1] + [3] * 9
    each = rollout(model, text, noise, generator=generators(1, 2, 3), initial_latent=given.expand(3, -1, -1, -1, -1))
    assert (shared - each).abs().max() < 1e-12
    with pytest.raises(ValueError, match="needs one prompt"):
        rollout(model, text[[0, 0, 0]], noise, initial_latent=given)
    with pytest.raises(ValueError, match="initial_latent"):
        rollout(model, text, noise, initial_latent=given[:, :8])


def test_inference_mode(model):
    noise, text = inputs(model)
    with torch.inference_mode():
        out = rollout(model, text, noise, generator=generators(1, 2))
    assert torch.equal(out, rollout(model, text, noise, generator=generators(1, 2)))


@torch.no_grad()
def test_image_to_video(model):
    noise, text = inputs(model, frames=6)
    first = torch.randn(2, 16, 1, 4, 6, dtype=torch.float64)
    out = rollout(model, text, noise, RolloutConfig(independent_first_frame=True), initial_latent=first)
    assert out.shape[2] == 7 and torch.equal(out[:, :, :1], first)


def test_stream_yields_chunks_and_reports(model):
    noise, text = inputs(model)
    seen = []
    parts = stream(model, text, noise, generator=generators(3, 4), progress=lambda *a: seen.append(a))
    first = next(parts)
    assert torch.is_grad_enabled() and not first.requires_grad and seen == [(1, 3)]
    whole = torch.cat([first, *parts], 2)
    assert torch.equal(whole, rollout(model, text, noise, generator=generators(3, 4))) and seen[-1] == (3, 3)


def test_grad_of_the_last_step_only(model):
    noise, text = inputs(model, frames=6)
    draws = torch.randn(6, 2, 16, 3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = rollout(model, text, noise, renoise=draws)
    out = rollout(model, text, noise, renoise=draws, grad_last_step=True)
    assert out.requires_grad and (out - plain).abs().max() < 1e-12
    for p in model.parameters():
        p.grad = None
    out.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "cross_attn.k.b" not in n
    )


@pytest.mark.parametrize("grad", [False, True])
def test_the_default_dtype_changes_nothing(model, default_dtype, grad):
    """t = 937.5 rounded to bfloat16 is another noise level."""
    noise, text = inputs(model)
    toy = ToyStudent(ToyConfig(frames=6))
    toy_noise = torch.randn(1, 3, 6, 16, 16)

    def results():
        config = RolloutConfig(steps=(1000, 937.5, 625))
        wan = rollout(model, text, noise, config, generator=generators(1, 2), grad_last_step=grad)
        drawn = toy.encode_text(tokenize(["a ball"]))
        with torch.no_grad():
            return wan.detach(), rollout(toy, drawn, toy_noise, RolloutConfig(), generator=generators(3))

    expected = results()
    default_dtype()
    for found, want in zip(results(), expected):
        assert found.dtype == want.dtype and torch.equal(found, want)


def test_toy_student_still_rolls_out():
    torch.manual_seed(0)
    toy = ToyStudent(ToyConfig(frames=6))
    noise = torch.randn(2, 3, 6, 16, 16)
    out = rollout(toy, toy.encode_text(tokenize(["a ball", "two"])), noise, generator=generators(1)[0])
    assert out.shape == noise.shape and out.isfinite().all() and not out.requires_grad


class TestLoRA:
    @pytest.fixture
    def adapted(self):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = CausalWan(CausalWanConfig.tiny()).double()
        config = LoraConfig(r=4, lora_alpha=8, target_modules=r"blocks\..*\.(q|k|v|o|ffn\.0|ffn\.2)")
        peft_model = get_peft_model(base, config).double()
        for name, p in peft_model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return peft_model

    def test_merged_equals_unmerged_and_is_restored(self, adapted):
        noise, text = inputs(adapted, frames=6)
        before = {k: v.clone() for k, v in adapted.state_dict().items()}
        pointers = {n: p.data_ptr() for n, p in adapted.named_parameters()}
        draws = torch.randn(6, 2, 16, 3, 4, 6, dtype=torch.float64)
        with torch.no_grad():
            merged = rollout(adapted, text, noise, renoise=draws)
            unmerged = rollout(adapted, text, noise, RolloutConfig(merge_lora=False), renoise=draws)
            with adapted.disable_adapter():
                without = rollout(adapted, text, noise, renoise=draws)
        assert (merged - unmerged).abs().max() < 1e-10 and (merged - without).abs().max() > 1e-3
        assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
        assert pointers == {n: p.data_ptr() for n, p in adapted.named_parameters()}
        assert {p.requires_grad for n, p in adapted.named_parameters() if "lora_" in n} == {True}

    def test_restored_after_an_error_or_an_early_stop(self, adapted):
        noise, text = inputs(adapted, frames=6)
        before = {k: v.clone() for k, v in adapted.state_dict().items()}
        parts = stream(adapted, text, noise)
        next(parts)
        assert any(not torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
        parts.close()
        assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
        with pytest.raises(RuntimeError, match="stop"):
            rollout(adapted, text, noise, progress=lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
        assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": (500, 1000)}, "fall"),
        ({"steps": (500, 500)}, "fall"),
        ({"steps": ()}, "fall"),
        ({"steps": (1200,)}, "1000"),
        ({"first_chunk_steps": (1, 2)}, "first_chunk_steps"),
        ({"context_noise": -1}, "context_noise"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)


def test_bad_input(model):
    noise, text = inputs(model)
    with pytest.raises(ValueError, match="divide"):
        rollout(model, text, noise[:, :, :8])
    with pytest.raises(ValueError, match="not both"):
        rollout(model, text, noise, generator=generators(1)[0], renoise=noise)
    with pytest.raises(ValueError, match="generators"):
        rollout(model, text, noise, generator=generators(1))
    with pytest.raises(ValueError, match="2 draws"):
        rollout(model, text, noise, renoise=torch.zeros(2, 6, 16, 4, 6))
    with pytest.raises(ValueError, match="want"):
        rollout(model, text, noise, renoise=torch.zeros(9, 6, 16, 4, 4))
    with pytest.raises(ValueError, match="even"):
        rollout(model, text, noise[..., :3])
    with pytest.raises(TypeError, match="float32"):
        rollout(model, text, noise.float())
    with pytest.raises(ValueError, match="window"):
        rollout(model, text, noise, RolloutConfig(window=2))
    with pytest.raises(ValueError, match="sink"):
        rollout(model, text, noise, RolloutConfig(window=3, sink=3))


def test_what_is_no_encoded_text_is_refused_by_name(model):
    """Prompts or embeddings where encode_text's result belongs; in every forward, in a schedule, with CUDA graphs' stand-in, and for the
    toy student."""
    noise, text = inputs(model, 1, 6)
    raw = torch.randn(1, 12, 24, dtype=torch.float64)
    x, t = noise[:, :, :3], torch.full((1, 3), 500.0)
    toy, small = ToyStudent(), torch.randn(1, 3, 12, 16, 16)
    calls = [partial(rollout, model, noise=noise), lambda text: rollout(model, [(0, text), (3, text)], noise),
             lambda text: rollout(GraphedStudent(model, recorder=Recorder()), text, noise), partial(model, x, t),
             lambda text: model(x, t, text, cache=model.new_cache(1, 6, 4, 6)),
             lambda text: model.forward_teacher_forcing(x, t, text, x), lambda text: model.forward_block_causal(x, t, text),
             lambda text: rollout(toy, text, small), lambda text: toy.forward_block_causal(small, torch.zeros(1, 12), text),
             lambda text: toy.forward_teacher_forcing(small, torch.zeros(1, 12), text, small)]  # fmt: skip
    for call in calls:
        for wrong, given in (
            (raw, r"a tensor \(1, 12, 24\)"),
            ("a ball", "a str"),
            (["a ball"], "a list"),
            (None, "a NoneType"),
        ):
            with (
                pytest.raises(TypeError, match=f"text must be a (Wan|Toy)Text, .*encode_text.*, got {given}"),
                torch.no_grad(),
            ):
                call(text=wrong)
    graphed = GraphedStudent(model, recorder=Recorder())
    with torch.no_grad():
        rollout(graphed, text, noise)  # it keeps a text now
        with pytest.raises(TypeError, match="text must be a WanText"):
            rollout(graphed, raw, noise)


@pytest.mark.parametrize("context,error,message", [
    (torch.zeros(12, 24), ValueError, r"\[B, n, 24\] .* got \(12, 24\): one prompt is context\[None\]"),
    (torch.zeros(1, 12, 16), ValueError, r"\[tokens, 24\], got \(12, 16\)"), (torch.zeros(0, 12, 24), ValueError, "no prompt"),
    ([], ValueError, "no prompt"), ("a ball", TypeError, "embeddings, .* got str"), (["a ball"], TypeError, "embeddings, .* got str"),
    (np.zeros((1, 12, 24)), TypeError, "a NumPy array: give torch.from_numpy"), (None, TypeError, "got NoneType"),
    (torch.zeros(1, 12, 24).long(), TypeError, "got torch.int64"),
])  # fmt: skip
def test_context_that_is_no_embeddings(model, context, error, message):
    with pytest.raises(error, match=message):
        model.encode_text(context)


def test_layouts_and_settings_in_the_wrong_place(model):
    noise, text = inputs(model, 1, 6)
    swapped = noise.transpose(1, 2)
    with pytest.raises(
        ValueError, match=r"noise must be \[B, C, F, H, W\] with C = 16, got \(1, 6, 16, .*give noise.transpose\(1, 2\)"
    ):
        rollout(model, text, swapped)
    with pytest.raises(ValueError, match=r"give initial_latent.transpose\(1, 2\)"):
        rollout(model, text, noise, initial_latent=swapped)
    with pytest.raises(ValueError, match=r"give x.transpose\(1, 2\)"):
        model(swapped[:, :3], torch.full((1, 3), 500.0), text)
    with pytest.raises(TypeError, match="noise must be .* torch.from_numpy"):
        rollout(model, text, noise.numpy())
    with pytest.raises(ValueError, match="7 frames do not divide into chunks of 3: 6 or 9 do"):
        rollout(model, text, torch.cat([noise, noise[:, :, :1]], 2))
    for wrong, way in (
        ("longlive", r"RolloutConfig.preset\('longlive'\)"),
        ({"steps": (1000,)}, "RolloutConfig\\(name"),
        (True, ""),
    ):
        with pytest.raises(TypeError, match=f"config must be a RolloutConfig or None, got .*{way}"):
            rollout(model, text, noise, wrong)
    for call in (rollout, stream):
        with pytest.raises(
            TypeError, match=r"no graphs=: it is a setting of the config, RolloutConfig\(graphs=...\), true or false"
        ):
            call(model, text, noise, graphs=True)
    with pytest.raises(TypeError, match="generator must be a torch.Generator .* got 3"):
        rollout(model, text, noise, generator=3)
    with pytest.raises(TypeError, match="config must be a TrainConfig, got 'demo': give afd_fast.training.runs.get"):
        train("demo")
