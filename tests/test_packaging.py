"""What `pip install` puts on a machine: everything the demo needs, and nothing that shadows other people's packages."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from afd_fast.ops import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources(tmp_path):
    """A copy without anything built."""
    to = tmp_path / "sources"
    for name in ("afd_fast", "kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def build_wheel(sources: Path, to: Path, **env) -> tuple[Path, str]:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(to)],
        cwd=sources, env={"PATH": "/usr/bin:/bin", "HOME": str(to), **env}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (wheel,) = to.glob("*.whl")
    return wheel, done.stderr


LOSS = """
import sys, torch, afd_fast
assert afd_fast.__file__.startswith(sys.argv[1]), afd_fast.__file__
v, v_ref, x0 = torch.randn(3, 2, 4, 8, 8).requires_grad_()
loss = afd_fast.nft_loss(v, x0.detach(), torch.rand(2), torch.rand(2), seed=1, v_ref=v_ref)
assert torch.isfinite(torch.autograd.grad(loss, v)[0]).all()
"""


def test_wheel_holds_the_package_its_assets_and_the_kernels(sources, tmp_path):
    compiler = tmp_path / "c++"  # which optimises less, for it takes half of the time
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O1\n')
    compiler.chmod(0o755)
    wheel = zipfile.ZipFile(build_wheel(sources, tmp_path, CXX=str(compiler))[0])
    names, place = wheel.namelist(), tmp_path / "installed"
    wheel.extractall(place)
    code = f"import sys; sys.path.insert(0, {str(place)!r})\n{LOSS}"
    subprocess.run([sys.executable, "-I", "-c", code, str(place)], cwd=tmp_path, check=True)  # outside the checkout
    for needed in (
        "afd_fast/assets/base_student.safetensors", "afd_fast/assets/report.html", "afd_fast/reference/nft.py",
        "afd_fast/training/methods/afd.py", "afd_kernels/nft.py", "afd_kernels/transformer.py",
    ):  # fmt: skip
        assert needed in names
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"afd_fast", "afd_kernels"}  # a top-level `kernels` would shadow Hugging Face's package


def test_without_a_compiler_the_build_succeeds_and_says_so(sources, tmp_path):
    wheel, said = build_wheel(sources, tmp_path, PATH=str(tmp_path))
    assert "native kernels skipped" in said and "cmake" in said
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_setup_imports_nothing_heavy():
    code = "import sys, runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
@pytest.mark.parametrize("cuda", [False, True])
def test_cmake_configures(sources, tmp_path, cuda):
    command = ["cmake", "-S", str(sources), "-B", str(tmp_path / "build"), f"-DAFD_CUDA={'ON' if cuda else 'OFF'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if cuda and not shutil.which("nvcc"):
        assert done.returncode != 0 and "AFD_CUDA=ON needs nvcc" in said
    else:
        assert done.returncode == 0 and ("sm_90a" if cuda else "CUDA kernels skipped") in said


def objdump(flag: str) -> str:
    if native.library() is None or not shutil.which("objdump"):
        pytest.skip("needs the C++ library and objdump")
    return subprocess.run(["objdump", flag, native.library()._name], capture_output=True, text=True, check=True).stdout


MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # PEP 600, as PyTorch's wheels


def test_the_library_runs_on_the_systems_that_the_wheels_tag_names():
    """`make dist` tags the wheel manylinux_2_28. PyTorch has loaded a libgomp.so.1 before, of whatever name."""
    versions = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", objdump("-T"))
    assert versions and all(tuple(map(int, v.split("."))) <= MANYLINUX_2_28[name] for name, v in versions)
    needed = set(re.findall(r"NEEDED +(\S+)", objdump("-p")))
    assert needed <= {
        "libc.so.6",
        "libm.so.6",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libgomp.so.1",
        "ld-linux-x86-64.so.2",
    }


def test_the_library_runs_on_a_cpu_without_avx():
    """Wide registers are for the clones that a CPU with AVX2 or AVX-512 chooses when the library is loaded, and for the sweeps of
    float16, which are called where the CPU has F16C (`f16_code`)."""
    wide, clone = {True: 0, False: 0}, False
    for line in objdump("-d").splitlines():
        if line.endswith(">:"):
            clone = "arch_x86_64_v" in line or re.search(r"<_ZL\d+f16_", line) is not None
        else:
            wide[clone] += bool(re.search(r"%[yz]mm|\tv[a-z]+\w* ", line))
    if "x86-64" in objdump("-f"):
        assert wide[False] == 0 and wide[True] > 100
