"""The guard's library (guard.cpp), compiled where it is not there yet and loaded: import this before torch."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def built() -> Path:
    """The guard's library for the installed PyTorch, compiled where it is not there yet. RuntimeError for a machine that
    cannot have it."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    if (home / "lib/libc10_cuda.so").exists():
        raise RuntimeError("the fake GPU needs a CPU build of PyTorch, this one has a real device guard")
    if shutil.which("g++") is None:
        raise RuntimeError("the fake GPU needs g++")
    source = HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + version("torch").encode() + str(home).encode()).hexdigest()[:12]
    library = ROOT / f"build/fake_cuda-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
        link = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
        flags = "-O1 -shared -fPIC -std=c++20 -w".split()
        command = ["g++", *flags, *include, str(source), "-o", str(partial), *link]
        subprocess.run(command, check=True)
        partial.replace(library)
    return library


assert "torch" not in sys.modules, "import tests.fake_cuda before torch"
try:
    ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
    MISSING = None
except RuntimeError as error:
    MISSING = str(error)  # why this machine cannot have a fake GPU
