"""Every path of the library on a GPU without numbers: nothing on the wrong device, no wait, copy or launch beyond
`budgets.py`.

Needs its own process: python -m pytest -p tests.fake_cuda.device tests/fake_cuda
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

if "tests.fake_cuda.device" not in sys.modules:
    pytest.skip("the process has no fake GPU: -p tests.fake_cuda.device", allow_module_level=True)

import torch

from afd_fast import nft_loss
from afd_fast.generate import GenerateOptions, generate, jobs
from afd_fast.ops.attention import attention
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.wan.family import load_networks
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.training.evaluate import Evaluator
from tests.fake_cuda import device, scenes
from tests.fake_cuda.budgets import COPIES, EVALUATION, GENERATION, ITERATIONS, LAUNCHES, WAITS
from tests.fake_cuda.count import counted
from tests.fake_cuda.device import CUDA, Graph, Log, Stream, fake_cuda

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))

SEEN: set[str] = set()  # places that waited or copied in this process


def check(log: Log, more: dict[str, int] | None = None) -> None:
    """No fault; waits and copies are in the budget; no random number comes twice. more: waits and copies of this part."""
    assert not log.all.faults
    SEEN.update(log.all.waits, log.all.copies)
    allowed = WAITS | COPIES | (more or {})
    over = {at: n for at, n in (log.all.waits | log.all.copies).items() if n > allowed.get(at, 0)}
    assert not over, "waits or copies beyond the budget"
    repeated = [draw for draw, n in log.all.draws.items() if n > 1]
    assert not repeated, f"the same numbers of a generator (seed, offset) were drawn twice: {repeated}"


def within(name: str, found: int, budget: int) -> None:
    """The launches of a part or phase."""
    assert found <= budget, f"{name}: {found} launches, the budget is {budget}"
    assert found > 0.9 * budget, f"{name}: {found} launches: lower the budget, {budget}"


@pytest.mark.parametrize("part", LAUNCHES)
def test_parts(part):
    with fake_cuda() as log:
        counted(part, log)
        check(log)
    for phase, budget in LAUNCHES[part].items():
        within(f"{part}, {phase}", (log.all if phase == "all" else log.phases[phase]).launches.total(), budget)


FEW = "rollout.steps=1000,500"
RUNS = {  # size, keys, options of `scenes.new`
    "demo": ("demo", [FEW], {"name": "demo"}),
    "table3": ("tiny", [], {}),
    "table3, two layers of 1.3B": ("1.3b", [FEW, "student.frames=6"], {"layers": 2}),
    "sft": ("tiny", ["method=sft"], {}),
    "gan": ("tiny", ["method=gan", FEW], {}),
    "dmd": ("tiny", ["method=dmd", FEW], {}),
    "rejection": ("tiny", ["method=rejection", FEW], {}),
    "stream": (
        "tiny",
        [FEW, "stream.frames=18", "rollout.window=6", "update.v_old=ema", "discriminator.r1=0.1"],
        {},
    ),
    "full weights of 1.3B": ("1.3b", [FEW, "student.frames=6", "student.lora_rank=0"], {"layers": 1}),
    "graphs": ("tiny", [FEW, "rollout.graphs=true"], {}),
    "VideoReward": ("tiny", [FEW], {"reward": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_iterations(name):
    """A whole iteration with every tensor on the device; of the recorded graphs, the replays of the third one."""
    size, keys, options = RUNS[name]
    with fake_cuda() as log:
        run, data = scenes.new(size, *keys, **options)
        for _ in range(3 if name == "graphs" else 1):
            log.clear()
            metrics = scenes.iteration(run, data)
        check(log)
        assert metrics["grad_norm"] and run.state.step
        assert size != "1.3b" or log.all.wide.total() < 0.05 * log.all.flops.total()  # tensor cores
        assert name != "stream" or metrics["place"] > 0  # there is a prefix
    within(name, log.all.launches.total(), ITERATIONS[name])


def test_evaluation():
    """Held-out clips are rolled out, decoded and judged; only their 8-bit pixels come to the host."""
    with fake_cuda() as log:
        run, data = scenes.new("tiny", "evaluation.batch=1", "evaluation.rollouts=2")
        data.teacher = SimpleNamespace(judge="clips", familiar=lambda prompts: [])
        evaluator = Evaluator(run, data, lambda items, description: items)
        judged, encode = [], run.discriminator.encode
        run.discriminator.encode = lambda videos: judged.append(len(videos)) or encode(videos)
        log.clear()
        row = evaluator.evaluate()
        assert set(judged) == {1}  # evaluation.batch at a time
        check(log, EVALUATION)
    assert "held_out_accuracy" in row and "dynamic" in row


@pytest.mark.parametrize(
    "config", [RolloutConfig(), RolloutConfig(graphs=True), RolloutConfig.preset("krea")], ids=["", "graphs", "krea"]
)
def test_generate(config):
    """Prompts to pixels, the VAE on a stream of its own. The tiny networks are on the GPU of the machine."""
    written = []
    with fake_cuda() as log:
        networks = load_networks("tiny")
        log.clear()
        assert networks.student.device == next(networks.vae.vae.parameters()).device == torch.device(CUDA)
        options = GenerateOptions(9, 6, 10, batch=2)
        todo = jobs(["a red ball", "a blue ball", "a cat"])  # the last batch is a smaller one
        write = lambda path, video, fps: written.append(tuple(video.shape))
        stats = generate(networks, todo, Path(tempfile.gettempdir()), options, config, write=write)
        check(log, GENERATION)
    assert written == [(3, 33, 48, 80)] * 3 and stats.overlapped and "DiT only" not in stats.line()
    assert networks.student.config.num_layers == 2 and load_networks("tiny", device="cpu").student.device.type == "cpu"


def test_graphs_record_again_without_a_dead_pool():
    """After a weight has moved, for other prompts and for another size; on one stream, and replayed otherwise."""
    with fake_cuda() as log:
        model = scenes.student()
        (text, x), (one, y) = scenes.text_and_noise(model, batch=2), scenes.text_and_noise(model, batch=1)
        graphed, before = GraphedStudent(model), Stream.made
        for _ in range(2):  # a forward is recorded when it comes the second time
            rollout(graphed, text, x)
        log.clear()
        rollout(graphed, text, x)
        assert (
            log.all.launches["graph replay"] == 14
            and not log.all.launches["residual_norm_kernel"]
            and not log.all.waits
        )
        weight = model.blocks[0].ffn[0].weight
        weight.data = weight.data.clone()
        for prompts, noise in ((text, x), (one, x), (one, y), (one, y[:, :, :6])):
            recorded = Graph.captures
            for _ in range(2):
                rollout(graphed, prompts, noise)
            assert Graph.captures > recorded
        check(log)
    assert len(Graph.streams) == 1 and None not in Graph.streams and Stream.made - before == 1


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_the_loss_waits_only_when_it_is_asked_to_check(recipe):
    with fake_cuda() as log:
        x = lambda: torch.randn(2, 16, 9, 6, 10, device=CUDA, dtype=torch.bfloat16)
        v, r, t = x().requires_grad_(), torch.rand(2, device=CUDA), torch.rand(2, device=CUDA)
        given = {"v_old": x(), "v_ref": x(), "recipe": recipe}
        log.clear()
        nft_loss(v, x(), r, t, noise=x(), **given).backward()
        assert not log.all.waits and not log.all.copies and not log.all.faults
        nft_loss(v, x(), r, t, noise=x(), check_nan=True, **given)
        assert log.all.waits


def test_one_prompt_for_a_batch():
    """A stream's continuations share a prompt: cuDNN gets its keys and values without a stride of 0."""
    with fake_cuda() as log, torch.no_grad():
        model = scenes.student()
        (text, _), (_, x) = scenes.text_and_noise(model, batch=1), scenes.text_and_noise(model, batch=2, frames=3)
        log.clear()
        rollout(model, text, x)
        check(log)
    assert log.all.launches["_scaled_dot_product_cudnn_attention"] == 16 and not log.all.launches["repeat"]


