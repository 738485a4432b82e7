"""Compile a Triton kernel to machine code without a GPU and read what came out (helper of test_compiles.py)."""

import collections
import functools
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass
class Compiled:
    registers: int
    stack: int
    spills: int  # bytes of local memory, and its loads and stores
    loads: dict  # width in bits -> LDG instructions of a thread
    stores: dict
    instructions: int  # of a thread
    backward_branch: bool
    conversions: int  # tensors that change their layout, through shared memory
    ptx: str
    sass: str
    read: collections.Counter  # kernel argument -> elements a program loads, from the IR
    written: collections.Counter


def compile_kernel(kernel, types: dict, constants: dict, *, capability=90, aligned=None, **options) -> Compiled:
    """types: argument -> Triton type; constants: constexpr arguments; aligned: arguments divisible by 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = (
        [n for n in names if signature[n].startswith("*") or signature[n] == "i64"] if aligned is None else aligned
    )
    source = _source(kernel, signature, constants, [names.index(n) for n in aligned if n in signature])
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4} | options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        dump = lambda flag: (
            subprocess.run([BIN / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    number = lambda key: int(re.search(key + r":(\d+)", usage)[1])
    loads, stores, local, count, back = collections.Counter(), collections.Counter(), 0, 0, False
    for address, op, rest in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", sass):
        name, *suffixes = op.split(".")
        if op == "NOP":
            continue
        target = re.search(r"0x([0-9a-f]+)", rest) if op == "BRA" else None
        if target and int(target[1], 16) == int(address, 16):
            continue  # the padding at the end
        back |= bool(target) and int(target[1], 16) < int(address, 16)
        count += 1
        local += name in ("LDL", "STL")
        if name in ("LDG", "STG"):
            width = next((WIDTHS[s] for s in suffixes if s in WIDTHS), 32)
            (loads if name == "LDG" else stores)[width] += 1
    read, written = _traffic(built.asm["ttgir"])
    return Compiled(
        number("REG"), number("STACK"), number("LOCAL") + local, dict(loads), dict(stores), count, back,
        built.asm["ttgir"].count("ttg.convert_layout"), built.asm["ptx"], sass, read, written,
    )  # fmt: skip


def _source(kernel, signature: dict, constants: dict, aligned: list[int]) -> ASTSource:
    if hasattr(triton.backends.compiler, "AttrsDescriptor"):  # Triton 3.2
        attrs = triton.backends.compiler.AttrsDescriptor.from_dict(
            {"arg_properties": {"tt.divisibility": aligned, "tt.equal_to": []}, "cls": "AttrsDescriptor"}
        )
        return ASTSource(kernel, {n: t for n, t in signature.items() if t != "constexpr"}, constants, attrs)
    names = kernel.arg_names
    return ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip


def _traffic(ttgir: str) -> tuple[collections.Counter, collections.Counter]:
    """(argument -> elements loaded, stored) of one program: pointers followed back to the kernel's arguments."""
    arguments = set(re.findall(r"%(\w+): !tt\.ptr", ttgir.split("tt.func", 1)[1].split("{\n", 1)[0]))
    defined = {}
    for name, operands in re.findall(r"^\s*%(\w+)(?::\d+)? = \S+ (.*)$", ttgir, re.M):
        defined[name] = re.findall(r"%(\w+)", operands)

    @functools.cache
    def root(name: str) -> str:
        while name not in arguments:
            if not defined.get(name):
                return "?"
            name = defined[name][0]
        return name

    found = {"load": collections.Counter(), "store": collections.Counter()}
    for kind, pointer, shape in re.findall(r"tt\.(load|store) %(\w+).*?: (?:tensor<([\dx]+)x)?!tt\.ptr", ttgir):
        found[kind][root(pointer)] += math.prod(map(int, shape.split("x"))) if shape else 1
    return found["load"], found["store"]
