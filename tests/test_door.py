"""The discriminator must not win by shortcuts: the same clips through both doors are indistinguishable."""

import numpy as np
import pytest
import torch

from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.students.toy.model import decode_video, encode_video
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.physics import FPS, all_prompts, sample_clips
from afd_fast.video_io import deliver, write_video


def doors(tmp_path, crf, source_crf):
    """128 clips as the teacher's files deliver them and as the student's latents do: ([B, 3, F, H, W], same, prompts)."""
    prompts = all_prompts()
    clips = sample_clips(prompts, np.random.default_rng(0)).float() / 255
    rows = ["prompt,video"]
    for i, (prompt, clip) in enumerate(zip(prompts, clips)):
        large = clip.repeat_interleave(4, -1).repeat_interleave(4, -2)
        write_video(tmp_path / f"{i}.mp4", large, FPS, crf=source_crf or 0, lossless=source_crf is None)
        rows.append(f'"{prompt}",{i}.mp4')
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    folder = FolderTeacher(tmp_path, frames=12, size=(16, 16), fps=FPS)
    teacher = TeacherVideos(folder, prompts, [], crf).clips(prompts, [0] * len(prompts))
    return teacher, deliver(decode_video(encode_video(clips)), crf), prompts


def held_out_accuracy(teacher, student, prompts, iterations=60):
    """Train D on the first half of the prompts, ask it about the second."""
    torch.manual_seed(0)
    model = ToyDiscriminator(width=16, dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.0, 0.99))
    half = len(prompts) // 2
    for _ in range(iterations):
        optimizer.zero_grad()
        model.paired_loss(teacher[:half], student[:half], prompts[:half]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        margin = model.score(teacher[half:], prompts[half:]) - model.score(student[half:], prompts[half:])
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item()


def test_lossless_files_and_latents_are_the_same_bytes(tmp_path):
    teacher, student, prompts = doors(tmp_path, crf=None, source_crf=None)
    assert torch.equal(teacher, student)
    assert held_out_accuracy(teacher, student, prompts, iterations=3) == 0.5


def test_lossy_source_is_told_without_the_codec_and_not_with_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told = held_out_accuracy(*doors(tmp_path / "a", crf=None, source_crf=40))
    hidden = held_out_accuracy(*doors(tmp_path / "b", crf=36, source_crf=16))
    assert told > 0.75, "the test has no power: a codec on one side only must be an easy tell"
    assert 0.3 < hidden < 0.7


@pytest.mark.parametrize("crf", [None, 28])
def test_door_does_not_know_the_side(crf):
    clip = torch.rand(1, 3, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(deliver(clip, crf), deliver(decode_video(encode_video(clip)), crf))