def test_the_fake_gpu_notices():
    """Every fault that the tests above would miss if it went unseen."""
    with fake_cuda() as log:
        x, host = torch.randn(4, 4, device=CUDA), torch.randn(4, 4)
        with pytest.raises(RuntimeError, match="device"):
            x + host
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(3, generator=torch.Generator(), device=CUDA)
        assert x.is_cuda and not host.is_cuda and isinstance(torch.Generator(CUDA), torch.Generator)
        log.clear()
        assert (x.sum().item(), bool(x.isnan().any()), x.cpu().device.type) == (0.5, True, "cpu")
        x.nonzero()
        assert log.all.waits.total() == 4 and not log.all.copies
        host.to(CUDA), torch.tensor([1.0], device=CUDA), x[torch.tensor([0, 1])]
        assert log.all.copies.total() == 3 and log.all.copied.total() == 64 + 4 + 16
        host.pin_memory().to(CUDA, non_blocking=True)
        assert log.all.copies.total() == 3 and log.all.copied.total() == 84 + 64
        log.clear()
        torch.nn.functional.linear(x, x), x[:2].T, torch.empty_like(x)
        assert log.all.launches == {"mm": 1} and log.all.flops == {"mm": 128} and not log.all.light
        q = torch.randn(2, 2, 8, 16, device=CUDA, dtype=torch.bfloat16)
        attention(q, q[:1].expand(2, -1, -1, -1), q[:1].expand(2, -1, -1, -1), backend="cudnn")
        assert [at for at in log.all.faults if "broadcast" in at]
        a, b = (torch.Generator(CUDA).manual_seed(1) for _ in range(2))
        torch.randn(3, generator=a, device=CUDA), torch.randn(3, generator=a, device=CUDA)
        assert max(log.all.draws.values()) == 1
        torch.randn(3, generator=b, device=CUDA)
        assert max(log.all.draws.values()) == 2
        for forbidden in (x.sum().item, lambda: host.to(CUDA), torch.cuda.synchronize):
            with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                forbidden()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x + x
        pool = graph.pool()
        del graph
        with pytest.raises(RuntimeError, match="destroyed"), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
            x + x
    assert not torch.cuda.is_available()


def test_no_place_is_allowed_for_nothing(request):
    if len(request.session.items) < len(LAUNCHES) + len(RUNS) + 7:
        pytest.skip("needs the whole file")
    unused = (WAITS | COPIES | EVALUATION | GENERATION).keys() - SEEN
    assert not unused, "take these out of the budget"
