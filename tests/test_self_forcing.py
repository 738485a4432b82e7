"""Distillation to few steps: DMD's gradient, its step on a many-step student, and the command."""

import contextlib
import copy
import signal
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from afd_fast.cli.main import main
from afd_fast.students.toy import pretrain, shipped
from afd_fast.students.toy.family import of_student
from afd_fast.students.toy.model import ToyConfig, ToyStudent
from afd_fast.training import self_forcing
from afd_fast.training.self_forcing import Noised, dmd_direction, dmd_loss

SMALL = ToyConfig(frames=6, height=16, width=16, chunk=3, dim=32, layers=2, heads=2, hidden=32)


def small_family():
    torch.manual_seed(0)
    model = ToyStudent(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return of_student(model)


def silent(*_):
    pass


def test_the_gradient_is_that_of_the_written_out_formula():
    g = torch.Generator().manual_seed(0)
    x0, real, fake = (torch.randn(4, 3, 6, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_()
    dmd_loss(x0, dmd_direction(x0.detach(), real, fake)).backward()
    expected = np.empty(x0.shape)
    for b in range(4):
        x, a, f = (v[b].detach().numpy() for v in (x0, real, fake))
        expected[b] = (f - a) / np.abs(x - a).mean() / x0.numel()
    np.testing.assert_allclose(x0.grad.numpy(), expected, rtol=1e-9, atol=1e-18)


def test_descent_moves_samples_from_the_fake_distribution_to_the_real_one():
    """Gaussians, whose scores are known: x_t = (1 - t) x0 + t eps, E[x0 | x_t] for x0 ~ N(mean, std^2)."""

    def clean(x_t, t, mean, std):
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        return mean + gain * (x_t - (1 - t) * mean)

    g = torch.Generator().manual_seed(0)
    shape = (512, 1, 1, 1, 1)
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    shift = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([shift, scale], lr=0.02)
    for _ in range(300):
        x0 = shift + scale * z
        now = x0.detach()
        t = torch.rand(shape, generator=g, dtype=torch.float64) * 0.9 + 0.05
        x_t = (1 - t) * now + t * torch.randn(shape, generator=g, dtype=torch.float64)
        real = clean(x_t, t, -1.0, 0.7)
        fake = clean(x_t, t, shift.detach(), scale.detach())
        optimizer.zero_grad()
        dmd_loss(x0, dmd_direction(now, real, fake)).backward()
        optimizer.step()
    assert shift.item() == pytest.approx(-1.0, abs=0.1) and scale.item() == pytest.approx(0.7, abs=0.15)


def test_a_score_sees_a_chunk_and_the_clean_ones_before_it():
    family = small_family()
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(2, 3, 6, 16, 16, generator=g) * 2 - 1
    seen = Noised(family, x0, family.text(["a", "b"]), g)
    assert seen.t.shape == (2, 6) and torch.equal(seen.t[:, 0], seen.t[:, 2]) and (seen.t[:, 2] != seen.t[:, 3]).all()
    before = seen.clean(family.student)
    seen.x0 = x0.clone()
    seen.x0[:, :, :3] += 1  # the history of the second chunk
    after = seen.clean(family.student)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.allclose(before[:, :, 3:], after[:, :, 3:])
    # what it predicts is the clean video that its velocity says
    v = family.student.forward_teacher_forcing(
        seen.x_t, seen.t * 1000, family.student.encode_text(seen.context), seen.x0
    )
    torch.testing.assert_close(after, seen.x_t - seen.sigma * v)


def test_distillation_is_a_function_of_the_seed_and_leaves_its_source_alone(monkeypatch):
    monkeypatch.setattr(self_forcing, "WARMUP", 0)
    monkeypatch.setattr(self_forcing, "BATCH", 4)
    family = small_family()
    before = copy.deepcopy(family.student.state_dict())
    losses = []
    make = lambda seed: self_forcing.distill(
        family, ["a", "b"], iterations=7, seed=seed, report=lambda step, of, loss: losses.append(loss)
    )
    first, again, other = (make(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert any(not torch.equal(first[k], before[k]) for k in first)
    assert all(torch.equal(v, before[k]) for k, v in family.student.state_dict().items())
    assert all(p.requires_grad for p in family.student.parameters()) and len(losses) == 21


def test_the_student_does_not_move_before_the_fake_score_has_learnt(monkeypatch):
    monkeypatch.setattr(self_forcing, "BATCH", 2)
    family = small_family()
    made = self_forcing.distill(family, ["a"], iterations=7, report=silent).state_dict()
    assert all(torch.equal(v, made[k]) for k, v in family.student.state_dict().items())


@pytest.mark.parametrize("steps, stop", [(6, 4), (40, 33)])  # of pretraining, and of the distillation with its warm-up
def test_a_stopped_command_continues_bit_for_bit(tmp_path, monkeypatch, capfd, steps, stop):
    distilled = steps == 40
    world = replace(pretrain.PHYSICS, student=SMALL, clips=8, steps=6, batch=2)
    monkeypatch.setitem(pretrain.WORLDS, "physics", world)
    monkeypatch.setattr(self_forcing, "BATCH", 2)
    monkeypatch.setattr(self_forcing, "distill", partial(self_forcing.distill, iterations=40))
    monkeypatch.chdir(tmp_path)
    shipped.save(small_family().student, tmp_path / "many.safetensors", world="physics")
    seen, stops = [], []

    @contextlib.contextmanager
    def shown(console):
        def report(step, of, loss):
            seen.append(step)
            if [step] == stops:
                signal.raise_signal(signal.SIGTERM)

        yield report

    monkeypatch.setattr(shipped, "shown", shown)

    def make(out, status):
        words = ["--distill", "many.safetensors"] if distilled else ["--world", "physics"]
        monkeypatch.setattr(sys, "argv", ["afd-fast", "pretrain", *words, "--out", out])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == status

    make("whole.safetensors", 0)
    stops.append(stop)
    make("base.safetensors", 130)
    assert "the same command continues" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "base.safetensors").exists() and (tmp_path / "base.state").exists()
    seen.clear(), stops.clear()
    make("base.safetensors", 0)
    assert seen == list(range(stop + 1, steps + 1))
    whole, again = (shipped.load(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "base"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.safetensors" for n in ("many", "whole", "base")}


@pytest.mark.parametrize("about", [{"run": "{}"}, {"command": "afd-fast pretrain --distill many.safetensors --seed 0"}])
def test_a_student_that_is_not_of_many_steps_is_not_distilled(tmp_path, monkeypatch, capfd, about):
    monkeypatch.chdir(tmp_path)
    shipped.save(small_family().student, tmp_path / "few.safetensors", **about)
    monkeypatch.setattr(
        sys, "argv", ["afd-fast", "pretrain", "--distill", "few.safetensors", "--out", "out.safetensors"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "few.safetensors is no many-step student" in " ".join(capfd.readouterr().err.split())
    assert [p.name for p in tmp_path.iterdir()] == ["few.safetensors"]
