"""GraphedStudent without a GPU: a recorder that does on the CPU what a CUDA graph does, the same operators on the
same memory, so that whatever was not copied into kept tensors gives stale numbers."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afd_fast.errors import ConfigError
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.wan.family import LORA_TARGETS
from afd_fast.students.wan.graphs import GraphedStudent


def storages(tree):
    return {a.untyped_storage().data_ptr() for a in tree_leaves(tree) if isinstance(a, torch.Tensor)}


class Recorder:
    class Mode(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not storages(out) & storages((args, kwargs)):  # views and writes in place come out of the replay itself
                self.calls.append((func, args, kwargs or {}, out))
            elif func._schema.is_mutable:
                self.calls.append((func, args, kwargs or {}, None))
            return out

    recorded = replayed = 0

    def record(self, function):
        function()
        with self.Mode() as mode:
            out = function()
        self.recorded += 1
        for tensor in tree_leaves([c[3] for c in mode.calls]):  # recording computes nothing
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))

        def replay():
            self.replayed += 1
            for func, args, kwargs, old in mode.calls:
                new = func(*args, **kwargs)
                for target, source in zip(tree_leaves(old), tree_leaves(new)):
                    if isinstance(target, torch.Tensor):
                        target.copy_(source)

        return out, replay


@pytest.fixture
def student():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).double()


def inputs(student, seed, batch=2, frames=9):
    g = torch.Generator().manual_seed(seed)
    noise, draws = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((batch, 16, frames, 4, 6), (9, batch, 16, 3, 4, 6))
    )
    with torch.no_grad():
        return student.encode_text(torch.randn(batch, 12, 24, generator=g, dtype=torch.float64)), noise, draws


@pytest.mark.parametrize("config", [RolloutConfig(), RolloutConfig(window=6), RolloutConfig(window=7, sink=1)], ids=str)
def test_replays_equal_the_model(student, config):
    recorder = Recorder()
    graphed = GraphedStudent(student, recorder=recorder)
    for seed in range(3):  # other prompts and noise through the same recordings
        text, noise, draws = inputs(student, seed)
        expected = rollout(student, text, noise, config, renoise=draws)
        assert (rollout(graphed, text, noise, config, renoise=draws) - expected).abs().max() < 1e-13
    assert recorder.recorded == 14 and recorder.replayed == 2 * 14


def test_weights_updated_in_place_are_seen_and_moved_ones_recorded_again(student):
    recorder = Recorder()
    graphed = GraphedStudent(student, recorder=recorder)
    text, noise, draws = inputs(student, 0)
    for _ in range(2):  # what comes once is not recorded
        rollout(graphed, text, noise, renoise=draws)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.01)
    expected = rollout(student, text, noise, renoise=draws)
    assert (rollout(graphed, text, noise, renoise=draws) - expected).abs().max() < 1e-13 and recorder.recorded == 14
    student.blocks[0].ffn[0].weight.data = student.blocks[0].ffn[0].weight.data * 1.1
    expected = rollout(student, text, noise, renoise=draws)
    for count in (14, 28):
        assert (rollout(graphed, text, noise, renoise=draws) - expected).abs().max() < 1e-13
        assert recorder.recorded == count


def test_another_shape_or_batch(student):
    recorder = Recorder()
    graphed = GraphedStudent(student, recorder=recorder)
    for batch, frames in ((2, 9), (1, 6), (2, 9)):
        text, noise, draws = inputs(student, batch, batch, frames)
        expected = rollout(student, text, noise, renoise=draws)
        for _ in range(2):
            assert (rollout(graphed, text, noise, renoise=draws) - expected).abs().max() < 1e-13
    expected = rollout(student, text[:1], noise, renoise=draws)
    for one in (text[:1], text[:1]):
        assert (rollout(graphed, one, noise, renoise=draws) - expected).abs().max() < 1e-13
    assert recorder.recorded == 14 + 9 + 14 + 14


def test_other_calls_run_the_model(student):
    recorder = Recorder()
    graphed = GraphedStudent(student, recorder=recorder, max_graphs=3)
    text, noise, draws = inputs(student, 0)
    for options in ({"fuse_cache_pass": True}, {}, {}):
        expected = rollout(student, text, noise, RolloutConfig(**options), renoise=draws)
        assert (rollout(graphed, text, noise, RolloutConfig(**options), renoise=draws) - expected).abs().max() < 1e-12
    assert recorder.recorded == 3  # the rest ran as it is
    out = rollout(graphed, text, noise, renoise=draws, grad_last_step=True)
    assert out.requires_grad and graphed.config is student.config


def test_the_cache_is_still_checked(student):
    graphed = GraphedStudent(student, recorder=Recorder())
    text, noise, draws = inputs(student, 0)
    for _ in range(2):
        rollout(graphed, text, noise, renoise=draws)
    cache, t = graphed.new_cache(2, 9, 4, 6), graphed.timestep(1000.0, 2, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="earlier chunks"):
        graphed(noise[:, :, 3:6], t, text, cache=cache, start_frame=3)


def test_the_rollouts_option_records_once_also_with_merged_adapters_and_optimiser_steps(student, monkeypatch):
    """rollout.graphs: LoRA is merged in place, so that the recordings see the new weights and stay valid."""
    recorder = Recorder()
    monkeypatch.setattr("afd_fast.students.wan.graphs.CudaRecorder", lambda: recorder)
    add_lora(student, 2, list(LORA_TARGETS))
    adapters = list(trainable(student).values())
    optimizer = torch.optim.SGD(adapters, 1.0)
    config, seen = RolloutConfig(graphs=True), []
    for _ in range(3):
        text, noise, draws = inputs(student, 0)
        expected = rollout(student, text, noise, renoise=draws)
        replayed = rollout(student, text, noise, config, renoise=draws)
        assert (replayed - expected).abs().max() < 1e-13
        seen.append(replayed)
        for p in adapters:
            p.grad = torch.full_like(p, 0.05)
        optimizer.step()
    assert recorder.recorded == 14 and recorder.replayed == 2 * 14
    assert (seen[0] - seen[1]).abs().max() > 1e-6 < (seen[1] - seen[2]).abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_graphs_without_a_cuda_device_are_refused_before_the_rollout(student):
    text, noise, _ = inputs(student, 0)
    with pytest.raises(ConfigError, match="CUDA graphs need a CUDA device.* leave out graphs"):
        stream(student, text, noise, RolloutConfig(graphs=True))


def test_a_copy_of_the_student_has_no_recordings(student, monkeypatch):
    """Recordings read the weights that they were made with; a machine without a GPU can copy and unpickle."""
    with monkeypatch.context() as patched:
        patched.setattr("afd_fast.students.wan.graphs.CudaRecorder", Recorder)
        graphed = student.graphed()
    graphed._graphs["key"] = object()
    for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert copied.graphed().model is copied and not copied.graphed()._graphs
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), student.parameters()))
    graphed._graphs.clear()
