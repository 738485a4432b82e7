"""Launches past Triton's look-up: with a driver that records instead of a GPU's, they make the calls that Triton would make.

Triton compiles for sm_90 here. Every launch of a launcher is made twice, by `launch` and by `kernel[grid]`, and both must
hand the same arguments to the compiled kernel's launcher: grid, stream, function, hooks and every argument, the same objects.
"""

import inspect
import os
import types
import weakref

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from afd_kernels import _launch, nft, noise, transformer, vae
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

import afd_fast
from afd_fast.ops.nft_operators import Inputs

MODULES = (nft, noise, transformer, vae)
KERNELS = {
    name: k for m in MODULES for name, k in vars(m).items() if isinstance(k, JITFunction) and name.endswith("_kernel")
}


class Driver:
    """Of a machine with two GPUs that does nothing. calls: the arguments of every launch."""

    def __init__(self):
        self.calls, self.device, self.stream, self.loaded = [], 0, 7, 0
        self.utils = types.SimpleNamespace(
            load_binary=self.load, get_device_properties=lambda device: {"max_shared_mem": 232448}
        )

    def load(self, *_):
        self.loaded += 1
        module = (object(), self.loaded, 32, 0)
        return (*module, 1024) if "n_max_threads" in inspect.getsource(CompiledKernel) else module

    def launcher_cls(self, src, metadata):
        return lambda *args: self.calls.append(args)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + 100 * device


def same(a, b):
    """Whether two arguments are equal; a tensor only equals itself. LazyDict: what a profiler's hooks are given."""
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    return a.get() == b.get() if type(a).__name__ == "LazyDict" else a == b


@pytest.fixture
def gpu(monkeypatch):
    """The driver. short: per launch, whether Triton's look-up was left out."""
    gpu = Driver()
    gpu.short = []
    run = JITFunction.run
    looked_up = []

    def counted(self, *args, **kwargs):
        looked_up.append(self)
        return run(self, *args, **kwargs)

    def both(kernel, grid, tensors, numbers, **constants):
        before, past = len(gpu.calls), len(looked_up)
        _launch.launch(kernel, grid, tensors, numbers, **constants)
        gpu.short.append(len(looked_up) == past)
        kernel[grid](*tensors, *numbers, **constants)
        ours, triton_s = gpu.calls[before:]
        assert len(ours) == len(triton_s)
        for a, b in zip(ours, triton_s):
            assert a is b or same(a, b)

    def clear():
        _launch._found.clear()
        for kernel in KERNELS.values():
            kernel.device_caches.clear()

    monkeypatch.setattr(JITFunction, "run", counted)
    for module in MODULES:
        monkeypatch.setattr(module, "launch", both)
    gpu.launch = both
    clear()
    name = "_active" if hasattr(driver, "_active") else "active"  # not set_active: without a GPU nothing takes it back
    monkeypatch.setattr(driver, name, gpu)
    yield gpu
    clear()
    if hasattr(triton.compiler.compiler, "max_shared_mem"):
        triton.compiler.compiler.max_shared_mem.cache_clear()


def tensor(*shape, dtype=torch.float32, shift=0):
    """Zeros whose address is `shift` elements past a multiple of 64."""
    return torch.zeros(shift + torch.Size(shape).numel(), dtype=dtype)[shift:].view(shape)


def rms_norm(batch=1, length=3, width=16, dtype=torch.float32, shift=0, weight_shift=0, official=False, x=None):
    x = tensor(batch, length, width, dtype=dtype, shift=shift) if x is None else x
    transformer.rms_norm(x, tensor(width, shift=weight_shift), 1e-6, official)


def nft_loss(seed=3):
    v, r = tensor(2, 24), tensor(2)
    i = Inputs(
        v=v, x0=v, r=r, t=tensor(2, 1), noise=None, seed=seed, x_t=None, v_old=None, v_ref=v, sigma=None, sample_mask=None,
        ref_mask=None, element_mask=None, each=None, policy_weight=None, prior_weight=None, cu_seqlens=None, inner=24,
        recipe=afd_fast.nft_recipe("afd").key, stats=False,
    )  # fmt: skip
    nft.nft_loss(*i)


def transformers():
    x, w, c = tensor(1, 4, 16), tensor(16), tensor(4, 4)
    cache = tensor(1, 8, 2, 8)
    transformer.residual_norm(x, x, None, w, w, None, None, 1e-6, False)
    transformer.residual_norm_backward(x, None, x, None, w, None, 1e-6, False)
    transformer.rms_norm(x, w, 1e-6, False)
    transformer.rms_norm_backward(x, x, w, 1e-6)
    transformer.qk_norm_rope_write(x, x, x, w, w, c, c, cache, cache, 4, 1, 0, 0, 1e-6, False)
    transformer.qk_norm_rope_backward(x, x, x.view(1, 4, 2, 8), x.view(1, 4, 2, 8), w, w, c, c, 1e-6)


def others():
    noise.forward_noise(tensor(2, 24), tensor(2, 1), tensor(2, 24), None, 24)
    vae.norm_silu(tensor(1, 4, 1, 2, 2), tensor(4), None)


