"""The KV-detached update: its gradient against teacher forcing, chunk by chunk against all at once, its memory."""

import pytest
import torch
from torch import Tensor, nn

from afd_fast import nft_loss, nft_recipe
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.student import StudentModule, map_tensors
from afd_fast.students.toy.model import ToyConfig, ToyStudent
from afd_fast.students.toy.text import tokenize
from afd_fast.students.wan import attention as patterns
from afd_fast.training.velocity import Chunking, LossInputs, chunk_velocities, clip_loss, nft_backward, velocity
from benchmarks.update import saved_bytes

CHUNK = 3


def wan(frames=12, batch=2):
    torch.manual_seed(0)
    model = CausalWan(
        CausalWanConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=2, text_len=4, text_dim=8, freq_dim=16)
    )
    model.double().requires_grad_()
    context = torch.randn(batch, 4, 8, dtype=torch.float64)
    return model, lambda: model.encode_text(context), (16, frames, 4, 4)


def toy(frames=12, batch=2):
    torch.manual_seed(0)
    model = ToyStudent(ToyConfig(frames=frames, dim=32, heads=2, layers=2, hidden=32)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model, lambda: model.encode_text(tokenize(["a red ball", "a blue ball"][:batch])), (3, frames, 16, 16)


def inputs(shape, batch=2, clips=1):
    g = torch.Generator().manual_seed(1)
    n = lambda: torch.randn(batch, *shape, generator=g, dtype=torch.float64)
    x0, noise, v_ref, v_old = n(), n(), n(), n()
    t = 0.1 + 0.8 * torch.rand(batch, shape[1] // CHUNK, generator=g, dtype=torch.float64).repeat_interleave(CHUNK, 1)
    wide = t[:, None, :, None, None]
    r = torch.rand(batch, clips, generator=g, dtype=torch.float64)
    return x0, noise, (1 - wide) * x0 + wide * noise, t, r, v_ref, v_old


def student_velocity(model, x_t, t, text, clean, chunk=CHUNK, **options):
    return velocity(model, x_t, t, text, clean, Chunking(chunk, **options))


def loss_inputs(x0, noise, x_t, t, r, recipe, **more):
    return LossInputs(x0, x_t, noise, t, r if r.ndim == 2 else r[:, None], recipe, **more)


def gradients(model) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def close(a, b, tolerance=1e-12):
    scale = max(x.abs().max() for x in b)
    assert scale > 1e-6
    return all((x - y).abs().max() <= tolerance * scale for x, y in zip(a, b, strict=True))


def test_equals_teacher_forcing_with_a_detached_history(monkeypatch):
    model, text, shape = wan()
    x0, noise, x_t, t, *_ = inputs(shape)
    weights = torch.randn(x0.shape, dtype=torch.float64)
    (student_velocity(model, x_t, t, text(), x0, CHUNK) * weights).sum().backward()
    ours = gradients(model)
    (model.forward_teacher_forcing(x_t, t * 1000, text(), x0, chunk=CHUNK) * weights).sum().backward()
    full = gradients(model)
    rope = patterns.TeacherForcing.rope

    def rope_and_detach(self, attn, q, k, v):
        q, k, v = rope(self, attn, q, k, v)
        split = self.blocks[-1][0] * self.tokens
        return q, *(torch.cat([x[:, :split].detach(), x[:, split:]], 1) for x in (k, v))

    monkeypatch.setattr(patterns.TeacherForcing, "rope", rope_and_detach)
    (model.forward_teacher_forcing(x_t, t * 1000, text(), x0, chunk=CHUNK) * weights).sum().backward()
    theirs = gradients(model)
    assert close(ours, theirs) and not close(ours, full, 1e-3)


@pytest.mark.parametrize("make", [wan, toy])
@pytest.mark.parametrize("recipe", ["afd", "diffusionnft", "astrolabe"])
def test_chunk_by_chunk_is_all_at_once(make, recipe):
    model, text, shape = make()
    x0, noise, x_t, t, r, v_ref, v_old = inputs(shape)
    recipe = nft_recipe(recipe, ref_coef=0.3)
    given = {"noise": noise, "v_ref": v_ref, "v_old": v_old, "recipe": recipe}
    loss = nft_loss(student_velocity(model, x_t, t, text(), x0, CHUNK), x0, r[:, 0], t, frame_dim=2, **given)
    (0.7 * loss).backward()
    whole = gradients(model)
    inputs_ = loss_inputs(x0, noise, x_t, t, r[:, :1], recipe, v_ref=v_ref, v_old=v_old)
    found = nft_backward(model, text(), inputs_, Chunking(CHUNK), 0.7)
    assert close(gradients(model), whole)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("batch_reduction", ["sum", "mean"])
def test_a_reward_for_every_clip(recipe, batch_reduction):
    """Clips as separate samples: [B, C, S * L, ...] -> [B * S, C, L, ...]."""
    model, text, shape = wan()
    x0, noise, x_t, t, r, v_ref, v_old = inputs(shape, clips=2)
    recipe = nft_recipe(recipe, ref_coef=0.3, batch_reduction=batch_reduction)
    clips = lambda x: x.unflatten(2, (2, 6)).transpose(1, 2).flatten(0, 1)
    v = student_velocity(model, x_t, t, text(), x0, CHUNK)
    loss, stats = nft_loss(
        clips(v), clips(x0), r.flatten(), t.view(4, 6), frame_dim=2, noise=clips(noise), v_ref=clips(v_ref),
        v_old=clips(v_old), recipe=recipe, return_stats=True,
    )  # fmt: skip
    loss.backward()
    expected = gradients(model)
    given = loss_inputs(x0, noise, x_t, t, r, recipe, v_ref=v_ref, v_old=v_old)
    found = nft_backward(model, text(), given, Chunking(CHUNK))
    assert close(gradients(model), expected)
    ratio = (v.flatten(1).norm(dim=1) / v_ref.flatten(1).norm(dim=1)).mean()
    expected = (loss, stats.policy_loss, stats.prior_loss, stats.signal, ratio)
    torch.testing.assert_close(tuple(found), tuple(x.detach() for x in expected), rtol=1e-11, atol=1e-12)


def test_only_the_active_frames_learn():
    model, text, shape = wan()
    x0, noise, x_t, t, r, v_ref, _ = inputs(shape, clips=4)
    recipe, part = nft_recipe("afd", ref_coef=0.3), slice(6, 9)
    v = student_velocity(model, x_t, t, text(), x0, CHUNK, window=6, sink=3)[:, :, part]
    of = lambda x: x[:, :, part]
    nft_loss(v, of(x0), r[:, 2], t[:, part], frame_dim=2, noise=of(noise), v_ref=of(v_ref), recipe=recipe).backward()
    expected = gradients(model)
    given = loss_inputs(x0, noise, x_t, t, r, recipe, v_ref=v_ref)
    nft_backward(model, text(), given, Chunking(CHUNK, 6, 3, range(6, 9)))
    assert close(gradients(model), expected)


@pytest.mark.parametrize("text_of", [lambda x: x, lambda x: [x, x * 0], lambda x: {"words": x}, lambda x: (x,)])
def test_any_text_encoding_works_in_every_update(text_of):
    """A plain tensor, a list, a dict or a tuple of tensors: the text's own gradient is the same in both updates."""

    class Student(StudentModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.mix = nn.Linear(3, 16).double(), nn.Linear(16, 16).double()

        def encode_text(self, context):
            return text_of(self.words(context))

        def new_cache(self, batch, frames, height, width, window=None, sink=0):
            return []

        def forward(self, x, t, text, *, cache, start_frame=0):
            words = []
            map_tensors(text, lambda a: words.append(a) or a)
            cache.append(x.detach())
            return self.mix((x + sum(words)[:, :, None, None, None]).movedim(1, -1)).movedim(-1, 1) + len(cache)

    model, context = Student(), torch.randn(2, 3, dtype=torch.float64)
    x0, noise, x_t, t, r, v_ref, v_old = inputs((16, 12, 2, 2))
    given = loss_inputs(x0, noise, x_t, t, r, nft_recipe("afd", ref_coef=0.3), v_ref=v_ref)
    loss, _ = clip_loss(student_velocity(model, x_t, t, model.encode_text(context), x0), given)
    loss.backward()
    whole = gradients(model)
    nft_backward(model, model.encode_text(context), given, Chunking(CHUNK))
    assert close(gradients(model), whole) and whole[0].abs().max() > 0


def peaks(frames: int, recipe: str) -> tuple[int, int]:
    """Bytes kept by the chunked update and by the whole graph, over a rolling cache."""
    model, text, shape = wan(frames, batch=1)
    x0, noise, x_t, t, r, v_ref, v_old = inputs(shape, batch=1, clips=frames // CHUNK)
    given = loss_inputs(x0, noise, x_t, t, r, nft_recipe(recipe), v_ref=v_ref, v_old=v_old)
    rolling = Chunking(CHUNK, 9, 3)
    return (
        saved_bytes(lambda: nft_backward(model, text(), given, rolling)),
        saved_bytes(lambda: velocity(model, x_t, t, text(), x0, rolling).sum().backward()),
    )


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_a_long_stream_in_constant_memory(recipe):
    (short, _), (long, whole) = peaks(12, recipe), peaks(63, recipe)
    latents = 63 * 16 * 4 * 4 * 8  # bytes; the adaptive recipe's loss keeps a few tensors like them
    assert long <= short + (8 * latents if recipe == "diffusionnft" else 0) and whole > 4 * long


def test_bad_input():
    model, text, shape = wan()
    x0, noise, x_t, t, r, *_ = inputs(shape)
    of = lambda r: loss_inputs(x0, noise, x_t, t, r, nft_recipe("diffusionnft"))
    with pytest.raises(ValueError, match="a clip must be whole chunks"):
        nft_backward(model, text(), of(torch.rand(2, 12)), Chunking(CHUNK))
    with pytest.raises(ValueError, match="need whole clips of 12 frames"):
        nft_backward(model, text(), of(r), Chunking(CHUNK, active=range(3, 12)))
    with pytest.raises(ValueError, match="not whole chunks of 3"):
        next(chunk_velocities(model, x_t, t, text(), x0, Chunking(CHUNK, active=range(1, 4))))
