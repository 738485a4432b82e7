"""Random calls of the C++ library, built with AddressSanitizer and UndefinedBehaviorSanitizer, against the reference.

    python tests/fuzz_native.py --seconds 300          # --only SEED repeats one case

A case is a call of `nft_loss` or `forward_noise` of random shape, dtypes, strides, masks, packing, recipe, threads and
default dtype. Loss and gradient may be twice as far from the float64 reference as the reference in the same dtype. One case
in six gives the operators themselves arguments of wrong size or offsets, which they must refuse.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).parent.parent
FLAGS = "-std=c++17 -O1 -g -march=native -ffp-contract=off -fopenmp -fPIC -shared -fno-omit-frame-pointer -Wno-psabi"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--only", type=int, help="run this one case")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        return fuzz(args)
    with tempfile.TemporaryDirectory() as folder:
        return sanitized(Path(folder))


def sanitized(folder: Path) -> int:
    """This script again, with the sanitized library in the place of the installed one."""
    compiler = os.environ.get("CXX", "g++")
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    source = ROOT / "kernels/csrc/afd_cpu.cpp"
    command = [compiler, *FLAGS.split(), *sanitizers.split(), str(source), "-o", str(folder / "libafd_cpu.so")]
    subprocess.run(command, check=True)
    runtimes = [  # the second because the first looks for its throw
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    seen = folder / "case"
    env = os.environ | {
        "LD_PRELOAD": " ".join(runtimes), "AFD_FUZZ_CASE": str(seen), "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    code = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--library", str(folder)], env=env).returncode
    if code:
        print(f"failed in case {seen.read_text()}: repeat it with --only {seen.read_text()}")
    return int(code != 0)


def fuzz(args: argparse.Namespace) -> int:
    import afd_kernels

    afd_kernels.__path__.insert(0, args.library)
    from afd_fast.ops import native

    library = native.library()
    assert library is not None and library._name.startswith(args.library), "the sanitized library is not in use"
    seed, refused, stop = args.seed, 0, time.monotonic() + args.seconds
    first = seed
    while time.monotonic() < stop:
        seed = first if args.only is None else args.only
        Path(os.environ["AFD_FUZZ_CASE"]).write_text(str(seed))
        refused += Case(random.Random(seed), seed).run()
        first += 1
        if args.only is not None:
            break
    print(f"{first - args.seed} cases, {refused} of them refused as they must be, no report")
    return 0


class Case:
    """One call, drawn from `rng`."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        import torch

        self.torch, self.rng = torch, rng
        self.g = torch.Generator().manual_seed(seed)
        self.shape = self.draw_shape()

    def run(self) -> bool:
        """Whether this was a call to refuse."""
        torch, rng = self.torch, self.rng
        torch.set_num_threads(rng.choice([1, 1, 2, 3, 5]))
        torch.set_default_dtype(
            rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
        )
        kind = rng.choice(["loss", "loss", "loss", "loss", "noise", "bad"])
        getattr(self, kind)()
        return kind == "bad"

    def draw_shape(self) -> tuple[int, ...]:
        rng = self.rng
        batch = rng.choice([1, 1, 2, 3, 7])
        size = rng.choice([1, 2, 7, 15, 16, 17, 31, 64, 257, 1000, 4095, 4096, 4097, 8191, 12289])
        if rng.random() < 0.5:
            return batch, size
        frames, channels = rng.choice([1, 2, 5]), rng.choice([1, 3])
        return batch, channels, frames, max(1, size // (frames * channels * 2)), rng.choice([1, 2, 3])

    def tensor(self, dtype=None):
        """A tensor of the shape: contiguous, with a free stride between samples, permuted, expanded or strided."""
        torch, rng, shape = self.torch, self.rng, self.shape
        dtype = dtype or rng.choice([torch.float32, torch.bfloat16, torch.float16])

        def normal(*size):
            return torch.randn(*size, generator=self.g, dtype=torch.float32).to(dtype)

        layout = rng.choice(["plain", "plain", "rows", "permuted", "expanded", "strided", "offset"])
        if layout == "rows":
            return normal(shape[0], 2, *shape[1:])[:, rng.randrange(2)]
        if layout == "permuted" and len(shape) > 2:
            order = [0, *rng.sample(range(1, len(shape)), len(shape) - 1)]
            back = sorted(range(len(shape)), key=order.__getitem__)
            return normal(*[shape[axis] for axis in order]).permute(back)
        if layout == "expanded":
            return normal(1, *shape[1:]).expand(shape)
        if layout == "strided":
            return normal(*shape[:-1], shape[-1] * 2)[..., ::2]
        if layout == "offset":  # no alignment beyond the element
            count = 1
            for size in shape:
                count *= size
            return normal(count + 3)[rng.randrange(1, 4) :][:count].view(shape)
        return normal(*shape)

    def maybe(self, make, chance=0.5):
        return make() if self.rng.random() < chance else None

    def recipe(self):
        from afd_fast.errors import field_types
        from afd_fast.reference.recipes import RECIPES, NFTRecipe

        rng = self.rng
        if rng.random() < 0.4:
            return RECIPES[rng.choice(list(RECIPES))]
        chosen = {
            name: rng.choice(get_args(kind))
            for name, kind in field_types(NFTRecipe).items()
            if get_origin(kind) is Literal
        }
        if chosen["space"] == "clean":
            chosen["ref_space"] = "v"
        if chosen["form"] == "dpo":  # the exponential of a sum multiplies the sum's rounding by its size
            chosen["sample_reduction"] = "mean"
        return NFTRecipe(
            **chosen, beta=rng.choice([0.1, 1.0, 3.0]), ref_coef=rng.choice([0.0, 1e-4, 0.5]),
            weight_floor=rng.choice([1e-5, 0.7]), divide_by_beta=rng.random() < 0.5, dpo_beta=rng.choice([0.3, 2.0]),
            shared_weight=chosen["weighting"] == "adaptive" and rng.random() < 0.3,
        )  # fmt: skip

    def levels(self, samples: int):
        """t, sigma or neither, and frame_dim."""
        torch, rng = self.torch, self.rng

        def level(*size):
            return 0.05 + 0.9 * torch.rand(*size, generator=self.g, dtype=torch.float32)

        sigma = self.maybe(lambda: level(samples), 0.3)
        form = rng.choice(["number", "sample", "frames", "elements"])
        if len(self.shape) == 5 and form == "frames":
            return level(samples, self.shape[2]), self.maybe(lambda: level(samples, self.shape[2]), 0.3), 2
        if len(self.shape) == 5 and form == "elements":
            axes = [samples, *(size if rng.random() < 0.5 else 1 for size in self.shape[1:])]
            return level(*axes), sigma, None
        return (0.4, sigma, None) if form == "number" else (level(samples), sigma, None)

    def inputs(self):
        """Arguments of nft_loss."""
        torch, rng = self.torch, self.rng
        recipe = self.recipe()
        packed = rng.random() < 0.2
        if packed:
            lengths = [rng.choice([0, 1, 2, 5, 40]) for _ in range(rng.choice([1, 2, 4]))]
            lengths[rng.randrange(len(lengths))] += sum(lengths) == 0
            self.shape = (sum(lengths), *self.shape[1:])
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(rng.choice([torch.int32, torch.int64]))
        samples = len(lengths) if packed else self.shape[0]
        t, sigma, frame_dim = (0.05 + 0.9 * rng.random(), None, None) if packed else self.levels(samples)
        same = rng.choice([None, None, torch.float32, torch.bfloat16, torch.float16])
        source = rng.choice(["noise", "x_t"] if packed else ["noise", "seed", "x_t"])
        source = None if recipe.space == "clean" else source
        given = {"v": self.tensor(same), "x0": self.tensor(same), "t": t, "sigma": sigma, "frame_dim": frame_dim,
                 "r": torch.rand(samples, generator=self.g, dtype=rng.choice([torch.float32, torch.float64])),
                 "v_old": self.maybe(lambda: self.tensor(same)), "v_ref": self.maybe(lambda: self.tensor(same)),
                 "cu_seqlens": offsets if packed else None, "recipe": recipe}  # fmt: skip
        if source is not None:
            given[source] = rng.choice([-1, 0, 1 << 63, 12345]) if source == "seed" else self.tensor(same)
        for name in ("sample_mask", "ref_mask"):
            given[name] = self.maybe(lambda: self.kept(torch.rand(samples, generator=self.g, dtype=torch.float32)), 0.3)
        for name in ("policy_weight", "prior_weight"):
            given[name] = self.maybe(lambda: 2 * torch.rand(samples, generator=self.g, dtype=torch.float32), 0.2)
        given["element_mask"] = self.maybe(self.mask, 0.3)
        if recipe.form == "mse" and rng.random() < 0.25:  # an r per element
            axes = [size if rng.random() < 0.7 else 1 for size in self.shape]
            given["r"] = torch.rand(axes, generator=self.g, dtype=torch.float32)
        return given

    def kept(self, x):
        """A mask from numbers in [0, 1]: booleans, or weights of which some are 0."""
        return x > 0.4 if self.rng.random() < 0.5 else x * (x > 0.2)

    def mask(self):
        torch, rng = self.torch, self.rng
        axes = [size if rng.random() < 0.7 else 1 for size in self.shape]
        return self.kept(torch.rand(*axes, generator=self.g, dtype=torch.float32))

    def loss(self) -> None:
        import afd_fast

        torch, rng = self.torch, self.rng
        given, stats, scale = self.inputs(), rng.random() < 0.5, rng.choice([1.0, 1.0, -3.5])
        out = self.maybe(lambda: torch.full(self.shape, float("nan"), dtype=given["v"].dtype), 0.3)
        if out is not None and not given["v"].is_contiguous():
            out = None
        loss, grad = graded(afd_fast.nft_loss, given, scale, return_stats=stats, out=out)
        plain_loss, plain_grad = graded(afd_fast.reference.nft.nft_loss, given, scale)
        wide = {
            name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in given.items()
        }
        if "seed" in given:  # the noise that float32 and bfloat16 samples see
            wide["noise"] = afd_fast.reference.noise.normal_noise(given["x0"].shape, wide.pop("seed"))
            if given["recipe"].space == "x0":  # x_t is rounded to x0's dtype
                wide["x_t"] = afd_fast.reference.flow.forward_noise(
                    given["x0"], given["t"], noise=wide.pop("noise").to(torch.float32), frame_dim=given["frame_dim"]
                ).double()
        elif "noise" in given and given["recipe"].space == "x0":
            wide["x_t"] = afd_fast.reference.flow.forward_noise(
                given["x0"], given["t"], noise=wide.pop("noise").to(given["noise"].dtype), frame_dim=given["frame_dim"]
            ).double()
        exact_loss, exact_grad = graded(afd_fast.reference.nft.nft_loss, wide, scale)
        self.near("loss", loss, plain_loss, exact_loss, torch.float32)
        self.near("gradient", grad, plain_grad, exact_grad, given["v"].dtype)

    def near(self, what, found, plain, exact, dtype) -> None:
        eps = self.torch.finfo(dtype).eps
        size = exact.abs().max().item()
        bound = 2 * ((plain.double() - exact).abs().max().item() + max(eps, 4e-6) * size) + 1e-30
        off = (found.double() - exact).abs().max().item()
        assert found.shape == exact.shape and off <= bound, f"{what} is off by {off:g}, allowed {bound:g}, of {size:g}"

    def noise(self) -> None:
        import afd_fast

        torch, rng = self.torch, self.rng
        x0 = self.tensor()
        t, _, frame_dim = self.levels(self.shape[0])
        seed = rng.choice([None, -5, 77])
        eps = self.tensor() if seed is None else None
        found = afd_fast.forward_noise(x0, t, noise=eps, seed=seed, frame_dim=frame_dim)
        exact = afd_fast.reference.flow.forward_noise(x0, t, noise=eps, seed=seed, frame_dim=frame_dim)
        assert torch.equal(found, exact), f"x_t is off by {(found - exact).abs().max()}"

    def bad(self) -> None:
        """The operators themselves, past the public function's checks."""
        from afd_kernels.layout import Row

        from afd_fast.ops import native
        from afd_fast.ops import nft_operators as nft
        from afd_fast.ops.inputs import Inputs

        torch, rng = self.torch, self.rng
        rows, samples = 6, rng.choice([1, 2, 4])

        def x(*size, dtype=torch.float32):
            return torch.randn(*size, generator=self.g, dtype=dtype)

        packed, recipe = rng.random() < 0.5, self.recipe()
        good = Inputs(
            x(rows, 9), x(rows, 9), torch.full((samples if packed else rows,), 0.5, dtype=torch.float32),
            torch.full((samples if packed else rows, 1), 0.5, dtype=torch.float32), x(rows, 9), None, None, None, None,
            None, None, None, None, None, None, None, torch.linspace(0, rows, samples + 1, dtype=torch.float64).long() if packed else None,
            9, recipe.key, rng.random() < 0.5,
        )  # fmt: skip
        native.nft_loss(good, None)
        wrong = [
            {"x0": x(rows - 1, 9)}, {"noise": x(rows, 5)}, {"v_old": x(1, 9)}, {"v_ref": x(rows, 8)},
            {"r": x(len(good.r) + 1)}, {"t": x(len(good.r), 0)}, {"t": x(1 + len(good.r), 1)}, {"inner": 0},
            {"inner": -3}, {"sigma": x(len(good.r), 3)}, {"element_mask": x(rows, 3) > 0},
            {"sample_mask": torch.ones(99, dtype=torch.bool)}, {"ref_mask": torch.ones(0, dtype=torch.bool)},
            {"each": x(rows, 8)}, {"policy_weight": x(99)}, {"prior_weight": x(0)}, {"element_mask": x(rows, 8).abs()},
        ] + ([{"noise": None}] if recipe.space != "clean" else [])  # fmt: skip
        if packed:
            for _ in range(9):
                dtype = rng.choice([torch.int32, torch.int64])
                edge = [0, rows, -1, rows + 1, torch.iinfo(dtype).max, torch.iinfo(dtype).min, 1 << 30]
                offsets = [rng.choice(edge) for _ in range(samples + 1)]
                if offsets[0] == 0 and offsets[-1] == rows and offsets == sorted(offsets):
                    continue
                wrong.append({"cu_seqlens": torch.tensor(offsets, dtype=dtype)})
        change = rng.choice(wrong)
        damaged = good._replace(**change)
        calls = [
            lambda: nft.loss(*damaged),
            lambda: nft.loss_with_grad(*damaged, torch.empty(good.v.shape, dtype=torch.float32)),
            lambda: nft.loss_with_grad(*good, torch.empty(rows, 8, dtype=torch.float32)),
            lambda: nft.backward(torch.ones(2, dtype=torch.float32), x(len(Row), len(good.r)), *damaged),
            lambda: nft.backward(torch.ones(2, dtype=torch.float32), x(len(Row) - 1, len(good.r)), *good),
        ]
        try:
            rng.choice(calls)()
        except ValueError:
            return
        raise AssertionError(f"accepted: {change}")


def graded(loss_of, given, scale, **more):
    """(loss, its gradient for v times scale)."""
    given = given | {"v": given["v"].detach().requires_grad_()}
    found = loss_of(**given, **{name: x for name, x in more.items() if x is not None})
    loss = found[0] if isinstance(found, tuple) else found
    (loss * scale).backward()
    return loss.detach(), given["v"].grad


if __name__ == "__main__":
    sys.exit(main())
