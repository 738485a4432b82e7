"""Two experts, one for high and one for low noise: the rollout against a plain loop without caches, and their folders."""

import copy
import fnmatch
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from afd_fast.cli.doctor import sources
from afd_fast.cli.main import app
from afd_fast.config import StudentConfig, with_overrides
from afd_fast.errors import ConfigError
from afd_fast.estimate.iteration import networks
from afd_fast.reference.schedule import renoise_weights, step_table
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig, Family, TwoExperts, load_student, save_student
from afd_fast.students.student import map_tensors
from afd_fast.students.wan.experts import ExpertTexts
from afd_fast.students.wan.family import tiny, wan_family
from afd_fast.students.wan.supported import check_trained
from afd_fast.training import runs
from afd_fast.video_io import read_video
from tests.test_graphs import Recorder

BOUNDARY = 875
CONFIG = RolloutConfig.preset("fastvideo_a14b", steps=(1000, 700, 550, 350, 200))  # t 1000, 965, 936; 866, 750


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    experts = [CausalWan(CausalWanConfig.tiny()).double().requires_grad_(False) for _ in range(2)]
    return TwoExperts(*experts, BOUNDARY)


def inputs(frames=7, batch=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 16, frames, 4, 6, generator=g, dtype=dtype)
    return noise, torch.randn(batch, 5, 24, generator=g, dtype=dtype)


def seed():
    return torch.Generator().manual_seed(3)