@pytest.mark.parametrize("call,kernels", [(nft_loss, 3), (transformers, 6), (others, 2)])
def test_the_second_launch_is_short_and_the_same(gpu, call, kernels):
    call()
    assert gpu.short == [False] * kernels == [False] * len(gpu.calls[::2])
    call()  # tensors of its own
    assert gpu.short[kernels:] == [True] * kernels
    assert not any(a is b for a in gpu.calls[0] for b in gpu.calls[-1] if isinstance(a, torch.Tensor))


def test_the_battery_has_every_kernel():
    assert len(KERNELS) == 3 + 6 + 2


def test_another_seed_is_the_same_kernel(gpu):
    for call in (
        lambda seed: nft_loss(seed),
        lambda seed: noise.forward_noise(tensor(2, 24), tensor(2, 1), None, seed, 24),
    ):
        call(3)
        for seed in (1, 16, 2**62 + 1):
            gpu.calls.clear()
            call(seed)
            assert gpu.short[-1] and seed in [x for x in gpu.calls[0] if isinstance(x, int)]
    assert not any(gpu.short[:3]) and sum(not short for short in gpu.short) == 3 + 1
    for kernel in KERNELS.values():
        if "seed" in kernel.arg_names:
            seed = kernel.arg_names.index("seed")
            assert (
                seed == sum(name.endswith("_ptr") for name in kernel.arg_names) and "seed" in kernel.do_not_specialize
            )


def test_what_triton_compiles_by_is_told_apart(gpu, monkeypatch):
    """Each launch, then each again in the same order: a mix-up would call another one's compiled kernel."""
    far = torch.zeros(16).as_strided((1, 1, 16), (2**31, 16, 1))
    near = torch.zeros(16).as_strided((1, 1, 16), (2**31 - 1, 16, 1))
    launches = [
        {}, dict(shift=1), dict(weight_shift=2), dict(shift=4), dict(dtype=torch.float16), dict(dtype=torch.bfloat16),
        dict(official=True), dict(width=15), dict(width=1), dict(length=1), dict(x=far), dict(x=near), dict(length=32),
        dict(batch=2),
    ]  # fmt: skip
    for short in (False, True):
        for options in launches:
            rms_norm(**options)
            assert gpu.short[-1] == (short or options == dict(shift=4))  # 16 bytes: as if it were not there
    functions = [call[4] for call in gpu.calls[::2]]
    assert functions[: len(launches)] == functions[len(launches) :]
    assert len(set(functions)) == 10  # shift=4, length=1, length=32 and batch=2 need no kernel of their own
    if _launch.knobs is None:
        monkeypatch.setenv("TRITON_DEBUG", "1")
    else:
        monkeypatch.setattr(_launch.knobs.runtime, "debug", True)
    rms_norm()
    assert not gpu.short[-1] and gpu.calls[-1][4] not in functions


@triton.jit
def _zero(x_ptr, n):
    tl.store(x_ptr + n, 0.0)


@triton.jit
def _one(x_ptr, n):
    tl.store(x_ptr + n, 1.0)


def test_kernels_that_take_the_same_are_told_apart(gpu):
    x = tensor(16)
    for kernel in (_zero, _one, _zero, _one):
        gpu.launch(kernel, (1,), (x,), (5,))
    zero, one, *again = [call[4] for call in gpu.calls[::2]]
    assert zero != one and again == [zero, one] and gpu.short == [False, False, True, True]


def test_device_and_stream_are_the_current_ones(gpu):
    for gpu.device, gpu.stream, short in ((0, 7, False), (0, 9, True), (1, 7, False), (1, 9, True), (0, 0, True)):
        rms_norm()
        assert gpu.short[-1] == short and gpu.calls[-1][3] == gpu.stream + 100 * gpu.device
    assert len({call[4] for call in gpu.calls}) == 2  # a kernel is loaded once per device


def test_hooks_run(gpu):
    """Those before a launch are Triton's to call; those around it go to the launcher."""
    seen = []
    rms_norm()
    transformer.rms_norm_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(kwargs["BLOCK"]))
    try:
        rms_norm()
    finally:
        transformer.rms_norm_kernel.pre_run_hooks.clear()
    assert seen == [16, 16] and gpu.short == [False, False]


def test_no_tensor_is_kept_and_few_launches(gpu, monkeypatch):
    x = tensor(1, 3, 16)
    dead = weakref.ref(x)
    rms_norm(x=x)
    rms_norm(x=x)
    gpu.calls.clear()
    del x
    assert dead() is None
    monkeypatch.setattr(_launch, "MOST", 3)
    for length in range(2, 12):
        rms_norm(length=length)
    assert len(_launch._found) <= 3 and gpu.short[-1] is False
    rms_norm(length=11)
    assert gpu.short[-1] is True


def test_a_triton_that_was_not_tried_looks_up_every_launch(gpu, monkeypatch):
    monkeypatch.setattr(_launch, "KNOWN", False)
    rms_norm()
    rms_norm()
    assert gpu.short == [False, False] and not _launch._found
