"""Python + Triton, and kernels/csrc through CMake: the CPU library where CMake and a C++ compiler are found,
the CUDA library with AFD_BUILD_CUDA=1. Without a compiler the install succeeds and says so in one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "afd_fast/__init__.py").read_text())[1]
CUDA = os.environ.get("AFD_BUILD_CUDA") == "1"
MISSING = [what for what, found in (
    ("cmake", shutil.which("cmake")),
    ("a C++ compiler", shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")),
) if not found]  # fmt: skip


def say(line: str) -> None:
    print(f"afd_kernels: {line}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Let CMake build the native libraries and install them beside the Triton kernels."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # a plain library: no Python ABI in its name

    def copy_extensions_to_source(self):  # an editable install runs from the sources
        built = Path(self.build_lib) / "afd_kernels"
        for library in built.glob("lib*.so"):
            shutil.copy2(library, ROOT / "kernels/afd_kernels")

    def build_extension(self, ext):
        if MISSING:
            line = f"native kernels skipped, the CPU runs the PyTorch reference: {' and '.join(MISSING)} not found"
            if CUDA:
                raise SystemExit(f"AFD_BUILD_CUDA=1 needs {' and '.join(MISSING)} (cmake >= 3.24: pip install cmake)")
            return say(line)
        prefix = (Path(self.build_lib) / "afd_kernels").resolve()
        build = str(Path(self.build_temp).resolve() / "cmake")
        configure = ["cmake", "-S", str(ROOT), "-B", build, f"-DAFD_CUDA={'ON' if CUDA else 'OFF'}"]
        steps = (configure + os.environ.get("CMAKE_ARGS", "").split(), ["cmake", "--build", build, "-j2"],
                 ["cmake", "--install", build, "--prefix", str(prefix)])  # fmt: skip
        for step in steps:
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode and CUDA:
                raise SystemExit(f"AFD_BUILD_CUDA=1: {' '.join(step)} failed\n{done.stdout}")
            if done.returncode:
                tail = done.stdout.strip().splitlines()[-1:] or ["no output"]
                return say(f"native kernels skipped, the CPU runs the PyTorch reference: {step[1]} failed: {tail[0]}")
        say(
            f"native kernels built for the CPU{' and sm_90a' if CUDA else ' (no CUDA kernels: AFD_BUILD_CUDA is not 1)'}"
        )


options = {}
try:
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        """The libraries are loaded by ctypes: one wheel for every Python."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    options["bdist_wheel"] = Wheel
except ImportError:
    pass

setup(
    version=VERSION,
    packages=find_packages(include=["afd_fast", "afd_fast.*"]) + find_packages("kernels"),
    package_dir={"afd_kernels": "kernels/afd_kernels"},
    package_data={"afd_fast": ["assets/*", "py.typed"]},
    ext_modules=[Extension("afd_kernels.libafd_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild} | options,
)
