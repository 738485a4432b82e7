"""Pixels and tokens against the official processor, its numbers and VideoAlign's."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from afd_fast.discriminators.videoalign import inputs
from afd_fast.teachers.dataset import BatchPlan, TeacherVideos
from tests import tiny_videoalign as tiny

LIMITS = dict(clip_fps=16.0, fps=2.0, min_pixels=100_352, max_pixels=200_704)


def in_8_bits(*shape, seed=0):
    """Random clips [B, 3, F, H, W] of whole grey levels in [0, 1], with detail down to the pixel."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(*shape[:3], shape[3] // 4, shape[4] // 4, generator=g)
    x = F.interpolate(small.flatten(0, 1), shape[3:], mode="bilinear").view(shape)
    x = 0.2 + 0.6 * x + 0.05 * torch.randn(shape, generator=g)  # Pillow clamps between the axes: stay off the ends
    return (x.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize(
    "frames, fps, expected",
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # recorded from VideoAlign
        (33, 16, [0, 11, 21, 32]),
        (5, 16, [0, 1, 3, 4]),
        (3, 16, [0, 2]),
        (2, 16, [0, 1]),
    ],
)
def test_frames(frames, fps, expected):
    assert inputs.sample_frames(frames, fps) == expected


def test_too_few_frames():
    with pytest.raises(ValueError, match="at least 2 frames"):
        inputs.sample_frames(1, 16)


def test_size():
    assert inputs.smart_size(480, 832, 100_352, 200_704) == (336, 588)
    _, grid = inputs.to_patches(in_8_bits(1, 3, 81, 480, 832), **LIMITS)
    assert grid == (5, 24, 42)
    with pytest.raises(ValueError, match="200 times"):
        inputs.smart_size(10, 2001, 1, 10**9)
    smart_resize = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    for h in range(20, 900, 61):
        for w in range(20, 900, 67):
            wanted = smart_resize(max(h, 28), max(w, 28), min_pixels=100_352, max_pixels=200_704)
            assert inputs.smart_size(max(h, 28), max(w, 28), 100_352, 200_704) == wanted


@pytest.mark.parametrize("size", [(308, 364), (336, 588), (480, 832), (240, 426)])
def test_equals_the_processor_that_needs_no_torchvision(size):
    """transformers' Pillow processor, frame by frame: to rounding where nothing is resized. Pillow's own bicubic
    computes in fixed point and rounds between the axes: one grey level there."""
    video = in_8_bits(1, 3, 2, *size)[:, :, [0, 0, 1, 1]]  # an image is a temporal patch of two equal frames
    ours, (t, h, w) = inputs.to_patches(video, **LIMITS)
    processor = Qwen2VLImageProcessorPil(min_pixels=100_352, max_pixels=200_704)
    for k in range(t):
        image = (video[0, :, 2 * k] * 255).round().byte()
        out = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt", input_data_format="channels_last")
        assert out["image_grid_thw"].tolist() == [[1, h, w]]
        difference = (ours[0].view(t, h * w, -1)[k] - torch.as_tensor(out["pixel_values"])).abs()
        level = 1 / 255 / min(inputs.CLIP_STD)
        resized = size != inputs.smart_size(*size, 100_352, 200_704)
        assert difference.max() < (1.01 * level if resized else 1e-6)
        assert difference.mean() < 0.25 * level


