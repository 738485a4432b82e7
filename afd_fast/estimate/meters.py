"""What the real modules do on the meta device, where there are shapes and no numbers: bytes that products move, bytes that
every other kernel moves (norms, activations, RoPE, adapters' sums, casts, copies), memory at the peak, and what autograd keeps.

What a change of a module or a fused kernel saves shows here without another formula. Attention is taken to be a flash
kernel. Legend: b samples of a forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from afd_fast.estimate.formulas import Work, work
from afd_fast.sampler import RolloutConfig
from afd_fast.students import CausalWan
from afd_fast.students.lora import disabled
from afd_fast.students.student import Family, StudentModule
from afd_fast.students.toy.model import ToyStudent
from afd_fast.training.velocity import Chunking, chunk_velocities

FREE = ("_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "resize_", "set_")  # no kernel runs; nor for views
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

flop_registry.setdefault(torch.ops.aten._addmm_activation, flop_registry[torch.ops.aten.addmm])


def size_of(x: Tensor) -> int:
    """Bytes of the elements that x has; those that `expand` repeats once."""
    n = x.element_size()
    for count, stride in zip(x.shape, x.stride()):
        n *= count if stride else 1
    return n


class Meter(TorchDispatchMode):
    """Bytes of operands and results. products: of what FlopCounterMode counts; light: of all other kernels; peak: of what
    the block allocated and holds at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.light = self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func._schema.name.split("::")[1]
        if func._overloadpacket in flop_registry:
            self.products += sum(map(size_of, given + outs))
        elif not func.is_view and name not in FREE + ALLOCATIONS:
            self.light += self._moved(func, args, {id(x): x for x in given + outs})
        if not func.is_view:
            self._hold(outs, given)
        return out

    def _moved(self, func: Any, args: Any, tensors: dict[int, Tensor]) -> int:
        """Every operand and result once; of a buffer that our kernels write in part, as much as they write."""
        sizes = {key: size_of(x) for key, x in tensors.items()}
        if func.namespace == "afd_fast":
            written = {id(a) for a, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write}
            most = max((n for key, n in sizes.items() if key not in written), default=0)
            sizes |= {key: min(sizes[key], most) for key in written}
        return sum(sizes.values())

    def _hold(self, outs: list[Tensor], given: list[Tensor]) -> None:
        """Add new storages, drop those that are gone."""
        known = {x.untyped_storage()._cdata for x in given}
        for x in outs:
            storage = x.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.live:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, n) for key, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))


def metered(call: Callable[[], Any], size: int) -> tuple[Work, int]:
    """Work of a call with operands of `size` bytes, and the bytes that it holds at its peak, results included."""
    with FlopCounterMode(display=False) as counter, Meter() as meter:  # the counter's mode takes operators apart
        call()
    return work(counter.get_total_flops(), meter.products / size, size) + Work(light=meter.light), meter.peak


class Kept(saved_tensors_hooks):
    """Bytes autograd saves inside the block since the last `take`; every storage once, parameters not at all."""

    def __init__(self, module: nn.Module):
        self.module, self.storages = module, dict[int, torch.UntypedStorage]()

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            self.storages[storage._cdata] = storage
            return x

        super().__init__(pack, lambda x: x)

    def take(self) -> int:
        own = {p.untyped_storage()._cdata for p in self.module.parameters()}  # now: a forward may move them
        found = sum(s.nbytes() for key, s in self.storages.items() if key not in own)
        self.storages.clear()
        return found


class _Flash(torch.autograd.Function):
    """What a flash kernel keeps: queries, keys, values, the result (and a log-sum-exp, 1 / head width of it)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _with_flash(family: Family) -> StudentModule:
    """The family's student, whose attention is a flash kernel."""
    for block in family.student.modules():
        for name, attention in block.named_children():
            if name in ("self_attn", "cross_attn"):
                attention.attend = _Flash.apply  # type: ignore[assignment]  # nn.Module types every attribute alike
    return family.student


def _inputs(family: Family, batch: int) -> tuple[Tensor, Tensor]:
    """Latents of a clip and the times of its frames."""
    dtype = next(p.dtype for p in family.student.parameters() if not p.requires_grad)
    x = torch.empty(batch, *family.latents, device="meta", dtype=dtype)
    return x, torch.empty(batch, family.latents.frames, device="meta", dtype=dtype)


