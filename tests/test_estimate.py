"""The formulas against PyTorch's counter on the real code, and sizes against the real objects."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_fast.config import with_overrides
from afd_fast.discriminators.config import new_discriminator
from afd_fast.errors import ConfigError
from afd_fast.estimate import formulas as flops
from afd_fast.estimate import iteration as estimate
from afd_fast.estimate.meters import Meter
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWanConfig
from afd_fast.students.lora import trainable
from afd_fast.students.student import family
from afd_fast.students.toy.family import of_student
from afd_fast.students.toy.model import ToyConfig, ToyStudent
from afd_fast.students.wan.family import tiny
from afd_fast.training import runs as named
from afd_fast.training.rollouts import sample_policy
from afd_fast.training.run import Run
from afd_fast.training.state import generator, new_state
from afd_fast.training.update import Targets, policy_recipe, student_backward
from afd_fast.training.velocity import Chunking, chunk_velocities, velocity
from benchmarks.update import CPU_FLASH

PROMPTS = ["a red ball", "a blue ball"]


def counted(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
        call()
    return counter.get_total_flops()


def wan_case(overrides):
    small = [
        "student=tiny",
        "shards=1",
        "discriminator=toy",
        "discriminator.width=8",
        "student.frames=9",
        "student.height=6",
        "student.width=10",
        "student.lora_rank=4",
    ]
    config = with_overrides(named.afd_table3(), [*small, *overrides])
    made = family(config.student, chunk=3)
    return config, made, flops.wan(made.student.config, 9, 6, 10, 3, 4)


def toy_case(overrides):
    config = with_overrides(named.demo(), ["student.lora_rank=4", *overrides])
    made = of_student(ToyStudent(ToyConfig(dim=32, heads=2, layers=3, hidden=40)))
    return config, made, flops.toy(made.student.config)


@pytest.mark.parametrize("make", [wan_case, toy_case])
@pytest.mark.parametrize(
    "overrides",
    [
        ["update.v_old=ema"],
        ["update.v_old=self", "rollout.steps=1000,500"],
        ["update.v_old=self", "rollout.steps=1000,500", "rollout.first_chunk_steps=1000,750,250"],
    ],
)
def test_rollout(make, overrides):
    config, made, formula = make(overrides)
    run = Run(config, new_state(config, made))
    average = config.update.v_old == "ema"
    call = lambda: sample_policy(run, PROMPTS, generator(0, 0, "test"), average)
    assert formula.rollout(2, config.rollout, 4).flops == counted(call)


@pytest.mark.parametrize("make", [wan_case, toy_case])
@pytest.mark.parametrize(
    "overrides",
    [
        ["update.v_old=self", "loss=afd", "update.chunked=true"],
        ["update.v_old=ema", "loss=diffusionnft", "update.chunked=true"],
        ["update.v_old=ema", "loss=diffusionnft", "update.chunked=false"],
        ["update.v_old=self", "loss=afd", "update.chunked=true", "loss.ref_coef=0"],
    ],
)
def test_update(make, overrides):
    config, made, formula = make(overrides)
    run = Run(config, new_state(config, made))
    targets = Targets(torch.randn(2, *made.latents), torch.tensor([[0.1], [0.9]]), PROMPTS, 0)

    call = lambda: student_backward(run, targets, policy_recipe(run), generator(0, 0, "test"))
    assert formula.update(2, config).flops == counted(call)


def networks(*overrides):
    return estimate.networks(with_overrides(named.afd_table3(), list(overrides)))


def test_the_13b_student(monkeypatch):
    """Parameters, adapters, cache and, on the meta device, FLOPs: two chunks of a full-size latent."""
    net = networks("student.frames=6", "student=any.pt")
    student = net.family.student
    count = lambda parameters: sum(p.numel() for p in parameters)
    assert count(p for n, p in student.named_parameters() if ".lora_" not in n) == 1_418_996_800
    assert count(trainable(student).values()) == 256 * 30 * (8 * 2 * 1536 + 2 * (1536 + 8960)) == 349_962_240
    assert net.formulas.cache_bytes == student.new_cache(1, 6, 60, 104).nbytes
    x, t = torch.empty(1, 16, 6, 60, 104, device="meta", dtype=torch.bfloat16), torch.empty(1, 6, device="meta")
    s, words = net.formulas, torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    renoise = torch.empty(1, 1, 16, 3, 60, 104, device="meta", dtype=torch.bfloat16).expand(2, -1, -1, -1, -1, -1)
    config = RolloutConfig(steps=(1000, 500))
    sample = lambda: rollout(student, student.encode_text(words), x, config, renoise=renoise)
    with torch.no_grad():
        assert s.rollout(1, config, 256).flops == counted(sample)
    monkeypatch.setattr(flops, "ATTENTION_BACKWARD", 2.0)  # on meta it is not a flash kernel: no scores to recompute
    backward = flops.total(s.backward(1, index, 256) for index in range(2)) + s.encode(1, 256, backward=True)
    expected = s.encode(1, 256) + s.velocity(1, 256) + backward
    update = lambda: velocity(student, x, t, student.encode_text(words), x, Chunking(3)).sum().backward()
    assert expected.flops == counted(update)


def test_the_14b_student_has_its_own_sizes():
    config = CausalWanConfig.wan_14b()
    a, b = (flops.wan(c, 3, 60, 104, 3, 2).forward(1, 0).flops for c in (CausalWanConfig.wan_1_3b(), config))
    assert 8 < b / a < 11


@pytest.mark.parametrize("make", [wan_case, toy_case])
def test_memory_of_the_optimiser_and_the_average(make):
    config, made, _ = make([])
    state = new_state(config, made)
    trained = trainable(state.student)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    held = sum(x.nbytes for s in state.optimizer.state.values() for x in s.values() if x.ndim)
    held += sum(x.nbytes for p in trained.values() for x in (p, p.grad)) + sum(
        x.nbytes for x in state.ema.shadow.values()
    )
    found = estimate.estimate(config).memory if make is wan_case else None
    count = sum(p.numel() for p in trained.values())
    assert held == 20 * count
    if found:
        assert dict((name, n) for name, n, _ in found)["adapters, gradients, AdamW, EMA"] == held


def test_activations_are_what_autograd_keeps(monkeypatch):
    """The meta device against a real bfloat16 student on the CPU with the autograd functions of CUDA, whose attention also keeps
    a log-sum-exp."""
    monkeypatch.setattr("afd_fast.ops.transformer._fused", lambda x, *constants: True)
    net = networks("student=tiny", "student.frames=9", "student.height=12", "student.width=20", "student.lora_rank=4")
    net.family.student.bfloat16()
    for p in trainable(net.family.student).values():
        p.data = p.data.float()
    real = copy.deepcopy(net.family.student).to_empty(device="cpu")
    for p in real.parameters():
        torch.nn.init.normal_(p, std=0.02)
    found = estimate.graph_bytes(net.family, batch=2)
    x = torch.randn(2, 16, 9, 12, 20, dtype=torch.bfloat16)
    sizes = []
    with (kept := estimate.Kept(real)):
        text = real.encode_text(torch.randn(2, 12, 24, dtype=torch.bfloat16))
        in_text = kept.take()
        for _ in chunk_velocities(real, x, torch.rand(2, 9), text, x, Chunking(3)):
            sizes.append(in_text + kept.take())
    rows = 2 * 180  # samples, tokens
    lse = rows * 4 * 4 * 4  # 4 attentions of 4 heads
    assert [a + lse for a in found] == sizes and found[2] > found[1] > found[0]


def test_a_storage_is_counted_once_and_a_weight_never():
    linear, x = torch.nn.Linear(4, 4), torch.randn(8, 4, requires_grad=True)
    with (kept := estimate.Kept(linear)):
        y = linear(x) + linear(x[:2]).sum()
    assert y.requires_grad and kept.take() == x.nbytes and kept.take() == 0


def test_reward_model():
    """Against a small VideoReward: the counter knows causal attention only in full."""
    from tests.tiny_videoalign import clips, reward_model

    model, prompts = reward_model(lora=4, checkpointing=False), ["a cat", "a dog"]
    c, videos = model.backbone.config, clips(2, frames=8)
    features = model.encode(videos)
    grid = (len(features.clips[0]) // 6, 4, 6)
    length = len(features.clips[0]) + len(model.prompts.prefix) + len(model.prompts.suffix("a cat"))
    lm, shape = flops.language_model(c.text_config, 4), (2 * length, 2 * length**2, 2 * length)
    assert flops.vision_tower(c.vision_config, 2, grid, 4).flops == counted(lambda: model.encode(videos))
    head = flops.product(6, 64, 1, 4).flops
    assert lm.forward(*shape, 4).flops + head == counted(lambda: model.score(features, prompts))
    assert flops.causal(2, length)[1] == (2 * length**2 + 2 * length) / 2
    scores = model.score(features, prompts).sum()
    assert lm.backward(*shape, 4).flops == pytest.approx(counted(scores.backward), rel=1e-3)


def test_vae_and_toy_discriminator_are_counted_as_they_run():
    net = networks("student=tiny", "student.frames=6", "student.height=6", "student.width=10")
    config = with_overrides(named.demo(), ["discriminator.width=8", "discriminator.r1=0"])
    latents = torch.randn(1, *net.family.latents)
    with torch.no_grad():
        work, peak = estimate.metered(lambda: net.decoder.decode(latents.to("meta")), 4)
        real = tiny().vae
        assert work.single == counted(lambda: real(latents)) and work.light > 0
        assert real(latents).nbytes < peak < work.bytes
    judge = estimate.toy_judge(config, net.family, 2)
    model = new_discriminator(config.discriminator, net.family.video, torch.device("cpu"))
    videos = torch.rand(4, 3, *net.family.video[:3])
    assert judge.score.flops == counted(lambda: model.score(videos[:2], ["a", "b"]))
    assert judge.update.flops == counted(lambda: model.score(videos, ["a", "b"] * 2).sum().backward())
    assert judge.trained == sum(p.numel() for p in model.parameters())


def test_text_encoder_has_the_published_size():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=24,
        vocab_size=256384,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    assert sum(p.numel() for p in model.parameters()) == flops.T5_PARAMETERS
    x = torch.empty(2, 512, 4096, device="meta")
    layer = model.encoder.block[0]
    mask = torch.empty(2, 1, 512, 512, device="meta")
    assert flops.text_encoder(2, 512).flops == 24 * counted(lambda: layer(x, attention_mask=mask))


def test_the_peak_is_what_is_held_at_a_time():
    """Three tensors of 4000 bytes, of which two are alive together; a view and a result in place hold nothing."""

    def call():
        a = torch.empty(1000, device="meta", dtype=torch.float32) + 1
        b = (a * 2)[:10]
        del a
        return torch.exp(b.add_(1).expand(10)).repeat(100)

    with Meter() as meter:
        call()
    assert meter.peak == 8040 and meter.products == 0
    assert meter.light == 8000 + 8000 + 40 + 80 + 4040


def test_what_does_not_fit_names_the_setting_that_does(monkeypatch):
    small = ["student=tiny", "student.frames=6", "student.height=6", "student.width=10", "discriminator=toy"]
    config = with_overrides(named.afd_table3(), [*small, "prompts_per_step=4", "shards=1", "update.batch=none"])
    found, fits = (estimate.estimate(with_overrides(config, keys)) for keys in ([], ["update.batch=1", "shards=2"]))
    gpu = flops.GPU("x", 1.0, 1.0, 1.0, memory=fits.peak[0] + 1)
    for name in ("networks", "graph_bytes", "student_traffic"):  # other settings are arithmetic: nothing runs again
        monkeypatch.delattr(estimate, name)
    assert found.peak[0] > gpu.memory and found.fitting(gpu) == ["update.batch=1", "shards=2"]
    assert found.fitting(flops.GPU("x", 1.0, 1.0, 1.0, memory=1.0)) == []


def test_roofline():
    gpu = flops.GPU("x", half=100.0, single=10.0, bandwidth=5.0, memory=1.0)
    assert flops.Work(200, 30, 1).seconds(gpu) == 5.0 and flops.Work(200, 30, 1).bound(gpu) == "compute"
    assert flops.Work(200, 30, 50).seconds(gpu) == 10.0 and flops.Work(200, 30, 50).bound(gpu) == "bandwidth"
    assert flops.product(2, 3, 5, 2) == flops.Work(60, 0, 2 * (6 + 10 + 15))
    assert flops.Work(200, 30, 1, 30).seconds(gpu) == 11.0 and flops.Work(200, 30, 1, 30).bound(gpu) == "bandwidth"
    assert flops.Work(200, 30, 1).seconds(gpu.likely()) == pytest.approx(5 / 0.6)
    x = torch.empty(2, 3, device="meta", dtype=torch.bfloat16)
    assert estimate.metered(lambda: x @ x.new_empty(3, 5), 2)[0] == flops.product(2, 3, 5, 2)


def test_shards_share_the_work_and_shrink_the_memory():
    one, four = (
        estimate.estimate(with_overrides(named.demo(), ["prompts_per_step=12", f"shards={n}"])) for n in (1, 4)
    )
    for phase in ("decode", "score", "backward"):
        assert one.phases[phase].flops == four.phases[phase].flops
    a, b = (e.phases["reference"].flops for e in (one, four))
    assert a < b < 1.5 * a  # merges
    assert four.peak[0] < 0.5 * one.peak[0]


def test_command(say, tmp_path):
    tiny_run = [
        "student=tiny",
        "shards=1",
        "discriminator=toy",
        "student.frames=6",
        "student.height=6",
        "student.width=10",
    ]
    status, said = say("estimate", "afd_table3", *tiny_run, "--gpu", "a100")
    assert status == 0 and "A100 80 GB: a floor, not a measurement" in said and "at the peak" in said
    assert "no checkpoint was read" in said and not list(tmp_path.iterdir())
    one_chunk = [word.replace("frames=6", "frames=3").replace("toy", "pixel") for word in tiny_run]
    assert say("estimate", "afd_table3", *one_chunk)[0] == 0


def test_the_documents_have_the_commands_figures():
    found, gpu = estimate.estimate(named.afd_table3()), estimate.gpu_of("h100")
    floor, likely = (sum(work.seconds(g) for work in found.phases.values()) for g in (gpu, gpu.likely()))
    figures = f"at least {floor:.0f} s", f"likely {likely:.0f} s", f"{found.peak[0] / 1e9:.0f} GB"
    for page in ("profiling.md", "methods/afd.md"):
        text = (Path(__file__).parent.parent / "docs" / page).read_text()
        assert all(figure in text for figure in figures), (page, figures)


@pytest.mark.parametrize(
    "wrong",
    [
        "method=sft",
        "student.frames=7",
        "rollout.window=9",
        "stream.frames=42",
        "update.history=block_causal",
        "fsdp=true",
        "sequence_parallel=2",
        "teacher_r=1",
    ],
)
def test_what_cannot_be_counted_is_said(wrong):
    with pytest.raises(ConfigError, match="counts method=|counts one GPU|whole chunks"):
        networks("student=tiny", "update.chunked=false", wrong)
    with pytest.raises(ConfigError, match="known: h100, h200"):
        estimate.gpu_of("b200")
