"""Triton's interpreter, mended, and a sanitizer (helper; TRITON_INTERPRET=1 before triton is imported).

As shipped (3.5-3.7) the interpreter truncates bfloat16 instead of rounding, adds bfloat16 as integers, rounds tl.fma
twice, refuses inline assembly, and sees neither a race nor an access outside a tensor. `install` rounds once, makes
bfloat16 arithmetic an error and runs the instructions of `PTX`; `sanitize` watches:
    with sanitize() as report: kernel[grid](...)
    report.check(read_once=["x_ptr"], written_once=["out_ptr"])
"""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _round_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32 with one rounding: the float64 sum rounded to odd keeps what the last rounding needs."""
    product, z = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    even = total.view(np.int64) & 1 == 0
    away = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(np.isfinite(error) & (error != 0) & even, away, total).astype(np.float32)


PTX = {"mul.wide.u32 $0, $1, $2;": lambda a, b: a.astype(np.uint64) * b.astype(np.uint64)}


def install() -> None:
    """Mend the interpreter of this process; once."""
    if getattr(interpreter, "_mended", False):
        return
    interpreter._mended = True
    convert, binary = interpreter._convert_float, interpreter.InterpreterBuilder.binary_op
    reduce, patch = interpreter.ReduceScanOpInterface.apply, interpreter._patch_lang_tensor
    arithmetic = {
        np.add,
        np.subtract,
        np.multiply,
        np.divide,
        np.minimum,
        np.maximum,
        np.less,
        np.less_equal,
        np.greater,
    }

    def convert_float(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return _round_bf16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << 16
        return convert(data, source, target, mode)

    def binary_op(self, a, b, op):
        if op in arithmetic and tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError(f"{op.__name__} on bfloat16: upcast to float32 first")
        return binary(self, a, b, op)

    def apply(self, x):
        if any(t.dtype.scalar == tl.bfloat16 for t in (x if isinstance(x, tuple) else (x,))):
            raise TypeError("reduction on bfloat16: upcast to float32 first")
        return reduce(self, x)

    def fma(self, x, y, z):
        assert x.dtype.scalar == tl.float32
        return interpreter.TensorHandle(fused_multiply_add(*np.broadcast_arrays(x.data, y.data, z.data)), tl.float32)

    def inline_asm(self, text, constraints, values, types, is_pure, pack):
        assert len(types) == pack == 1
        found = interpreter.TensorHandle(PTX[text](*(x.data for x in values)), types[0].scalar)
        return SimpleNamespace(get_result=lambda index: found)

    def patch_lang_tensor(tensor, scope):  # Triton 3.6: int() of a one-element array is an error with NumPy 2.4
        patch(tensor, scope)
        for name in ("__index__", "__int__"):
            scope.set_attr(tensor, name, lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_inline_asm = inline_asm
    interpreter.InterpreterBuilder.binary_op = binary_op
    interpreter.ReduceScanOpInterface.apply = apply
    interpreter._patch_lang_tensor = patch_lang_tensor


@dataclass
class Region:
    """One tensor argument of the running kernel. -1: nobody, -2: several programs."""

    name: str
    base: int
    itemsize: int
    size: int
    reads: np.ndarray = field(init=False)
    writes: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    writer: np.ndarray = field(init=False)

    def __post_init__(self):
        self.reads, self.writes = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        self.reader, self.writer = np.full(self.size, -1, np.int64), np.full(self.size, -1, np.int64)


class Report:
    """What the watched launches did; regions are those of the last launch that had the argument."""

    def __init__(self):
        self.regions: dict[str, Region] = {}
        self.errors: list[str] = []

    def check(self, read_once=(), written_once=()) -> None:
        assert not self.errors, self.errors[:5]
        for name in read_once:
            reads = self.regions[name].reads
            assert (reads == 1).all(), f"{name}: elements read {reads.min()} to {reads.max()} times"
        for name in written_once:
            writes = self.regions[name].writes
            assert (writes == 1).all(), f"{name}: elements written {writes.min()} to {writes.max()} times"


@contextlib.contextmanager
def sanitize():
    """Watch every access for bounds, alignment, races between programs and colliding lanes."""
    report, live = Report(), []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    saved = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def init_args(self, args, kwargs):
        host, named = saved[2](self, args, kwargs)
        live.clear()
        for name, x in [*zip(self.arg_names, host), *named.items()]:
            if not hasattr(x, "data_ptr") or not hasattr(x, "untyped_storage"):
                continue
            extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
            if not any(r.base == x.data_ptr() and r.size == extent for r in live):  # a stand-in argument
                live.append(Region(name, x.data_ptr(), x.element_size(), extent))
                report.regions[name] = live[-1]
        return host, named

    def program(self) -> int:
        (x, y, z), dim = self.grid_idx, self.grid_dim
        return (x * dim[1] + y) * dim[2] + z

    def touched(self, pointers, mask, kind):
        left = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64).ravel()
        for region in live:
            inside = (left >= region.base) & (left < region.base + region.itemsize * region.size)
            if inside.any():
                offset = left[inside] - region.base
                if (offset % region.itemsize).any():
                    report.errors.append(f"{kind} of {region.name} is misaligned")
                yield region, offset // region.itemsize
                left = left[~inside]
        if left.size:
            report.errors.append(f"{kind} out of bounds: {left.size} lanes of program {self.grid_idx}")
            raise IndexError(report.errors[-1])

    def load(self, pointers, mask, *rest):
        me = program(self)
        for r, i in touched(self, pointers, mask, "load"):
            np.add.at(r.reads, i, 1)
            if ((r.writer[i] >= 0) & (r.writer[i] != me)).any():
                report.errors.append(f"race: program {me} reads what another wrote in {r.name}")
            r.reader[i] = np.where((r.reader[i] == -1) | (r.reader[i] == me), me, -2)
        return saved[0](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        me = program(self)
        for r, i in touched(self, pointers, mask, "store"):
            np.add.at(r.writes, i, 1)
            if np.unique(i).size != i.size:
                report.errors.append(f"race: lanes of program {me} collide in {r.name}")
            if ((r.writer[i] >= 0) & (r.writer[i] != me)).any():
                report.errors.append(f"race: {r.name} written by two programs")
            if ((r.reader[i] == -2) | ((r.reader[i] >= 0) & (r.reader[i] != me))).any():
                report.errors.append(f"race: program {me} writes what another read in {r.name}")
            r.writer[i] = me
        return saved[1](self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store, executor._init_args_hst = load, store, init_args
    try:
        yield report
    finally:
        builder.create_masked_load, builder.create_masked_store, executor._init_args_hst = saved
