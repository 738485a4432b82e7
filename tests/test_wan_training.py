"""The paper's recipe end to end on a causal Wan student small enough for here: command, files, resume, export."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError
from afd_fast.students import load_student, save_student
from afd_fast.students.lora import add_lora, disabled, inject, lora_layers, trainable
from afd_fast.students.wan.family import LORA_TARGETS, SIZE, tiny, wan_family
from afd_fast.training import checkpoint, runs
from afd_fast.training.rollouts import sample_policy
from afd_fast.training.run import Run
from afd_fast.training.run_folder import read_rows
from afd_fast.training.state import generator, new_state
from afd_fast.training.update import Targets, policy_recipe, student_backward, update_student
from afd_fast.video_io import write_video
from tests.runs import named_run
from tests.test_trainer import command, same, wait_for_checkpoint

TINY = [
    "student=tiny", "shards=1", "discriminator=toy", "discriminator.width=8", "student.frames=6", "student.height=6", "student.width=10", "iterations=3", "prompts_per_step=2",
    "rollouts_per_prompt=2", "discriminator.warmup=1", "student.lora_rank=4", "evaluation.every=3", "checkpoint_every=1", "teacher_clips=1", "evaluation.rollouts=2", "evaluation.batch=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("teacher"), np.random.default_rng(0)
    for i in range(3):
        video = torch.from_numpy(rng.integers(0, 255, (3, 22, 48, 80), dtype=np.uint8))
        write_video(folder / f"{i}.mp4", video, 16)
    (folder / "manifest.csv").write_text("prompt,video\na cat,0.mp4\na dog,1.mp4\na bird,2.mp4\n")
    return f"teacher=folder:{folder}"


def test_paper_recipe_trains_resumes_and_exports(say, tmp_path, teacher):
    words = lambda out: ["train", "afd_table3", *TINY, teacher, "--out", out]
    assert say(*words(tmp_path / "whole"))[0] == 0
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert (
        len(rows) == 3 and all(np.isfinite(v) for row in rows for v in row.values()) and "seconds/backward" in rows[2]
    )
    assert (tmp_path / "whole/report.html").exists()
    adapted, before = load_student(tmp_path / "whole/student"), tiny().student
    save_student(before, tmp_path / "base")
    changed = [n for n, p in before.state_dict().items() if not torch.equal(p, adapted.state_dict()[n])]
    assert changed and all(any(f".{t}." in n for t in LORA_TARGETS) for n in changed)
    merged = load_student(tmp_path / "whole/student").state_dict()
    added = load_student(tmp_path / "base", lora=tmp_path / "whole/lora").state_dict()
    assert all(torch.allclose(p, added[n], rtol=0, atol=1e-6) for n, p in merged.items())
    card = (tmp_path / "whole/student/README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "| loss.ref_coef | 0.0001 |" in card

    stopped = tmp_path / "stopped"
    first = command(*words(stopped))
    wait_for_checkpoint(stopped, first)
    first.kill()
    first.wait()
    assert say(*words(stopped), "--resume")[0] == 0
    state = lambda out: checkpoint.load(checkpoint.latest(out / "checkpoints"))["state"]
    assert same(state(tmp_path / "whole"), state(stopped))


def test_the_documented_example_trains(tmp_path, teacher):
    """On fewer and shorter videos, to save time: a loss at every iteration, and a student that differs from the base."""
    text = (Path(__file__).parent.parent / "docs/training.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("afd-fast train") and "student=tiny" in line]
    words = [word for word in line.partition("#")[0].split()[1:] if not word.startswith("teacher=")]
    done = command(*words, teacher, "iterations=2", "--out", tmp_path / "run")
    said = done.communicate()[0]
    assert done.returncode == 0 and "report: " in said and "The student did not change" not in said, said
    assert all("loss" in row for row in read_rows(tmp_path / "run/metrics.jsonl"))
    rows = json.loads((tmp_path / "run/result.json").read_text())["rows"]
    assert abs(rows["student"]["dynamic"] - rows["base"]["dynamic"]) > 5e-4  # as the table shows it


def test_adapters_are_float32_on_a_bfloat16_student():
    run = named_run(with_overrides(runs.afd_table3(), TINY))
    student = run.family.student.to(torch.bfloat16)
    for p in trainable(student).values():
        p.data = p.data.float()
    assert len(lora_layers(student)) == 10 * student.config.num_layers
    rng = lambda: generator(0, 0, "test")
    x0 = sample_policy(run, ["a cat", "a dog"], rng(), average=False)
    assert x0.dtype == torch.bfloat16 and x0.isfinite().all()
    targets = Targets(x0, torch.tensor([[0.9], [0.1]]), ["a cat", "a dog"], 0)
    found = student_backward(run, targets, policy_recipe(run), rng())
    assert math.isfinite(found["loss"])
    assert any(p.grad.abs().max() > 0 for p in trainable(student).values() if p.grad is not None)


def test_new_adapters_of_a_bfloat16_layer_are_float32():
    student = tiny().student.bfloat16()
    add_lora(student, 4, list(LORA_TARGETS))
    assert {p.dtype for p in trainable(student).values()} == {torch.float32}


def test_adapters_compute_in_the_layers_dtype_with_float32_gradients():
    """Against a float64 layer: to bfloat16's precision; and no float32 copy of the input is kept."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
    model.bfloat16()
    add_lora(model, 8, ["0"])
    layer = lora_layers(model)[0]
    torch.nn.init.normal_(layer.lora_B.default.weight, std=0.1)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert y.dtype == torch.bfloat16 and {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}
    weight, a, b = (w.detach().double() for w in (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight))  # fmt: skip
    exact = x.double() @ (weight + b @ a).T
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
    y.backward(torch.ones_like(y))
    want = b.sum(0)[:, None] * x.double().sum(0)
    assert layer.lora_A.default.weight.grad.dtype == torch.float32
    assert (layer.lora_A.default.weight.grad - want).norm() < 0.02 * want.norm()


