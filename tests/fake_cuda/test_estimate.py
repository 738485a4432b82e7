"""`afd-fast estimate` against the counter: what kernels move that are no products.

Needs its own process: python -m pytest -p tests.fake_cuda.device tests/fake_cuda
"""

import sys

import pytest

if "tests.fake_cuda.device" not in sys.modules:
    pytest.skip("the process has no fake GPU: -p tests.fake_cuda.device", allow_module_level=True)

import torch

from afd_fast.config import with_overrides
from afd_fast.discriminators.videoalign.model import qwen2_vl_2b
from afd_fast.estimate import formulas, iteration, meters
from afd_fast.sampler import RolloutConfig
from afd_fast.training import runs
from tests.fake_cuda import device
from tests.fake_cuda.count import counted
from tests.fake_cuda.device import fake_cuda

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))
LAYERS, FRAMES = 2, 6


@pytest.fixture(scope="module")
def networks():
    """Two layers of the 1.3B on the meta device, with adapters."""
    found = iteration.networks(with_overrides(runs.afd_table3(), ["student=any.pt", f"student.frames={FRAMES}"]))
    found.family.student.blocks = found.family.student.blocks[:LAYERS]
    return found


def test_student(networks):
    """A rollout, and the second chunk's forward with a gradient and backward."""
    traffic = meters.student_traffic(networks.family, 1)
    with fake_cuda() as log:
        counted("rollout", log, size="1.3b", layers=LAYERS, frames=FRAMES)
        assert traffic.rollout(RolloutConfig()).light == pytest.approx(log.all.light, rel=0.05)
    found = []
    for frames in (3, FRAMES):  # the first chunk alone, and after another
        with fake_cuda() as log:
            counted("update", log, size="1.3b", layers=LAYERS, frames=frames)
            found.append(sum(log.phases[name].light for name in ("forward", "backward")))
    first = traffic.forward + traffic.backward
    assert [first, first + traffic.more] == pytest.approx(found, rel=0.03)


def test_vae(networks):
    stream, latents = networks.decoder.stream(), torch.empty(1, 16, FRAMES, 60, 104, device="meta", dtype=torch.float32)
    with torch.no_grad(), meters.Meter() as meter:
        for part in latents.split(3, 2):
            stream(part)
    with fake_cuda() as log:
        counted("vae", log, size="1.3b", frames=FRAMES)
        assert meter.light == pytest.approx(log.all.light, rel=0.05)


def test_video_reward():
    """The table PASSES: lower its numbers where the counter has become lower."""
    c = qwen2_vl_2b()
    c.get_text_config().num_hidden_layers = c.vision_config.depth = LAYERS
    grid = (5, 24, 42)
    words = 784 + 40  # the counter's template and prompts
    length = grid[0] * grid[1] * grid[2] // 4 + words
    traffic = formulas.reward_traffic(c, 4, (81, 480, 832), grid, length)
    with fake_cuda() as log:
        counted("discriminator", log, size="1.3b", layers=LAYERS, batch=2)
        for name, phase in (("encode", "encode"), ("forward", "loss"), ("backward", "backward")):
            tally = log.phases[phase]  # the counter takes an embedding to read its whole table
            found = tally.light - tally.moved["embedding"]
            assert getattr(traffic, name).light == pytest.approx(found, rel=0.15), name