def plain(student, context, noise, config, *, guidance=None, swapped=False, text_of_high=False):
    """The same rollout with neither caches nor the sampler: at each step the expert sees every clean chunk at t = 0 and the noised
    one, block-causally. FastVideo's order: above the boundary the prediction has the boundary's noise, and is handed on as it is."""
    g, out, sizes = seed(), noise[:, :, :0], [1] + [config.chunk] * ((noise.shape[2] - 1) // config.chunk)
    table = step_table(config.steps, config.shift)
    edge = step_table((BOUNDARY,), config.shift, warp=False)[0].sigma
    experts = {True: student.high, False: student.low}

    def velocity(x, t, high, words):
        expert = experts[high is not swapped]
        text = student.high.encode_text(words) if text_of_high else expert.encode_text(words)
        times = torch.cat([torch.zeros(len(x), out.shape[2]), torch.full((len(x), x.shape[2]), t)], 1)
        blocks = tuple(sizes[: len(past) + 1])
        return expert.forward_block_causal(torch.cat([out, x], 2), times, text, blocks)[:, :, out.shape[2] :]

    past = []
    for size in sizes:
        x = noise[:, :, out.shape[2] : out.shape[2] + size]
        for (t, sigma), following in itertools.zip_longest(table, table[1:]):
            high = t >= BOUNDARY
            v = velocity(x, t, high, context)
            if guidance is not None:
                scale, negative = guidance
                other = velocity(x, t, high, negative)
                v = other + scale * (v - other)
            x = x - (sigma - (edge if high else 0)) * v
            if following is None or (high and following.t < BOUNDARY):
                continue
            a = np.float32(1 - following.sigma) / np.float32(1 - edge if high else 1)
            b = np.sqrt(np.float32(following.sigma) ** 2 - (a * np.float32(edge if high else 0)) ** 2)
            x = float(a) * x + float(b) * torch.randn((len(x), size, 16, 4, 6), generator=g, dtype=x.dtype).transpose(
                1, 2
            )
        past.append(x)
        out = torch.cat([out, x], 2)
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_rollout_is_the_plain_loop(student, dtype, bound):
    student = TwoExperts(
        *(CausalWan(CausalWanConfig.tiny()).to(dtype).requires_grad_(False) for _ in range(2)), BOUNDARY
    )
    noise, context = inputs(batch=2, dtype=dtype)
    made = rollout(student, student.encode_text(context), noise, CONFIG, generator=seed())
    expected = plain(student, context, noise, CONFIG)
    assert (made - expected).abs().max() <= bound * expected.abs().max()


@torch.no_grad()
def test_what_the_comparison_sees(student):
    """Swapped experts, one text for both, a cache without the chunk and a prediction of clean latents are other videos."""
    noise, context = inputs()
    text = student.encode_text(context)
    made = rollout(student, text, noise, CONFIG, generator=seed())
    swapped = TwoExperts(student.low, student.high, BOUNDARY)
    assert (made - plain(student, context, noise, CONFIG, swapped=True)).abs().max() > 1e-3
    twice = rollout(swapped, ExpertTexts(*text[::-1]), noise, CONFIG, generator=seed())
    assert (twice - plain(student, context, noise, CONFIG, swapped=True)).abs().max() < 1e-9
    one = rollout(student, ExpertTexts(text.high, text.high), noise, CONFIG, generator=seed())
    assert (one - plain(student, context, noise, CONFIG, text_of_high=True)).abs().max() < 1e-9
    assert (one - made).abs().max() > 1e-3


def test_which_expert_is_called(student):
    """Steps from the boundary on are the high-noise expert's; a finished chunk is shown to both, the last one to none."""
    calls = []

    def note(name):
        return lambda module, args: calls.append((name, args[0].shape[2], round(args[1].flatten()[0].item(), 1)))

    class Times(TwoExperts):
        def timestep(self, t, batch, frames):  # tensors, which the notes read
            return torch.full((batch, frames), t, dtype=torch.float32)

    watched = Times(student.high, student.low, student.boundary)
    hooks = [part.register_forward_pre_hook(note(name)) for name, part in watched.named_children()]
    noise, context = inputs(frames=4)
    with torch.no_grad():
        as_tensors = rollout(watched, watched.encode_text(context), noise, CONFIG, generator=seed())
    for hook in hooks:
        hook.remove()
    steps = lambda frames: (
        [("high", frames, t) for t in (1000, 965.5, 936.2)] + [("low", frames, t) for t in (866, 750)]
    )
    assert calls == [*steps(1), ("high", 1, 0), ("low", 1, 0), *steps(3)]
    with torch.no_grad():
        tables = rollout(student, student.encode_text(context), noise, CONFIG, generator=seed())
    assert (as_tensors - tables).abs().max() < 1e-12
    at = replace(CONFIG, warp=False, steps=(875, 874))
    calls.clear()
    hooks = [part.register_forward_pre_hook(note(name)) for name, part in watched.named_children()]
    rollout(watched, watched.encode_text(context), noise[:, :, :1], at, generator=seed())
    for hook in hooks:
        hook.remove()
    assert calls == [("high", 1, 875), ("low", 1, 874)]


def test_noise_above_the_boundary():
    """x at the boundary's level a and fresh noise give level s: the clean part 1 - s, the variance s^2; and nothing at 0."""
    for s, a in ((0.99, 0.875), (0.9, 0.875), (0.875, 0.875), (0.5, 0.0), (0.123, 0.0)):
        kept, fresh = renoise_weights(float(np.float32(s)), a)
        assert kept * (1 - a) == pytest.approx(1 - s, abs=1e-6) and (kept * a) ** 2 + fresh**2 == pytest.approx(
            s**2, abs=1e-6
        )
        if not a:
            assert fresh == float(np.float32(s))
    config = RolloutConfig.preset("fastvideo_a14b")
    assert config.boundary_level(875.0) == pytest.approx(0.875, abs=2e-3) and config.boundary_level(None) == 0
    assert replace(CONFIG, steps=RolloutConfig().steps, unipc_steps=4).boundary_level(875.0) == 0


@torch.no_grad()
def test_guidance_and_unipc(student):
    """Each prompt has its pair of caches; the solver follows the velocity through the boundary."""
    noise, context = inputs(frames=4)
    text, other = student.encode_text(context), torch.randn(1, 3, 24, dtype=torch.float64)
    negative = student.encode_text(other)
    made = rollout(student, text, noise, replace(CONFIG, guidance=3.0), generator=seed(), negative=negative)
    assert (made - plain(student, context, noise, CONFIG, guidance=(3.0, other))).abs().max() < 1e-9
    config = RolloutConfig(unipc_steps=6, shift=5.0, chunk=2)
    alike = TwoExperts(student.high, student.high, BOUNDARY)
    expected = rollout(student.high, text.high, noise, config)
    assert (rollout(alike, alike.encode_text(context), noise, config) - expected).abs().max() < 1e-12
    assert (rollout(student, text, noise, config) - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [replace(CONFIG, window=6, sink=1), replace(CONFIG, window=6, sink=1, rope="relative")], ids=str
)
def test_windows_batches_streams_and_graphs(student, config, monkeypatch):
    monkeypatch.setattr("afd_fast.students.wan.graphs.CudaRecorder", Recorder)
    noise, context = inputs(frames=10, batch=2)
    text = student.encode_text(context)
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]
    both = rollout(student, text, noise, config, generator=seeds(5, 6))
    one = rollout(student, map_tensors(text, lambda a: a[1:]), noise[1:], config, generator=seeds(6))
    assert (one - both[1:]).abs().max() < 1e-12
    graphed = TwoExperts(student.high, student.low, BOUNDARY).graphed()
    for _ in range(3):
        assert (rollout(graphed, text, noise, config, generator=seeds(5, 6)) - both).abs().max() < 1e-11
    assert graphed.high.recorder.replayed and graphed.low.recorder.replayed