def test_a_half_precision_student_is_trained_whole_in_float32(tmp_path):
    """student.lora_rank=0: bfloat16 computes, float32 weights learn; the step is that of a float32 student to bfloat16's
    resolution, and a checkpoint holds the float32 weights."""
    config = with_overrides(
        runs.afd_table3(), [*TINY, "student.lora_rank=0", "discriminator.warmup=0", "update.v_old=ema"]
    )

    def stepped(dtype):
        family = wan_family(config.student)
        family.student.to(dtype)
        run = Run(config, new_state(config, family))
        before = {n: p.detach().clone() for n, p in run.state.weights.items()}
        rng = torch.Generator().manual_seed(0)
        x0 = torch.randn(2, 16, 6, 6, 10, generator=rng).to(dtype)
        update_student(run, [Targets(x0, torch.tensor([[1.0], [0.0]]), ["a cat", "a dog"], 0)])
        return run, {n: p.detach() - before[n] for n, p in run.state.weights.items()}

    half, moved = stepped(torch.bfloat16)
    _, expected = stepped(torch.float32)
    student, weights = half.family.student, half.state.weights
    assert (
        {p.dtype for p in student.parameters()}
        == {torch.bfloat16}
        == {p.dtype for p in half.state.reference.parameters()}
    )
    kept = [
        *weights.values(),
        *half.state.ema.shadow.values(),
        *(s["exp_avg"] for s in half.state.optimizer.state.values()),
    ]
    assert {x.dtype for x in kept} == {torch.float32}
    assert all(torch.equal(p, weights[n].bfloat16()) and p.grad is None for n, p in student.named_parameters())
    assert any((weights[n] != p.float()).any() for n, p in student.named_parameters())  # updates below its resolution
    flat = lambda x: torch.cat([a.flatten() for a in x.values()])
    same_way = torch.nn.functional.cosine_similarity(flat(moved), flat(expected), 0)
    assert same_way > 0.8 and flat(moved).norm() == pytest.approx(flat(expected).norm().item(), rel=0.05)
    with half.state.ema.applied(student):
        assert all(torch.equal(p, half.state.ema.shadow[n].bfloat16()) for n, p in student.named_parameters())
    assert all(torch.equal(p, weights[n].bfloat16()) for n, p in student.named_parameters())

    path = checkpoint.save(tmp_path, 1, {"state": half.state.state_dict()})
    family = wan_family(config.student)
    family.student.bfloat16()
    again = new_state(config, family)
    again.load_state_dict(checkpoint.load(path)["state"])
    assert same(again.state_dict(), half.state.state_dict())
    assert all(torch.equal(p, weights[n].bfloat16()) for n, p in family.student.named_parameters())


def adapted(alpha, dtype, bias=True):
    """(the layer as PEFT runs it, as this library does, input [2, 5, 12] with gradient)."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(12, 7, bias=bias, dtype=dtype))
    peft = copy.deepcopy(ours)
    inject(ours, ["0"], 3, alpha)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"]), peft)
    torch.nn.init.normal_(ours[0].lora_B.default.weight)
    peft.load_state_dict(ours.state_dict())  # the same keys
    return peft, ours, torch.randn(2, 5, 12, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("alpha, bias", [(3, True), (6, False), (1, True)])
def test_an_adapted_layer_is_pefts(alpha, bias):
    """Results and every gradient; in bfloat16 nearer to float64 than PEFT's, which rounds three times."""
    peft, ours, x = adapted(alpha, torch.float64, bias)
    total = lambda model: (model(x).square().sum(), [x, *trainable(model).values()])
    grads = [torch.autograd.grad(*total(model)) for model in (peft, ours)]
    torch.testing.assert_close(ours(x), peft(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *trainable(ours).values()))
    ours.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()))
    exact, (peft, ours, _) = ours(x), adapted(alpha, torch.bfloat16, bias)
    exact = copy.deepcopy(ours).double()(x.bfloat16().double())
    error = lambda model: (model(x.bfloat16()).double() - exact).abs().mean()
    assert error(ours) < error(peft)


