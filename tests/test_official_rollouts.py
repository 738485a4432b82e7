"""Whole rollouts against numbers recorded from each project's own pipeline (float64, kept as float32):

python -m benchmarks.parity PROJECT CHECKOUT --record tests/golden/rollouts/PROJECT.safetensors
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from afd_fast.rollout import _Sampler
from benchmarks.checkouts import Pixels
from benchmarks.parity import CASES, ours, prepared

GOLDEN = {path.stem: load_file(path) for path in sorted((Path(__file__).parent / "golden" / "rollouts").glob("*"))}
RECORDED = [(project, case) for project in GOLDEN for case in CASES[project]]


def away(project, case, **changes):
    """The largest difference of our last chunk from theirs, relative; changes: of the case, to something else than theirs."""
    theirs = GOLDEN[project][case.name]
    with torch.no_grad():
        mine = ours(replace(case, **changes), prepared(case, torch.float32))[:, :, -theirs.shape[2] :]
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("project, case", RECORDED, ids=lambda x: x if isinstance(x, str) else x.name.replace(" ", "_"))
def test_rollouts_are_the_projects(project, case):
    assert away(project, case) < 1e-5


@pytest.mark.parametrize(
    "project, name, changes",
    [
        ("longlive", "infinite", {"rope": "absolute"}),
        ("longlive", "prompt switches after it has rolled", {"recache": False}),
        ("longlive", "prompt switches after it has rolled", {"recache": "sink"}),
        ("longlive", "infinite, sink rewritten", {"recache": True}),
        ("longlive", "prompt switches after it has rolled", {"switches": (21, 24)}),
        ("reward_forcing", "window 9, sink 3, averaged", {"sink_ema": None}),
        ("infinity_rope", "window 12, sink 1", {"rope": "absolute"}),
        ("infinity_rope", "window 6, sink 1, scene cut", {"cut": False}),
        ("infinity_rope", "window 6, sink 1, after a scene cut", {"cut": False}),
        ("causal_forcing", "AR diffusion", {"guidance": 2.9}),
        ("longlive2", "UniPC, window 32, sink 8", {"sink": 0}),
        ("longlive2", "UniPC, window 32, sink 8", {"window": 24}),
        ("longlive2", "UniPC, window 32, sink 8", {"unipc_steps": 5}),
        ("causal_forcing", "AR diffusion", {"unipc_steps": 19}),
        ("fastvideo", "two experts, window 6, sink 1", {"sink": 0}),
        ("causvid", "three steps", {"steps": (1000, 757, 500)}),
        ("causvid", "four steps", {"warp": False}),
        ("streamdiffusionv2", "text to video, until its cache is full", {"cache_pass": True}),
        ("streamdiffusionv2", "text to video, until its cache is full", {"zero_step": False}),
        ("streamdiffusionv2", "video to video, until its cache is full", {"cache_pass": True}),
        ("krea", "its server", {"recompute": False}),
        ("krea", "its server", {"zero_step": False}),
        ("krea", "its server", {"window": 9}),
        ("krea", "its server", {"sink": 1}),
        ("krea", "context of 6, first frame kept", {"sink": 0}),
        ("krea", "context of 6, another prompt", {"switches": (9,)}),
    ],
)
def test_another_setting_is_another_video(project, name, changes):
    """Each setting that the comparison is about is seen by it."""
    case = next(case for case in CASES[project] if case.name == name)
    if hasattr(case.config, next(iter(changes))):
        changes = {"config": replace(case.config, **changes)}
    assert away(project, case, **changes) > 1e-4


def test_kreas_context_is_block_causal_and_its_first_frame_is_encoded_anew(monkeypatch):
    """The numbers see the mask, and whose latent comes first: not that of the frame as it was made."""
    of_three, of_six = (
        next(case for case in CASES["krea"] if case.name == name) for name in ("its server", "context of 6")
    )
    with monkeypatch.context() as patch:
        patch.setattr(Pixels, "first_frame", lambda self, latents: latents[:, :, :1])
        assert away("krea", of_three) > 1e-4 and away("krea", of_six) > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(_Sampler, "recompute", in_one_block)
        assert away("krea", of_three) < 1e-5 and away("krea", of_six) > 1e-4


def in_one_block(sampler, past):
    """`_Sampler.recompute` without the mask."""
    length = 0 if past is None else past.shape[2]
    sampler.start(past, [(0, length)])
    return length