@torch.no_grad()
def test_frames_given_and_prompts_that_change(student):
    """An image goes into both caches, shared by the batch; recache writes both anew under the new text."""
    noise, context = inputs(frames=6, batch=2)
    text = student.encode_text(context[:1])
    whole = plain(student, context[:1], inputs(frames=7)[0], CONFIG)
    given = whole[:, :, :1]
    made = rollout(student, text, noise, CONFIG, generator=seed(), initial_latent=given)
    each = rollout(student, text, noise, CONFIG, generator=seed(), initial_latent=given.expand(2, -1, -1, -1, -1))
    assert made.shape[2] == 7 and (made - each).abs().max() < 1e-12
    other = student.encode_text(context[1:])
    schedule = [(0, text), (4, other)]
    noise = inputs()[0]
    kept, again = (rollout(student, schedule, noise, CONFIG, generator=seed(), recache=r) for r in (False, True))
    assert torch.equal(kept[:, :, :4], again[:, :, :4]) and (kept - again)[:, :, 4:].abs().max() > 1e-4
    same = rollout(student, [(0, text), (4, text)], noise, CONFIG, generator=seed(), recache=True)
    assert (
        same - rollout(student, text, noise, CONFIG, generator=seed())
    ).abs().max() > 0  # one block of 4, not 1 and 3
    first = replace(CONFIG, independent_first_frame=False)
    plainly, as_new = (
        rollout(student, words, inputs(frames=6)[0], first, generator=seed(), recache=r)
        for words, r in ((text, False), ([(0, text), (3, student.encode_text(context[:1]))], True))
    )
    assert (plainly - as_new).abs().max() < 1e-12


def test_gradient_of_the_last_step(student):
    experts = [CausalWan(CausalWanConfig.tiny()).double() for _ in range(2)]
    pair = TwoExperts(*experts, BOUNDARY)
    noise, context = inputs(frames=4)
    latents = rollout(pair, pair.encode_text(context), noise, CONFIG, generator=seed(), grad_last_step=True)
    with torch.no_grad():
        assert (latents - rollout(pair, pair.encode_text(context), noise, CONFIG, generator=seed())).abs().max() < 1e-6
    latents.square().mean().backward()
    assert pair.low.head.head.weight.grad.abs().max() > 0 and pair.high.head.head.weight.grad is None