def test_an_adapter_moves_no_activation():
    """Forward and backward are products, and casts of adapters; under autocast too, as the reward model runs."""
    _, ours, x = adapted(3, torch.bfloat16)
    with OperatorCount() as count:
        ours(x).backward(torch.ones(2, 5, 7, dtype=torch.bfloat16))
    assert count.of({"mul", "add", "clone", "copy_"}) == 0 and count.of({"mm", "addmm"}) == 8
    with OperatorCount() as count, torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert count.of({"_to_copy"}) == 2  # A and B
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(3, torch.float32)[1](x.float()).dtype == torch.bfloat16
    with disabled(ours):
        assert torch.equal(ours(x), ours[0].base_layer(x))


class OperatorCount(TorchDispatchMode):
    """How often each aten operator ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def of(self, names):
        return sum(name in names for name in self.names)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_table_3():
    c = runs.afd_table3()
    assert (c.student.lora_rank, c.loss.ref_coef, c.loss.beta, c.loss.adv_clip) == (256, 1e-4, 0.1, 5.0)
    assert (c.update.ema, c.update.lr, c.update.weight_decay, c.update.grad_norm) == (0.99, 1e-5, 1e-4, 1.0)
    assert (c.global_std, c.update.v_old, c.loss.name) == (True, "self", "afd")
    assert (SIZE.height * 8, SIZE.width * 8, 4 * SIZE.frames - 3) == (480, 832, 81)
    d = c.discriminator  # decided, not inherited from the demo
    assert (d.warmup, d.instance_noise, d.r1, d.steps, d.lr) == (0, 0.0, 0.0, 1, 1e-5)


@pytest.mark.parametrize("change,which", [
    (["student.frames=7"], "student.frames=7 must be a multiple of 3, such as 6 or 9"),
    (["student.height=5"], "student.height=5 must be a multiple of 2, such as 4 or 6"),
    (["student.width=11"], "student.width=11 must be a multiple of 2, such as 10 or 12"),
])  # fmt: skip
def test_impossible_sizes(change, which):
    with pytest.raises(ConfigError, match=which):
        config = with_overrides(runs.afd_table3(), [*TINY, *change])
        wan_family(config.student, config.rollout.chunk)


def test_every_linear_of_a_block_is_adapted():
    student = tiny().student
    add_lora(student, 2, list(LORA_TARGETS))
    linears = [
        m
        for n, m in student.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("blocks.") and "lora" not in n
    ]
    assert len(linears) == len(lora_layers(student)) == 20


def test_dry_run_says_sizes_and_writes_nothing(say, tmp_path, teacher):
    status, said = say("train", "afd_table3", *TINY, teacher, "--dry-run", "--out", tmp_path / "run")
    assert status == 0 and "of them trained" in said and "21 frames, 48x80 pixels, 16 fps" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["sft", "gan"])
def test_baselines_train_a_wan_student(say, tmp_path, teacher, method):
    """SFT through the VAE's encoder, GAN through its decoder; without adapters, every weight."""
    overrides = [
        f"method={method}",
        "update.v_old=self",
        "update.lr=1e-2",
        f"student.lora_rank={4 if method == 'sft' else 0}",
    ]
    status, said = say("train", "afd_table3", *TINY, teacher, *overrides, "--out", tmp_path / "run")
    assert status == 0, said
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert rows[2]["grad_norm"] > 0 and all(np.isfinite(v) for row in rows for v in row.values())
    adapted, before = load_student(tmp_path / "run/student"), tiny().student
    assert any(not torch.equal(p, adapted.state_dict()[n]) for n, p in before.state_dict().items())


def test_vae_encodes_what_diffusers_does_and_decodes_with_gradient():
    torch.manual_seed(0)
    decode = tiny().vae
    videos = torch.rand(1, 3, 9, 16, 24)
    latents = decode.encode(videos)
    with torch.no_grad():
        mode = decode.vae.encode(videos * 2 - 1).latent_dist.mode()
    assert latents.shape == (1, 16, 3, 2, 3) and not latents.requires_grad
    torch.testing.assert_close(latents * decode.std + decode.mean, mode)
    x = latents.double().requires_grad_()
    decode.vae.double()
    weights = torch.randn(1, 3, 9, 16, 24, dtype=torch.float64)
    value = lambda z: (decode(z) * weights).sum()
    (gradient,) = torch.autograd.grad(value(x), x)
    direction = torch.randn_like(x)
    step = 1e-4 * direction  # a larger one crosses the clamp of some pixels
    slope = (value(x.detach() + step) - value(x.detach() - step)) / 2e-4
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=0)  # latents pass through float32
