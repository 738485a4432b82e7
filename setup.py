"""A pure Python + Triton wheel; `AFD_BUILD_CUDA=1` also compiles kernels/csrc with CMake."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "afd_fast/__init__.py").read_text())[1]
CUDA = os.environ.get("AFD_BUILD_CUDA") == "1"


class CMakeBuild(build_ext):
    """Let CMake build the native library and install it beside the Triton kernels."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        if not shutil.which("cmake"):
            raise SystemExit("AFD_BUILD_CUDA=1 needs cmake >= 3.24: pip install cmake")
        prefix = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", self.build_temp, "-DAFD_CUDA=ON"]
        subprocess.check_call(configure + os.environ.get("CMAKE_ARGS", "").split())
        subprocess.check_call(["cmake", "--build", self.build_temp, "-j"])
        subprocess.check_call(["cmake", "--install", self.build_temp, "--prefix", str(prefix)])


setup(
    version=VERSION,
    packages=find_packages(include=["afd_fast", "afd_fast.*"]) + find_packages("kernels"),
    package_dir={"afd_kernels": "kernels/afd_kernels"},
    package_data={"afd_fast": ["assets/*", "py.typed"]},
    ext_modules=[Extension("afd_kernels.libafd_kernels", sources=[])] if CUDA else [],
    cmdclass={"build_ext": CMakeBuild} if CUDA else {},
)
