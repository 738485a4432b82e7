"""A GPU that has shapes, dtypes and devices, and no numbers: everything a program asks of CUDA, on a CPU build of PyTorch.

FakeTensorMode gives tensors that claim to be on cuda:0, and guard.cpp gives PyTorch's C++ one CUDA device. A dispatch mode
above counts what a GPU would launch, where the host would wait for it and what the host would copy to it. The launchers of
`kernels/` run; their Triton kernels are noted and not compiled. Tensors that never met the GPU stay real.

Numbers read on the host are made up: 0.5, True, 1, and no rows for nonzero(). So a run takes the path of healthy numbers.
Import this before torch, in a process of its own: the device guard and the hooks are looked up once.

    with fake_cuda() as log: ...
    log.all.launches, log.phases["rollout"].waits
"""

from tests.fake_cuda.guard import MISSING  # noqa: F401

# isort: split
import contextlib
import sys
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.utils._device
from afd_kernels import _launch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from tests.fake_cuda.log import LOG, Log, Tally, place  # noqa: F401
from tests.fake_cuda.runtime import (  # noqa: F401
    CUDA,
    Event,
    Generators,
    Graph,
    Stream,
    capture,
    current_stream,
    drawn,
    on_stream,
)

aten = torch.ops.aten
flop_registry.setdefault(aten._addmm_activation, flop_registry[aten.addmm])  # the activation is in the product
LAUNCHERS: dict[str, object] = {}  # what an operator of this project runs for CUDA tensors
_register = torch.library.impl


def _noting(name, key, function=None, **more):
    if key == "CUDA":
        LAUNCHERS[name] = function
    return _register(name, key, function, **more)


torch.library.impl = _noting
assert "afd_fast.ops" not in sys.modules, "import tests.fake_cuda.device before afd_fast.ops"


# -- what happens to an operator -------------------------------------------------------------------------------

FREE = frozenset(  # views, allocations and questions: no kernel
    "_unsafe_view unsqueeze transpose permute slice select expand unbind detach split t alias as_strided squeeze view empty "
    "new_empty empty_like lift_fresh lift _reshape_alias view_as_complex view_as_real split_with_sizes chunk unfold diagonal "
    "empty_strided new_empty_strided resize_ set_ sym_size sym_stride sym_numel sym_storage_offset is_pinned _pin_memory "
    "record_stream prim_device lift_fresh_copy real imag _conj movedim narrow flatten unflatten device".split()
)
READS = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.equal.default: "equal"}
COPIES = ("_to_copy", "copy_", "_copy_from", "lift_fresh_copy", "clone")


def size_of(x: torch.Tensor) -> int:
    """Bytes of the elements that x has; repeated ones once."""
    return x.element_size() * int(np.prod([n for n, stride in zip(x.shape, x.stride()) if stride], dtype=np.int64))


def made_up(x: torch.Tensor) -> bool | float | int:
    return True if x.dtype == torch.bool else 0.5 if x.is_floating_point() else 1


