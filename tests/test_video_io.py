import io

import numpy as np
import pytest
import torch

from afd_fast.errors import ConfigError, VideoError
from afd_fast.teachers.cache import CachedTeacher
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.physics import PhysicsTeacher, split_prompts
from afd_fast.video_io import deliver, read_video, to_uint8, write_video


def noise_video(frames=12, height=16, width=16, seed=0):
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def test_lossless_round_trip_is_exact(tmp_path):
    video = noise_video()
    write_video(tmp_path / "a.mp4", video, 10, lossless=True)
    assert torch.equal(to_uint8(read_video(tmp_path / "a.mp4")), to_uint8(video))


def test_lossy_round_trip_is_close(tmp_path):
    ramp = torch.linspace(0, 1, 64).expand(3, 12, 64, 64).contiguous()
    write_video(tmp_path / "a.mp4", ramp, 24, crf=18)
    assert (read_video(tmp_path / "a.mp4") - ramp).abs().mean() < 0.02


@pytest.mark.parametrize("height,width", [(48, 32), (80, 48), (48, 80), (64, 96)])
def test_the_same_pixels_give_the_same_bytes(height, width):
    """x264's macroblock tree gave up to ten encodings of one video, by what memory happened to hold."""
    small = torch.rand(1, 3, 9, 6, 8, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(small, (9, height, width), mode="trilinear")[0]
    files = set()
    for size in range(40):
        junk = [torch.randn(1000 + 20_000 * size) for _ in range(2)]  # memory that the encoder gets next is not zero
        file = io.BytesIO()
        write_video(file, video, 16)
        files.add(file.getvalue())
        del junk
    assert len(files) == 1


def test_fps_resampling_takes_the_frame_shown_at_that_time(tmp_path):
    """Frame i of a 30 fps file is i / 60 bright; at 10 fps every third one must come out."""
    video = (torch.arange(60.0) / 60).view(1, 60, 1, 1).expand(3, 60, 16, 16)
    write_video(tmp_path / "a.mp4", video, 30, lossless=True)
    got = read_video(tmp_path / "a.mp4", fps=10, frames=20)
    assert torch.allclose(got[0, :, 0, 0], to_uint8(video[0, ::3, 0, 0]).float() / 255)
    slower_than_file = read_video(tmp_path / "a.mp4", fps=60, frames=120)
    assert torch.allclose(slower_than_file[0, ::2, 0, 0], to_uint8(video[0, :, 0, 0]).float() / 255)


def test_resize_crops_to_the_centre(tmp_path):
    video = torch.zeros(3, 4, 32, 64)
    video[..., 16:48] = 1.0  # the middle square is white
    write_video(tmp_path / "a.mp4", video, 10, lossless=True)
    assert torch.equal(read_video(tmp_path / "a.mp4", size=(16, 16)), torch.ones(3, 4, 16, 16))


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50])
def test_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        read_video(tmp_path / "bad.mp4")


def test_missing_and_short_files_are_named(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        read_video(tmp_path / "gone.mp4")
    write_video(tmp_path / "short.mp4", noise_video(5), 10, lossless=True)
    with pytest.raises(VideoError, match=r"short\.mp4: 5 frames, 12 are needed"):
        read_video(tmp_path / "short.mp4", frames=12)


def test_odd_size_is_refused_for_lossy(tmp_path):
    with pytest.raises(VideoError, match="even sizes"):
        write_video(tmp_path / "a.mp4", noise_video(height=15), 10)


def test_folder_teacher_leaves_bad_files_out(tmp_path):
    for name, frames in (("good", 24), ("other", 24), ("short", 3)):
        write_video(tmp_path / f"{name}.mp4", noise_video(frames, 32, 48), 20, lossless=True)
    (tmp_path / "broken.mp4").write_bytes(b"nope")
    (tmp_path / "manifest.csv").write_text(
        "prompt,video\n" + "\n".join(f"a {n} clip,{n}.mp4" for n in ("good", "other", "short", "broken", "absent"))
    )
    teacher = FolderTeacher(tmp_path, frames=12, size=(16, 16), fps=10)
    assert teacher.prompts == ["a good clip", "a other clip"]
    assert teacher("a good clip", 7).shape == (3, 12, 16, 16)
    assert sorted(p.split(":")[0].split("/")[-1] for p in teacher.problems) == ["absent.mp4", "broken.mp4", "short.mp4"]


def test_empty_manifest_and_missing_manifest(tmp_path):
    with pytest.raises(ConfigError, match="neither manifest"):
        FolderTeacher(tmp_path, frames=12, size=(16, 16), fps=10)
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(ConfigError, match="manifest is empty"):
        FolderTeacher(tmp_path, frames=12, size=(16, 16), fps=10)


class CountingTeacher(PhysicsTeacher):
    calls = 0

    def __call__(self, prompt, seed):
        self.calls += 1
        return super().__call__(prompt, seed)


def test_cache_asks_once_and_repairs(tmp_path):
    teacher = CountingTeacher()
    prompt = split_prompts()[0][0]
    cached = CachedTeacher(teacher, tmp_path)
    first = cached(prompt, 3)
    assert torch.equal(first, teacher(prompt, 3))
    assert torch.equal(CachedTeacher(teacher, tmp_path)(prompt, 3), first) and teacher.calls == 2
    cached(prompt, 4)
    assert teacher.calls == 3
    cached.path(prompt, 3).write_bytes(b"damaged")
    assert torch.equal(cached(prompt, 3), first) and teacher.calls == 4


def test_deliver_is_idempotent_and_quantises():
    video = noise_video()[None]
    once = deliver(video)
    assert torch.equal(deliver(once), once)
    assert np.allclose((once * 255).numpy(), (once * 255).round().numpy())
    assert deliver(video * 3 - 1).min() == 0
