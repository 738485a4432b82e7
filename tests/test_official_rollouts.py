"""Whole rollouts against numbers recorded from each project's own pipeline (float64, kept as float32):

python -m benchmarks.parity PROJECT CHECKOUT --record tests/golden/rollouts/PROJECT.safetensors
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
    ],
)
def test_another_setting_is_another_video(project, name, changes):
    """Each setting that the comparison is about is seen by it."""
    case = next(case for case in CASES[project] if case.name == name)
    of_rollout = {
        k: v for k, v in changes.items() if k in ("rope", "sink_ema", "guidance", "unipc_steps", "window", "sink")
    }
    if of_rollout:
        changes = {"config": replace(case.config, **of_rollout)}
    assert away(project, case, **changes) > 1e-4
