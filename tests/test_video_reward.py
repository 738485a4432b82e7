"""VideoAlign's network against its own numbers, the published format, packing, and the traps that fail silently."""

import numpy as np
import pytest
import torch
from transformers import Qwen2VLModel

from afd_fast.discriminators import FeatureCache, Features, Objective
from afd_fast.discriminators.videoalign import model as video_reward
from afd_fast.discriminators.videoalign.checkpoints import load_video_reward
from afd_fast.students.lora import merged_lora
from tests import tiny_videoalign as tiny

PROMPTS = ["a red ball", "two dogs in the snow"]


def load(dtype=torch.float32, **options):
    return load_video_reward(tiny.GOLDEN, dtype=dtype, template=tiny.TEMPLATE, tokenizer=tiny.tokenizer(), **options)


@pytest.fixture(scope="module")
def golden():
    """io.npz with the ids of each sample cut around its video."""
    z = dict(np.load(tiny.GOLDEN / "io.npz"))
    z["grids"] = [tuple(g) for g in z["video_grid_thw"].tolist()]
    rows = [row[: int(n)].tolist() for row, n in zip(z["input_ids"], z["attention_mask"].sum(1))]
    z["prefixes"] = [tuple(row[: row.index(301)]) for row in rows]
    z["suffixes"] = [tuple(row[len(row) - row[::-1].index(301) :]) for row in rows]
    return z


def golden_logits(model, z):
    features = model.encode_patches(torch.from_numpy(z["pixel_values_videos"]), z["grids"])
    one = lambda i: model.states_of(features[i : i + 1], [z["suffixes"][i]], z["prefixes"][i])
    return model.logits(torch.cat([one(0), one(1)]))


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_scores_and_gradients_are_videoaligns(golden, lora_rank):
    model = load(lora_rank=lora_rank)
    logits = golden_logits(model, golden)
    assert np.abs(logits.detach().numpy() - golden["logits"]).max() < 1e-5
    if lora_rank is None:
        loss = Objective()(*logits.sum(1))
        assert abs(loss.item() - golden["bt_loss"]) < 1e-6
        loss.backward()
        named = dict(model.named_parameters())
        for key in (k for k in golden if k.startswith("grad/")):
            name = key.removeprefix("grad/").replace("model.", "backbone.language_model.")
            assert np.abs(named[name].grad.numpy() - golden[key]).max() < 1e-6


def test_positions_are_one_dimensional_not_m_rope(golden, monkeypatch):
    """Trap 1. The recorded M-RoPE scores are what this model must not give."""
    assert np.abs(golden["logits_mrope"] - golden["logits"]).max() > 0.04
    seen = []
    model = load()
    forward = model.backbone.language_model.forward
    monkeypatch.setattr(
        model.backbone.language_model, "forward", lambda **kw: seen.append(kw["position_ids"]) or forward(**kw)
    )
    golden_logits(model, golden)
    assert all(torch.equal(p, torch.arange(p.shape[-1]).expand(3, 1, -1)) for p in seen)


def test_features_are_the_mergers_output(golden):
    """Trap 2: last_hidden_state has four times the rows, and a masked scatter takes them without a word."""
    model = load()
    features = model.encode_patches(torch.from_numpy(golden["pixel_values_videos"]), golden["grids"])
    assert [tuple(c.shape) for c in features.clips] == [(18, 64), (12, 64)]


def test_only_ta_and_the_sum_see_the_prompt(caplog):
    """Trap 3."""
    model = tiny.reward_model()
    a, b = (model.rewards(tiny.clips(1), [p], normalise=False) for p in PROMPTS)
    assert torch.equal(a["VQ"], b["VQ"]) and torch.equal(a["MQ"], b["MQ"])
    assert (a["TA"] - b["TA"]).abs() > 1e-3
    assert model.score(tiny.clips(1), PROMPTS[:1]) != model.score(tiny.clips(1), PROMPTS[1:])
    assert not caplog.records
    with caplog.at_level("WARNING", "afd_fast"):
        tiny.reward_model(weights=(0.0, 1.0, 0.0))
    assert "cannot see the prompt" in caplog.text
    with pytest.raises(ValueError, match="before the prompt"):
        video_reward.PromptTokens(tiny.tokenizer(), "<|VQ_reward|><|MQ_reward|><|TA_reward|>{text_prompt}")