@pytest.mark.parametrize("frames, size", [(8, (308, 364)), (16, (480, 832)), (5, (240, 426))])
def test_equals_the_video_processor(frames, size):
    """Compared with the official video processor and torchvision's resize, where torchvision is installed."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    functional = importlib.import_module("torchvision.transforms").functional
    official = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor
    video = in_8_bits(1, 3, frames, *size)
    ours, grid = inputs.to_patches(video, **LIMITS)
    frames8 = (video[0].transpose(0, 1) * 255).round().byte()[inputs.sample_frames(frames, 16.0)]
    resized = functional.resize(
        frames8, inputs.smart_size(*size, 100_352, 200_704), functional.InterpolationMode.BICUBIC, antialias=True
    )
    out = official()(videos=[resized], do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert out["video_grid_thw"].tolist() == [list(grid)]
    assert (ours[0] - out["pixel_values_videos"]).abs().max() < 1e-6


def test_patch_order_by_definition():
    """Row n, column c of the patches, written out pixel by pixel."""
    video = in_8_bits(2, 3, 4, 56, 84)
    ours, (t, h, w) = inputs.to_patches(video, clip_fps=16, fps=2, min_pixels=56 * 56, max_pixels=10**6)
    n = 0
    for i in range(t):
        for block in range(h // 2 * (w // 2)):
            for inner in range(4):
                row = 2 * (block // (w // 2)) + inner // 2
                col = 2 * (block % (w // 2)) + inner % 2
                tube = video[:, :, 2 * i : 2 * i + 2, 14 * row : 14 * row + 14, 14 * col : 14 * col + 14]
                mean, std = (torch.tensor(c).view(3, 1, 1, 1) for c in (inputs.CLIP_MEAN, inputs.CLIP_STD))
                assert torch.allclose(ours[:, n], ((tube - mean) / std).flatten(1), atol=1e-6)
                position = inputs.patch_positions([(t, h, w)], ours.device)[n].tolist()
                assert position == [row, col]
                n += 1
    assert n == t * h * w == ours.shape[1]


def test_vision_positions_are_transformers():
    utils = pytest.importorskip("transformers.vision_utils")
    grids = [(2, 4, 6), (1, 2, 2), (3, 6, 4)]
    wanted = utils.get_vision_position_ids(torch.tensor(grids), 2)
    assert torch.equal(inputs.patch_positions(grids, torch.device("cpu")), wanted)


def test_differentiable():
    """Rounding passes the gradient: it is that of the same function without rounding."""
    video = (in_8_bits(1, 3, 4, 60, 90) / 4 + 0.4).requires_grad_()  # no overshoot reaches 0 or 1
    options = dict(clip_fps=16, fps=2, min_pixels=56 * 56, max_pixels=10**6)
    patches, _ = inputs.to_patches(video, **options)
    weight = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    (patches * weight).sum().backward()
    smooth = video.detach().clone().requires_grad_()
    original, inputs._round8 = inputs._round8, lambda x: x
    try:
        (inputs.to_patches(smooth, **options)[0] * weight).sum().backward()
    finally:
        inputs._round8 = original
    assert torch.allclose(video.grad, smooth.grad, atol=1e-4 * smooth.grad.abs().max().item())
    assert smooth.grad.abs().min() > 0


def test_half_precision_clips_lose_nothing():
    """A bf16 clip is read in float32: the 8 bits it still holds arrive."""
    video = in_8_bits(1, 3, 4, 56, 84).bfloat16()
    options = dict(clip_fps=16, fps=2, min_pixels=56 * 56, max_pixels=10**6)
    assert torch.equal(inputs.to_patches(video, **options)[0], inputs.to_patches(video.float(), **options)[0])


@pytest.mark.parametrize("bad", [1.001, -0.001, 255.0, float("nan"), float("inf")])
def test_range(bad):
    options = dict(clip_fps=16, fps=2, min_pixels=56 * 56, max_pixels=10**6)
    video = tiny.clips(1)
    video[0, 1, 0, 3, 4] = bad
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        inputs.to_patches(video, **options)
    inputs.to_patches(tiny.clips(1), **options)


def test_only_the_sampled_frames_are_moved():
    """Of 81 frames ten: the rest, which a reward never sees, stay on the host unread."""
    video = torch.full((1, 3, 81, 56, 84), 7.0)
    video[:, :, inputs.sample_frames(81, 16.0)] = 0.5
    values, _ = inputs.to_patches(video, clip_fps=16, fps=2, min_pixels=56 * 56, max_pixels=10**6, device="cpu")
    assert values.isfinite().all()


def test_teacher_videos_are_bytes_until_they_are_where_they_are_used():
    videos = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    data = TeacherVideos(None, ["a"], [], None, {"a": videos})
    part = data.batch(BatchPlan(0, 1, 4, 1), 0, [0])[0]
    assert part.pixels.dtype == torch.uint8
    assert torch.equal(part.teacher("cpu"), torch.stack([videos[i].float() / 255 for i in part.picks]))


def test_tokens():
    tokens = inputs.PromptTokens(tiny.tokenizer(), tiny.TEMPLATE)
    decode = tokens.tokenizer.decode
    text = decode(tokens.prefix)
    assert text == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    suffix = decode(tokens.suffix("a {cat} runs"))
    assert suffix == ("<|vision_end|>\nlook: <|VQ_reward|>\nmove: <|MQ_reward|>  \ntext a {cat} runs\n<|TA_reward|>")
    whole = tokens._ids(text + "<|video_pad|>" * 3 + suffix)
    assert whole == (*tokens.prefix, *[301] * 3, *tokens.suffix("a {cat} runs"))


def test_template(tmp_path):
    with pytest.raises(FileNotFoundError, match="curl -L -o"):
        inputs.read_template(tmp_path)
    (tmp_path / "prompt_template.py").write_text('DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """something else"""\n')
    with pytest.raises(ValueError, match="does not hold the template of the published checkpoint"):
        inputs.read_template(tmp_path)
    (tmp_path / "prompt_template.txt").write_bytes(tiny.TEMPLATE.encode())
    assert inputs.read_template(tmp_path) == tiny.TEMPLATE
    for broken in ("<|VQ_reward|>{text_prompt}<|TA_reward|>", tiny.TEMPLATE + "{text_prompt}"):
        with pytest.raises(ValueError, match="each of"):
            inputs.PromptTokens(tiny.tokenizer(), broken)
    bare = tiny.tokenizer().__class__(tokenizer_object=tiny.Tokenizer(tiny.models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="the tokenizer lacks"):
        inputs.PromptTokens(bare, tiny.TEMPLATE)