class Meter(TorchDispatchMode):
    """Counts, and answers what needs numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if kwargs.pop("pin_memory", None):
            return func(*args, **kwargs).pin_memory()
        if not any(isinstance(x, FakeTensor) for x in tensors):
            if torch.device(kwargs.get("device") or "cpu").type == "cpu":
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        on_device = [x for x in tensors if x.is_cuda]
        if func in READS:
            if on_device:
                LOG.wait(READS[func])
            if func is aten.nonzero.default:
                return torch.empty(0, args[0].ndim, dtype=torch.long, device=args[0].device)
            return made_up(args[0]) if func is aten._local_scalar_dense.default else True
        if on_device and func._schema.name in LAUNCHERS:
            with self:  # the launcher's own operators count too
                return LAUNCHERS[func._schema.name](*args)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and on_device:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    LOG.wait("index[mask]")
                if index is not None and not index.is_cuda:
                    self.copied(index, False)
        out = func(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if name in COPIES and tensors:
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            if source.is_cuda and not target.is_cuda:
                LOG.wait("to the host")
                return out
            if target.is_cuda and not source.is_cuda:
                self.copied(source, kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
                return out
        if name not in FREE and (on_device or any(x.is_cuda for x in outs)):
            self.launched(func, name, args, kwargs, tensors, outs, out)
        return out

    def copied(self, source: torch.Tensor, non_blocking: bool) -> None:
        """From the host. A wait unless the memory is pinned and the copy asynchronous; also forbidden in a capture then."""
        at = place()
        if non_blocking and source.untyped_storage()._cdata in _pinned:
            LOG.note("launches", "copy from pinned memory")
            LOG.note("copied", f"pinned {at}", source.nbytes)
            return
        if LOG.capturing:
            raise RuntimeError(f"{at}: a copy from pageable host memory is not permitted when a stream is capturing")
        LOG.note("copies", at)
        LOG.note("copied", at, source.nbytes)

    def launched(self, func, name, args, kwargs, tensors, outs, out) -> None:
        if any(not x.is_cuda and x.ndim for x in tensors):
            LOG.note("faults", f"{name} with a CPU tensor, {place()}")
        if "scaled_dot_product" in name and any(not s and n > 1 for x in tensors for n, s in zip(x.shape, x.stride())):
            LOG.note("faults", f"{name} over a broadcast tensor, {place()}")
        LOG.note("launches", name)
        LOG.note("moved", name, sum(size_of(x) for x in {id(x): x for x in tensors + outs}.values() if x.is_cuda))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            work = int(formula(*args, **kwargs, out_val=out))
            LOG.note("flops", name, work)
            if any(x.is_floating_point() and x.itemsize > 2 for x in tensors):
                LOG.note("wide", name, work)


_pinned: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage gets the address


def _pin(self, device=None):
    """Tensor.pin_memory: a copy that is noted as pinned."""
    if self.untyped_storage()._cdata in _pinned:
        return self
    out = self.clone()
    _pinned[out.untyped_storage()._cdata] = out.untyped_storage()
    return out


def _kernel(self, *args, grid, warmup, **kwargs):
    """In the place of JITFunction.run: a Triton launch, and the bytes of its tensors."""
    name = self.fn.__name__
    given = dict(zip(self.arg_names, args)) | kwargs
    tensors = {key: x for key, x in given.items() if isinstance(x, torch.Tensor)}
    for key, x in tensors.items():
        if not x.is_cuda:
            LOG.note("faults", f"{name} with a CPU tensor, {key}")
    sizes = {id(x): size_of(x) for x in tensors.values()}
    for cache, source in (("K_OUT", "K"), ("V_OUT", "V")):  # whole caches, of which the block's frames are written
        if cache in tensors:
            sizes[id(tensors[cache])] = min(sizes[id(tensors[cache])], size_of(tensors[source]))
    LOG.note("launches", name)
    LOG.note("moved", name, 0 if given.get("GUARD") else sum(sizes.values()))  # GUARD: nothing for grad_output 1


def _read(convert):
    """Tensor.tolist and its like on fake tensors."""

    def read(self, *args, **kwargs):
        if self.is_cuda:
            LOG.wait(convert.__name__)
        return convert(np.full(tuple(self.shape), made_up(self)))

    return read


def tolist(x: np.ndarray):
    return x.tolist()


def numpy(x: np.ndarray):
    return x


def _apply(self, fn, recurse=True):
    """nn.Module._apply, which cannot swap a real parameter for a fake one."""
    for child in self.children():
        child._apply(fn)
    for name, p in self._parameters.items():
        if p is not None:
            with torch.no_grad():
                new = fn(p.data)
            if isinstance(new, FakeTensor) == isinstance(p, FakeTensor):
                p.data = new
            else:
                self._parameters[name] = torch.nn.Parameter(new, p.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else fn(buffer)
    return self


class _Mode(FakeTensorMode):
    avoid_device_init = True  # torch.tensor(..., device="cuda") is then a CPU tensor that moves, as it is in reality


def unreal(x: torch.Tensor) -> FakeTensor:
    """A CPU tensor without numbers, of x's shape: videos too large to compute with."""
    return _mode.from_tensor(x)


_mode = _Mode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def fake_cuda() -> Iterator[Log]:
    """Inside the block torch.cuda is an H100; the log of what happens there."""
    import torch.nn.utils.clip_grad as clip_grad
    import torch.optim.optimizer as optimizer
    from torch.nn.attention import sdpa_kernel  # noqa: F401  # imported with the real functions

    from afd_fast.training import run

    torch.utils._device._device_constructors()  # cached with the real functions, before some are replaced
    LOG.clear()
    Graph.streams.clear()
    properties = types.SimpleNamespace(major=9, minor=0, name="H100", total_memory=80 << 30, multi_processor_count=132)
    cuda = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "init": lambda: None,
        "current_device": lambda: 0, "device_count": lambda: 1, "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device=None: properties, "is_bf16_supported": lambda *a, **k: True,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30), "empty_cache": lambda: None,
        "memory_allocated": lambda *a: 0, "max_memory_allocated": lambda *a: 0, "reset_peak_memory_stats": lambda *a: None,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: LOG.wait("synchronize"),
        "Stream": Stream, "Event": Event, "current_stream": current_stream, "stream": on_stream,
        "device": lambda device: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": capture,
    }  # fmt: skip
    fake = {
        "tolist": _read(tolist), "numpy": _read(numpy), "__array__": _read(numpy), "record_stream": lambda self, stream: None,
        "data_ptr": lambda self: self.untyped_storage()._cdata * 512 + self.storage_offset() * self.element_size(),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:

        def patch(target, **values):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(target, name, value))

        patch(torch.cuda, **cuda)
        patch(FakeTensor, **fake)
        patch(torch.backends.cudnn, is_available=lambda: True, version=lambda: 91002)
        patch(
            torch,
            Generator=Generators,
            **{n: drawn(getattr(torch, n)) for n in ("randn", "rand", "randint", "randperm")},
        )
        patch(
            torch.Tensor, pin_memory=_pin, is_pinned=lambda self, device=None: self.untyped_storage()._cdata in _pinned
        )
        patch(_launch, KNOWN=False)  # Triton has no driver here: every launch is JITFunction.run
        patch(JITFunction, run=_kernel)
        patch(run, profiled=lambda name: LOG.phase(name.removeprefix("afd_fast.")))
        patch(clip_grad, _has_foreach_support=lambda tensors, device: True)  # as for real tensors
        patch(optimizer, _foreach_supported_types=[*optimizer._foreach_supported_types, FakeTensor])
        patch(torch.nn.Module, _apply=_apply)
        stack.enter_context(_mode)
        stack.enter_context(Meter())
        yield LOG