def test_refusals(student):
    noise, context = inputs()
    text = student.encode_text(context)
    for config, match in (
        (replace(CONFIG, fuse_cache_pass=True), "fuse_cache_pass=True is for students of one network"),
        (replace(CONFIG, steps=(1000, 700)), "steps needs a step below the boundary .* t = 875, .*it has none there"),
        (replace(CONFIG, steps=(1000, 700), zero_step=True), "it has none there"),
        (replace(CONFIG, steps=(1000, 60)), "it goes on at t = 434, noise level 0.43"),
        (replace(CONFIG, first_chunk_steps=(1000,)), "first_chunk_steps needs a step below the boundary"),
        (replace(CONFIG, steps=RolloutConfig().steps, unipc_steps=1), "unipc_steps needs a step below"),
    ):
        with pytest.raises(ConfigError, match=match):
            stream(student, text, noise, config)
    with pytest.raises(ValueError, match="scene_cuts=.4. needs a CausalWan"):
        stream(student, text, noise, replace(CONFIG, window=6, sink=1, rope="relative"), scene_cuts=[4])
    with pytest.raises(TypeError, match="text must be a ExpertTexts"):
        rollout(student, text.high, noise, CONFIG)
    cache = student.new_cache(1, 7, 4, 6)
    with pytest.raises(ValueError, match="must have one t, which one expert takes; got 800 .. 900"):
        student(noise[:, :, :2], torch.tensor([[800.0, 900.0]]), text, cache=cache)
    for boundary in (0, 0.875, 1000, 0.875j, True, float("nan"), "875", None):
        with pytest.raises(ConfigError, match="boundary must be a t from 1 to 1000"):
            TwoExperts(student.high, student.low, boundary)
    assert TwoExperts(student.high, student.low, np.float32(875)).boundary == 875
    for pair in (("a", "b"), (None, None), (student, student), (student.high, torch.nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="TwoExperts takes two CausalWans, got a"):
            TwoExperts(*pair, 875)
    with pytest.raises(ConfigError, match="the experts are on cpu and meta: load both on one device="):
        TwoExperts(student.high, copy.deepcopy(student.low).to("meta"), 875)
    with pytest.raises(ConfigError, match="the two experts have different sizes .ffn_dim 160 and 96"):
        TwoExperts(student.high, CausalWan(replace(CausalWanConfig.tiny(), ffn_dim=96)), 875)
    with pytest.raises(ConfigError, match="the experts are torch.float64 and torch.float32: load both with one dtype="):
        TwoExperts(student.high, CausalWan(CausalWanConfig.tiny()), 875)


# ---------------------------------------------------------------------- folders


@pytest.fixture
def folder(student, tmp_path):
    save_student(student, tmp_path / "pair")
    return tmp_path / "pair"


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


def index(folder, **changes):
    path = folder / "model_index.json"
    write(path, {**json.loads(path.read_text()), **changes})


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_saved_and_loaded(student, folder, tmp_path):
    loaded = load_student(folder)
    assert isinstance(loaded, TwoExperts) and loaded.boundary == 875 and loaded.sampler == {} and same(loaded, student)
    assert not loaded.training
    state = {key: value + 1 for key, value in student.state_dict().items()}
    index(folder, vae=["diffusers", "AutoencoderKLWan"])
    save_student(loaded, folder, state, sampler=CONFIG.sampler())
    again = load_student(folder)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert RolloutConfig.of(again.sampler) == CONFIG
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKLWan"]
    with pytest.raises(ConfigError, match="state must hold both experts' tensors"):
        save_student(
            student, tmp_path / "part", {key: value for key, value in state.items() if key.startswith("high.")}
        )
    assert not (tmp_path / "part").exists()
    assert isinstance(load_student(folder / "transformer"), CausalWan)  # one of them, by its folder
    assert same(copy.deepcopy(student), student)  # also one that no folder said anything of
    with pytest.raises(ConfigError, match="steps needs a step below the boundary"):
        save_student(student, tmp_path / "part", sampler=RolloutConfig(steps=(1000,)).sampler())


def test_a_folder_that_would_load_as_another_student(student, folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds another student \(transformer, transformer_2\).*save into a new folder"
    ):
        save_student(student.high, folder)
    for name, expert in (("high_noise_model", student.high), ("low_noise_model", student.low)):
        save_student(expert, tmp_path / "original" / name)
    for other in (student, student.high):
        with pytest.raises(ConfigError, match=r"holds another student \(high_noise_model, low_noise_model\)"):
            save_student(other, tmp_path / "original")
    assert same(load_student(folder), student)


def test_experts_that_are_sampled_differently(folder):
    settings = {
        name: json.loads((folder / name / "config.json").read_text()) for name in ("transformer", "transformer_2")
    }
    write(folder / "transformer_2/config.json", settings["transformer_2"] | {"local_attn_size": 9})
    assert load_student(folder).sampler == {"window": 9, "sink": 0}  # which one of them says
    write(folder / "transformer/config.json", settings["transformer"] | {"local_attn_size": 4})
    with pytest.raises(ConfigError, match="the experts' config.json say window=4 and 9"):
        load_student(folder)


def test_adapters_are_not_saved_as_weights(tmp_path):
    from afd_fast.students.lora import add_lora

    one = CausalWan(CausalWanConfig.tiny())
    add_lora(one, 2, ["q"])
    with pytest.raises(ConfigError, match="the student has adapters"):
        save_student(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_original_layout(student, tmp_path):
    for name, expert in (("high_noise_model", student.high), ("low_noise_model", student.low)):
        save_student(expert, tmp_path / name)
    write(tmp_path / "configuration.json", {"framework": "Pytorch"})
    loaded = load_student(tmp_path)
    assert loaded.boundary == 875 and same(loaded, student)


def test_a_repository(student, folder, tmp_path, monkeypatch):
    """Of what a repository holds, what both experts need is asked for; for the settings alone, no weights."""
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(allow_patterns)
        local = tmp_path / f"copy {len(asked)}"
        for path in (p for p in folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(folder))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                (local / name).write_bytes(path.read_bytes())
        return local

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (folder / "transformer").rename(folder / "high_noise_model")
    (folder / "transformer_2").rename(folder / "low_noise_model")
    assert same(load_student("owner/original"), student)
    (folder / "high_noise_model").rename(folder / "transformer")
    (folder / "low_noise_model").rename(folder / "transformer_2")
    assert same(load_student("owner/pair"), student)
    assert not any(fnmatch.fnmatch("transformer_2/a.safetensors", pattern) for pattern in asked[0])


def test_fastvideos_folder_says_how_it_is_sampled(folder):
    index(folder, _class_name="WanCausalDMDPipeline")
    assert RolloutConfig.of(load_student(folder).sampler) == RolloutConfig.preset("fastvideo_a14b")
    for name in ("transformer", "transformer_2"):
        settings = json.loads((folder / name / "config.json").read_text())
        write(
            folder / name / "config.json", settings | {"local_attn_size": 12, "sink_size": 3, "num_frames_per_block": 3}
        )
    assert RolloutConfig.of(load_student(folder).sampler) == RolloutConfig.preset("fastvideo_a14b", window=12, sink=3)
    save_student(load_student(folder), folder, sampler={"chunk": 1})  # it says otherwise now
    index(folder, _class_name="WanCausalDMDPipeline")
    assert load_student(folder).sampler == {"chunk": 1}


@pytest.mark.parametrize("ratio", ["0.875", True, -0.1, 0, 1, 1.5, float("nan"), [0.875]])
def test_boundary_that_is_none(folder, ratio):
    index(folder, boundary_ratio=ratio)
    with pytest.raises(ConfigError, match="boundary_ratio in .*model_index.json must be a number between 0 and 1"):
        load_student(folder)


def remove(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_a_folder_with_one_expert_of_two(student, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("afd_fast.students.wan.checkpoints.read_tensors", lambda path: pytest.fail(f"read {path}"))
    index(folder, boundary_ratio=None)
    with pytest.raises(
        ConfigError, match="two experts .transformer and transformer_2. and no boundary_ratio in model_index.json"
    ):
        load_student(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ConfigError, match="no boundary_ratio in model_index.json: add it.*or give the folder of one"):
        load_student(folder)
    write(folder / "model_index.json", {"_class_name": "WanPipeline", "boundary_ratio": 0.875})
    remove(folder / "transformer_2")
    for changes in ({}, {"boundary_ratio": None, "transformer_2": ["diffusers", "WanTransformer3DModel"]}):
        index(folder, **changes)
        found = "two experts in model_index.json, transformer and transformer_2, and transformer_2 is missing.*give the folder of one"
        with pytest.raises(ConfigError, match=found):
            load_student(folder)
    (tmp_path / "wan" / "low_noise_model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="high_noise_model and low_noise_model, and high_noise_model is missing"):
        load_student(tmp_path / "wan")


def test_a_folder_whose_experts_differ(student, folder, monkeypatch):
    monkeypatch.setattr("afd_fast.students.wan.checkpoints.read_tensors", lambda path: pytest.fail(f"read {path}"))
    path = folder / "transformer_2/config.json"
    settings = json.loads(path.read_text())
    for changes, match in (
        ({"num_layers": 3}, "two experts have different sizes .num_layers 2 and 3"),
        ({"in_channels": 36}, "transformer_2: this Wan takes 36 channels and makes 16: an image-to-video"),
        ({"_class_name": "LTXVideoTransformer3DModel"}, "its class is LTXVideoTransformer3DModel"),
    ):
        write(path, settings | changes)
        with pytest.raises(ConfigError, match=match):
            load_student(folder)


def test_adapters_for_two(student, folder, tmp_path):
    state = {
        "blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 64),
        "blocks.0.self_attn.q.lora_B.weight": torch.zeros(64, 1),
    }
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(
        ConfigError,
        match="lora= is for one network, and .* has two experts: load .*transformer and .*transformer_2 each",
    ):
        load_student(folder, lora=tmp_path / "lora.pt")
    assert same(load_student(folder / "transformer", lora=tmp_path / "lora.pt"), student.high)


def test_missing_shards(student, folder, tmp_path):
    """Of either expert, and of a single transformer: the file is named, before others are read."""
    for part in (folder / "transformer_2", folder / "transformer"):
        named = {
            "patch_embedding.weight": "a-00001-of-00002.safetensors",
            "proj_out.bias": "diffusion_pytorch_model.safetensors",
        }
        write(part / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": named})
        for path in (folder, part):
            with pytest.raises(
                FileNotFoundError, match=f"{part} lacks 1 of the 2 files .*such as a-00001-of-00002.safetensors"
            ):
                load_student(path)
        write(
            part / "diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"proj_out.bias": "gone.safetensors"}},
        )  # of files that were joined into one
    assert same(load_student(folder), student)
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="transformer holds 0 checkpoints"):
        load_student(folder)


def test_training_is_refused(student, folder, tmp_path, monkeypatch):
    """Before weights are read, whoever makes the family, and by the estimate."""
    monkeypatch.setattr("afd_fast.students.wan.checkpoints.read_tensors", lambda path: pytest.fail(f"read {path}"))
    refused = pytest.raises(ConfigError, match="a student of two experts is sampled and not trained: give ")
    with refused:
        wan_family(StudentConfig(str(folder)))
    with refused:
        Family("mine", student, None, None, None, 3, None)
    assert ("student", "fails") in [
        (c.what, c.state) for c in sources(with_overrides(runs.afd_table3(), [f"student={folder}"]))
    ]
    check_trained(str(folder / "transformer"))
    check_trained("wan2.2-a14b-high.safetensors")
    for name in (str(folder), "Wan-AI/Wan2.2-T2V-A14B-Diffusers"):
        with refused:
            networks(with_overrides(runs.afd_table3(), [f"student={name}", "discriminator=toy"]))


class TestCommands:
    """`afd-fast rollout` and `eval export` with a folder of two experts."""

    @pytest.fixture(autouse=True)
    def beside(self, tmp_path, monkeypatch):
        """Prompts and a base whose text encoder and VAE are tiny's."""
        write(tmp_path / "base/vae/config.json", {"_class_name": "AutoencoderKLWan", "z_dim": 16})
        (tmp_path / "p.txt").write_text("a red ball\n")
        given = tiny()
        monkeypatch.setattr("afd_fast.students.wan.family.TextEncoder.from_pretrained", lambda *_, **__: given.text)
        monkeypatch.setattr("afd_fast.students.wan.family.WanDecoder.from_pretrained", lambda *_, **__: given.vae)

    def call(self, tmp_path, *words):
        sizes = ("--base", tmp_path / "base", "--prompts", tmp_path / "p.txt", "--size", "32x32")
        done = CliRunner().invoke(app, list(map(str, (*words, *sizes))))
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output

    def test_rollout_and_export(self, folder, tmp_path):
        index(folder, _class_name="WanCausalDMDPipeline")
        self.call(tmp_path, "rollout", "--student", folder, "--out", tmp_path / "out", "--frames", 4)
        assert tuple(read_video(tmp_path / "out/0000-a-red-ball.mp4").shape) == (3, 13, 32, 32)
        self.call(tmp_path, "eval", "export", tmp_path / "export", "--student", folder, "--n", 1, "--frames", 4)
        assert len(list((tmp_path / "export").rglob("*.mp4"))) == 1
        kept = json.loads((tmp_path / "export/export.json").read_text())
        assert kept["steps"] == list(RolloutConfig.preset("fastvideo_a14b").steps) and kept["independent_first_frame"]

    def test_refused_before_anything_is_read(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("afd_fast.students.wan.checkpoints.read_tensors", lambda path: pytest.fail(f"read {path}"))
        for call in (("rollout", "--out", tmp_path / "out"), ("eval", "export", tmp_path / "export")):
            with pytest.raises(ConfigError, match="steps needs a step below the boundary of the two experts, t = 875"):
                self.call(tmp_path, *call, "--student", folder, "--steps", "1000,900", "--frames", 3)