def test_importing_and_scoring_need_no_torchvision():
    """Trap 5: torchvision would replace or break the CPU build of PyTorch; nothing here imports it."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torchvision'] = None; from tests import tiny_videoalign as t;"
        "print(t.reward_model().score(t.clips(1), ['a']).shape)"
    )
    root = tiny.GOLDEN.parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0 and "[1]" in out.stdout, out.stderr


def test_attention_name_reaches_both_towers():
    """Trap 6: the name has "flash" in it, but only once the model exists; the user's config is left alone."""
    config = tiny.config()
    for _ in range(2):
        model = video_reward.VideoReward(config, tiny.tokenizer(), tiny.TEMPLATE, tiny.SETTINGS)
        assert config._attn_implementation != model.backbone.config._attn_implementation == video_reward.ATTENTION
    seen = []
    original = video_reward.attention_varlen
    video_reward.attention_varlen = lambda q, k, v, lengths, **kw: (
        seen.append((lengths, kw)) or original(q, k, v, lengths, **kw)
    )
    try:
        model.score(tiny.clips(2), PROMPTS)
    finally:
        video_reward.attention_varlen = original
    vision, language = seen[:2], seen[2:]
    assert len(language) == 3
    assert all(lengths == (24,) * 4 and not kw["causal"] for lengths, kw in vision)
    assert all(len(lengths) == 2 and kw["causal"] for lengths, kw in language)
    assert len({lengths for lengths, _ in language}) == 1 and language[0][0][0] != language[0][0][1]


def test_missing_attention_package_is_named(monkeypatch):
    from afd_fast.ops import attention

    with pytest.raises(ValueError, match="float16 or bfloat16 CUDA"):
        tiny.reward_model(attention="fa3").score(tiny.clips(1), PROMPTS[:1])
    bare_hopper = lambda request, *_: attention.choose_backend(request, 9, True, {"sdpa"}.__contains__)
    monkeypatch.setattr(attention, "_resolve", bare_hopper)
    for backend, package in (("fa3", "flash-attn-3"), ("fa4", "flash-attn-4"), ("fa2", "flash-attn 2")):
        with pytest.raises(ImportError, match=package):
            tiny.reward_model(attention=backend).score(tiny.clips(1), PROMPTS[:1])


