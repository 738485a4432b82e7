import pytest
import torch

from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.errors import ConfigError
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.lora import add_lora, disabled, lora_layers, merged_lora, trainable
from afd_fast.students.student import StudentConfig, family
from afd_fast.students.toy import shipped
from afd_fast.students.toy.family import LORA_TARGETS
from afd_fast.students.toy.model import ToyConfig, ToyStudent
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers.physics import all_prompts, split_prompts
from afd_fast.training.state import EMA, generator
from tests.runs import student_velocity


def student(dtype=torch.float64):
    torch.manual_seed(0)
    model = ToyStudent(ToyConfig(dim=32, layers=2, heads=2, hidden=32)).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def batch(model, size=3):
    g = torch.Generator().manual_seed(1)
    x, clean = (torch.randn(size, 3, 12, 16, 16, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(size, 4, generator=g, dtype=torch.float64).repeat_interleave(3, 1)
    return x, t, model.encode_text(tokenize(all_prompts()[:size])), clean


def test_cached_update_equals_teacher_forcing():
    model = student()
    x, t, text, clean = batch(model)
    cached = student_velocity(model, x, t, text, clean, 3)
    torch.testing.assert_close(cached, model.forward_teacher_forcing(x, t * 1000, text, clean), atol=1e-11, rtol=0)


def test_history_is_detached_and_own_chunk_is_not():
    model = student()
    x, t, text, clean = batch(model)
    x.requires_grad_()
    clean.requires_grad_()
    student_velocity(model, x, t, text, clean, 3)[:, :, 6:9].square().sum().backward()
    assert clean.grad is None
    assert x.grad[:, :, 6:9].abs().sum() > 0 and x.grad[:, :, :6].abs().sum() == 0


@torch.no_grad()
def test_a_failed_forward_leaves_its_chunk_unheld():
    model = student()
    x, t, text, _ = batch(model)
    cache = model.new_cache(3, 12, 16, 16)
    chunk = lambda number: (x[:, :, 3 * number : 3 * number + 3], t[:, 3 * number : 3 * number + 3] * 1000, text)
    model(*chunk(0), cache=cache)
    model(*chunk(1), cache=cache, start_frame=3)

    def interrupt(*_):
        raise KeyboardInterrupt

    failing = model.blocks[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # in the first layer this chunk is another's now
        model(*chunk(2), cache=cache, start_frame=3)
    failing.remove()
    with pytest.raises(ValueError, match="run the earlier chunks first"):
        model(*chunk(2), cache=cache, start_frame=6)
    model(*chunk(1), cache=cache, start_frame=3)
    model(*chunk(2), cache=cache, start_frame=6)


def test_causality_later_frames_do_not_reach_back():
    model = student()
    x, t, text, clean = batch(model)
    first = model.forward_teacher_forcing(x, t * 1000, text, clean)
    clean[:, :, 6:] += 1
    x[:, :, 9:] += 1
    second = model.forward_teacher_forcing(x, t * 1000, text, clean)
    assert torch.equal(first[:, :, :6], second[:, :, :6]) and not torch.allclose(first[:, :, 9:], second[:, :, 9:])


def test_rollout_is_the_documented_loop():
    """Against the same algorithm written out with teacher forcing: no cache, no shared code."""
    model = student()
    _, _, text, _ = batch(model)
    config = RolloutConfig(steps=(1000, 500), shift=1.0)
    noise = torch.randn(3, 3, 12, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    renoise = torch.randn(4, 3, 3, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    done = torch.zeros_like(noise)
    for chunk in range(4):
        window = slice(3 * chunk, 3 * chunk + 3)
        x = noise.clone()
        for sigma in (1.0, 0.5):
            v = model.forward_teacher_forcing(x, torch.full((3, 12), sigma * 1000).double(), text, done)
            x0 = x[:, :, window] - sigma * v[:, :, window]
            if sigma == 1.0:
                x[:, :, window] = 0.5 * x0 + 0.5 * renoise[chunk]
        done[:, :, window] = x0.detach()
    with torch.no_grad():
        torch.testing.assert_close(rollout(model, text, noise, config, renoise=renoise), done, atol=1e-10, rtol=0)


def test_words_of_the_world_do_not_collide():
    words = {w for p in all_prompts() for w in p.replace(",", "").split()}
    assert len({tokenize([w])[0, 0].item() for w in words}) == len(words)
    assert len({tuple(row.tolist()) for row in tokenize(all_prompts())}) == 128
    train, held_out = split_prompts()
    assert len(train) == 112 and not set(train) & set(held_out)


def test_merged_lora_equals_unmerged_and_restores_exactly():
    model = student()
    add_lora(model, 4, list(LORA_TARGETS))
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.3)
    assert len(lora_layers(model)) == 8
    x, t, text, clean = batch(model)
    plain = student_velocity(model, x, t, text, clean, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with merged_lora(model):
        torch.testing.assert_close(student_velocity(model, x, t, text, clean, 3), plain, atol=1e-11, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(student_velocity(model, x, t, text, clean, 3), plain)


def test_disabled_adapters_are_the_initial_student():
    model = student()
    x, t, text, clean = batch(model)
    initial = student_velocity(model, x, t, text, clean, 3)
    add_lora(model, 4, list(LORA_TARGETS))
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.3)
    assert not torch.allclose(student_velocity(model, x, t, text, clean, 3), initial)
    with disabled(model):
        assert torch.equal(student_velocity(model, x, t, text, clean, 3), initial)


def test_ema_follows_and_swaps_back():
    model = student()
    add_lora(model, 4, list(LORA_TARGETS))
    ema = EMA(trainable(model), 0.9)
    start = {k: v.clone() for k, v in ema.shadow.items()}
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(1)
    ema.update(trainable(model))
    name = next(iter(start))
    torch.testing.assert_close(ema.shadow[name], start[name] + 0.1)
    now = trainable(model)[name].clone()
    with ema.applied(model):
        assert torch.equal(trainable(model)[name], ema.shadow[name])
    assert torch.equal(trainable(model)[name], now)


def test_discriminator_sees_prompt_and_every_frame():
    torch.manual_seed(0)
    model = ToyDiscriminator(width=8, dim=16)
    video = torch.rand(2, 3, 12, 16, 16)
    prompts = all_prompts()[:2]
    score = model.score(video, prompts)
    assert score.shape == (2,) and not torch.equal(score, model.score(video, prompts[::-1]))
    for frame in range(12):
        changed = video.clone()
        changed[:, :, frame] = 0
        assert not torch.equal(score, model.score(changed, prompts))


def test_generators_depend_on_every_word():
    draws = {
        torch.rand(1, generator=generator(*key)).item() for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    assert len(draws) == 4
    assert torch.rand(1, generator=generator(5, 6, "x")) == torch.rand(1, generator=generator(5, 6, "x"))


def test_a_student_is_given_by_its_file(tmp_path):
    """What pretraining and a run write can be trained; a file of another world, or given as a checkpoint of Wan, says what it is."""
    made, other = tmp_path / "mine.safetensors", tmp_path / "lights.safetensors"
    student = shipped.load(name="toy")
    with torch.no_grad():
        next(student.parameters()).add_(1)
    shipped.save(student, made, world="physics")
    shipped.save(shipped.load(name="lights"), other, world="lights")
    found = family(StudentConfig("toy", base=str(made)), chunk=3).student.state_dict()
    assert all(torch.equal(found[k], v) for k, v in student.state_dict().items())
    with pytest.raises(ConfigError, match="makes chunks of 6 frames, and the student 'toy' of 3"):
        family(StudentConfig("toy", base=str(other)), chunk=3)
    with pytest.raises(ConfigError, match="nowhere.safetensors is neither a file"):
        family(StudentConfig("toy", base=str(tmp_path / "nowhere.safetensors")), chunk=3)
    for path, kind in ((made, "toy"), (other, "lights")):
        with pytest.raises(ConfigError, match=f"embedded student's file: give student={kind} student.base="):
            family(StudentConfig(str(path)), chunk=6)