def graph_bytes(family: Family, batch: int = 1) -> list[int]:
    """What autograd keeps of every chunk of the update of `batch` samples, the text's graph included: the real forward of a
    meta student."""
    student, (x, t) = _with_flash(family), _inputs(family, batch)
    with (kept := Kept(student)):
        text = student.encode_text(WORDS[family.name](student, batch))
        in_text, sizes = kept.take(), []
        for _ in chunk_velocities(student, x, t, text, x, Chunking(family.chunk)):
            sizes.append(in_text + kept.take())
    return sizes


@dataclass(frozen=True)
class Traffic:
    """Bytes of the kernels that are no products, of a chunk's cached passes of b samples. plain: adapters off or merged;
    adapted: with them; forward, backward: with a gradient, of the first chunk; the later ones have `more` for each before."""

    chunks: int
    plain: int
    adapted: int
    forward: int
    backward: int
    more: int

    def rollout(self, config: RolloutConfig) -> Work:
        """Denoising steps and the cache pass of every chunk but the last."""
        first = config.first_chunk_steps or config.steps
        passes = self.chunks * (len(config.steps) + 1) - 1 + len(first) - len(config.steps)
        return Work(light=passes * self.plain)

    def velocity(self, pass_: int) -> Work:
        """Every noised chunk and the clean ones before the last, without a gradient."""
        return Work(light=(2 * self.chunks - 1) * pass_)

    def policy(self) -> Work:
        """Forward with a gradient and backward of every chunk, clean passes between."""
        later = self.chunks * (self.chunks - 1) // 2 * self.more
        return Work(light=self.chunks * (self.forward + self.backward) + later + (self.chunks - 1) * self.adapted)


def student_traffic(family: Family, batch: int) -> Traffic:
    """Of the real student, forward and backward. Three blocks and two are run: the others cost what the third does."""
    student, blocks = _with_flash(family), family.student.blocks
    assert isinstance(blocks, nn.ModuleList)
    found = []
    try:
        for count in (2, 3):
            student.blocks = blocks[:count]
            found.append(_traffic(student, family, batch))
    finally:
        student.blocks = blocks
    more = len(blocks) - 2
    return Traffic(family.latents.frames // family.chunk, *(a + more * (b - a) for a, b in zip(*found)))


def _traffic(student: StudentModule, family: Family, batch: int) -> list[int]:
    """plain, adapted, forward, backward and more of a `Traffic`."""
    (x, t), chunk = _inputs(family, batch), family.chunk
    found: list[int] = []
    text = student.encode_text(WORDS[family.name](student, batch))
    passes, weights = _passes(student, x, t, text, chunk), [p for p in student.parameters() if p.requires_grad]
    for p in weights:  # every backward adds to the gradients of the one before
        p.grad = torch.empty_like(p)
    for _ in range(2):  # linear in the number of chunks before
        with Meter() as forward:
            v = next(passes, None)
        if v is None:  # a video of one chunk has none after it
            found += found[:2]
            break
        with Meter() as backward:
            torch.autograd.backward(v, torch.empty_like(v), retain_graph=True)
        with Meter() as adapted:
            next(passes)
        found += [forward.light, backward.light]
    for p in weights:
        p.grad = None
    cache = student.new_cache(batch, *family.latents[1:])
    with disabled(student), torch.no_grad():
        table = student.timestep(500.0, batch, chunk)
        with Meter() as plain:
            student(x[:, :, :chunk], table, text, cache=cache, start_frame=0)
    return [plain.light, adapted.light, *found[:2], found[2] + found[3] - found[0] - found[1]]


def _passes(student: StudentModule, x: Tensor, t: Tensor, text: Any, chunk: int) -> Iterator[Any]:
    """Of each chunk the velocity with its graph, then, on the next call, its clean pass."""
    cache = student.new_cache(len(x), *x.shape[2:])
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        yield student(x[:, :, part], t[:, part] * 1000, text, cache=cache, start_frame=start)
        with torch.no_grad():
            yield student(x[:, :, part], torch.zeros_like(t[:, part]), text, cache=cache, start_frame=start)


def _wan_words(student: StudentModule, batch: int) -> Tensor:
    assert isinstance(student, CausalWan)
    return torch.empty(batch, student.config.text_len, student.config.text_dim, device="meta", dtype=student.dtype)


def _toy_words(student: StudentModule, batch: int) -> Tensor:
    assert isinstance(student, ToyStudent)
    return torch.zeros(batch, student.config.text_len, dtype=torch.long, device="meta")


WORDS = {"wan": _wan_words, "toy": _toy_words}  # a family's encoded prompt, by its name