def test_peft_wraps_the_whole_model():
    """Trap 7: a module with a `.config` that has a model_type crashes peft."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.reward_model(lora=0), LoraConfig(r=2, target_modules=video_reward.LORA_TARGETS))
    assert sum(p.requires_grad for p in model.parameters()) == 3 * 7 * 2


def test_head_and_adapters_are_float32_and_move():
    """Trap 8: a bf16 head at lr 1e-5 leaves most of its weights where they were."""
    model = tiny.reward_model(dtype=torch.bfloat16)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2 + 1 and all(p.dtype == torch.float32 for p in trained.values())
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    frequencies = [b for n, b in model.named_buffers() if n.endswith("inv_freq")]
    assert len(frequencies) == 4 and all(b.dtype == torch.float32 for b in frequencies)
    before = model.rm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(trained.values(), 1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        model.paired_loss(tiny.clips(2), tiny.clips(2, seed=1), PROMPTS).loss.backward()
        optimizer.step()
    assert (model.rm_head.weight != before).float().mean() > 0.99


def test_head_stays_float32_inside_autocast():
    """Trap 9."""
    model = tiny.reward_model()
    states = torch.randn(2, 3, 64) * 30
    wanted = model.logits(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.logits(states), wanted)
        inside = model.score(tiny.clips(2), PROMPTS)
    assert torch.equal(inside, model.score(tiny.clips(2), PROMPTS))


@pytest.mark.parametrize("token", ["<|VQ_reward|>", "<|video_pad|>", "<|im_end|>"])
def test_special_tokens_in_a_prompt_are_refused(token):
    """Trap 10."""
    model = tiny.reward_model()
    for ask in (lambda prompt: model.score(tiny.clips(1), [prompt]), model.check_prompt):
        with pytest.raises(ValueError, match=r"special token .*take it out"):
            ask(f"a {token} cat")


def test_no_name_of_a_hub_kernel_is_requested():
    """Trap 11: "flash_attention_2" with the kernels package goes to the network."""
    model = tiny.reward_model()
    for module in (model.backbone, model.backbone.visual, model.backbone.language_model):
        assert module.config._attn_implementation == video_reward.ATTENTION
        assert not module.config._attn_implementation.startswith("flash_attention")


def padded_reference(model, videos, prompts):
    """transformers' own padded forward with its sdpa, masks and scatter; the network's independent twin."""
    plain = Qwen2VLModel._from_config(tiny.config(), attn_implementation="sdpa").to(videos[0].dtype)
    plain.load_state_dict(model.backbone.state_dict())
    patches, grids, rows = [], [], []
    s = model.settings
    for video, prompt in zip(videos, prompts):
        x, grid = video_reward.to_patches(
            video[None], clip_fps=16, fps=s.fps, min_pixels=s.min_pixels, max_pixels=s.max_pixels
        )
        patches.append(x[0])
        grids.append(grid)
        tail = model.prompts.suffix(prompt) + (1, 2, 3)  # more text behind the last reward token
        rows.append([*model.prompts.prefix, *[301] * (x.shape[1] // 4), *tail])
    longest = max(map(len, rows))
    ids = torch.tensor([r + [306] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    positions = torch.arange(longest).expand(3, len(rows), -1)
    hidden = plain(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values_videos=torch.cat(patches),
        video_grid_thw=torch.tensor(grids), mm_token_type_ids=(ids == 301).int() * 2,
    ).last_hidden_state  # fmt: skip
    return model.logits(torch.stack([h[[r.index(i) for i in (310, 311, 312)]] for h, r in zip(hidden, rows)]))


def test_packed_is_unpacked():
    model = tiny.reward_model(lora=0)
    videos = [tiny.clips(1, 8, (56, 84))[0], tiny.clips(1, 33, (112, 56), 1)[0], tiny.clips(1, 8, (56, 84), 2)[0]]
    prompts = [*PROMPTS, "x" * 70]
    with torch.no_grad():
        packed = model.logits(model.reward_states(videos, prompts))
        alone = torch.cat([model.logits(model.reward_states([v], [p])) for v, p in zip(videos, prompts)])
        padded = padded_reference(model, videos, prompts)
    assert (packed - alone).abs().max() < 2e-6 and (packed - padded).abs().max() < 2e-6
    assert (packed[0] - packed[2]).abs().max() > 1e-3


def test_loss_is_one_packed_batch(monkeypatch):
    model, teacher, student = tiny.reward_model(), tiny.clips(2), tiny.clips(2, 9, seed=1)
    wanted = Objective()(model.score(teacher, PROMPTS), model.score(student, PROMPTS))
    calls = []
    states = model.states_of
    monkeypatch.setattr(model, "states_of", lambda *a: calls.append(len(a[0])) or states(*a))
    assert abs(model.paired_loss(teacher, student, PROMPTS).loss - wanted) < 1e-6 and calls == [4]


def test_equal_prompts_are_looked_up_once(monkeypatch):
    model, seen = tiny.reward_model(), []
    embed = model.backbone.language_model.embed_tokens
    monkeypatch.setattr(
        embed, "forward", lambda ids: seen.append(ids.numel()) or torch.nn.Embedding.forward(embed, ids)
    )
    model.paired_loss(tiny.clips(2), tiny.clips(2, seed=1), ["same", "same"])
    assert len(seen) == 2  # the prefix, the suffix


def test_only_reward_rows_meet_the_head(monkeypatch):
    model, seen = tiny.reward_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: seen.append(tuple(x.shape)) or logits(x))
    model.score(tiny.clips(2), PROMPTS)
    assert seen == [(2, 3, 64)] and not hasattr(model.backbone, "lm_head")


def test_checkpointing_and_cached_features_change_nothing():
    teacher, student = tiny.clips(2), tiny.clips(2, seed=1)
    gradients = []
    for checkpointing, cached in ((True, False), (False, False), (True, True)):
        model = tiny.reward_model(checkpointing=checkpointing)
        assert model.backbone.language_model.layers[1].gradient_checkpointing is checkpointing
        calls = []
        if cached:
            cache = FeatureCache(model)
            for _ in range(2):
                given = cache(["a", "b"], lambda i, calls=calls: calls.append(i) or teacher[i])
            assert calls == [0, 1] and isinstance(given, Features)
        model.paired_loss(given if cached else teacher, student, PROMPTS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(gradients[0], other))
    with pytest.raises(ValueError, match="frozen"):
        FeatureCache(tiny.reward_model(freeze_vision=False))


def test_cached_features_stay_below_their_limit():
    """What was used longest ago goes, and is encoded again when it comes."""
    model, clips, calls = tiny.reward_model(), tiny.clips(3), []

    def video(keys, i):
        calls.append(keys[i])
        return clips[keys[i]]

    one = model.encode(clips[:1]).clips[0].nbytes
    cache = FeatureCache(model, limit=2 * one)
    for keys in ([0, 1], [0], [2], [0, 2], [1, 0, 2]):
        found = cache(keys, lambda i, keys=keys: video(keys, i))
        assert cache.size == sum(x.nbytes for x in cache.kept.values()) <= 2 * one
        for key, features in zip(keys, found.clips):
            assert torch.equal(features, model.encode(clips[key : key + 1]).clips[0])
    assert calls == [0, 1, 2, 1, 0, 2]


def test_vision_tower_is_frozen_by_default_and_can_be_trained():
    for freeze in (True, False):
        model = tiny.reward_model(freeze_vision=freeze)
        model.paired_loss(tiny.clips(2), tiny.clips(2, seed=1), PROMPTS).loss.backward()
        grads = [p.grad is not None for p in model.backbone.visual.parameters()]
        assert all(grads) is not freeze and any(grads) is not freeze
        assert not any(p.requires_grad for n, p in model.named_parameters() if "embed_tokens" in n)


def test_gradient_reaches_the_pixels():
    """For the GAN baseline: to every pixel of the frames that the model sees, and to no other."""
    model = tiny.reward_model()
    video = tiny.clips(1).requires_grad_()
    model.score(video, PROMPTS[:1]).sum().backward()
    seen = video.grad.abs().amax((0, 1, 3, 4)) > 0
    assert seen.nonzero()[:, 0].tolist() == video_reward_frames(8)
    assert not model.encode(video.detach()).clips[0].requires_grad


def video_reward_frames(frames):
    from afd_fast.discriminators.videoalign.inputs import sample_frames

    return sample_frames(frames, 16.0)


def test_frozen_scores_stay_videoaligns(golden):
    model = load(lora_rank=2, lora_alpha=4)
    first = golden_logits(model, golden)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    moved = golden_logits(model, golden)
    with model.frozen():
        again = golden_logits(model, golden)
    assert torch.equal(first, again) and (moved - first).abs().max() > 1e-2
    assert torch.equal(golden_logits(model, golden), moved)
    with merged_lora(model), torch.no_grad():
        assert (golden_logits(model, golden) - moved).abs().max() < 1e-5


def test_normalised_rewards():
    model = tiny.reward_model()
    raw, normal = (model.rewards(tiny.clips(2), PROMPTS, normalise=n) for n in (False, True))
    assert torch.allclose(normal["MQ"], (raw["MQ"] - 1.1646) / 1.3811)
    assert torch.allclose(normal["Overall"], normal["VQ"] + normal["MQ"] + normal["TA"])
    assert torch.allclose(raw["Overall"], model.score(tiny.clips(2), PROMPTS))


def test_head_with_three_rows_takes_the_diagonal():
    settings = video_reward.RewardSettings(min_pixels=56 * 56, max_pixels=112 * 112, output_dim=3)
    model = tiny.reward_model(settings=settings)
    states = model.reward_states(tiny.clips(2), PROMPTS)
    wanted = torch.stack([states[:, i] @ model.rm_head.weight[i] for i in range(3)], 1)
    assert torch.allclose(model.logits(states), wanted, atol=1e-6)


def test_bf16_trunk_is_close():
    a, b = tiny.reward_model(), tiny.reward_model(dtype=torch.bfloat16)
    x, y = (m.score(tiny.clips(2), PROMPTS) for m in (a, b))
    assert y.dtype == torch.float32 and (x - y).abs().max() < 0.1


def test_bad_input():
    model = tiny.reward_model()
    with pytest.raises(ValueError, match="1 videos and 2 prompts"):
        model.score(tiny.clips(1), PROMPTS)
    with pytest.raises(ValueError, match="1 student_videos and 2 prompts"):
        model.paired_loss(tiny.clips(2), tiny.clips(1), PROMPTS)
    with pytest.raises(ValueError, match="one string"):
        model.score(tiny.clips(2), "ab")
    with pytest.raises(ValueError, match="divide 0..255 by 255"):
        model.score(tiny.clips(2) * 255, PROMPTS)
    with pytest.raises(ValueError, match=r"uint8.*divide"):
        model.score((tiny.clips(2) * 255).byte(), PROMPTS)
    with pytest.raises(ValueError, match="at least 2 frames"):
        model.score(tiny.clips(2, frames=1), PROMPTS)
    with pytest.raises(ValueError, match=r"\[B, 3, F, H, W\]"):
        model.score(tiny.clips(2).transpose(1, 2), PROMPTS)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        model.score(tiny.clips(2) * torch.nan, PROMPTS)
    features = model.encode(tiny.clips(2))
    features.clips[1].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"sample 1 \(prompt 'two dogs in the snow'\)"):
        model.score(Features((features.clips[0].clone(), features.clips[1].clone())), PROMPTS)
    with pytest.raises(ValueError, match="adapters of rank 4"):
        model.add_lora(2, 2)
