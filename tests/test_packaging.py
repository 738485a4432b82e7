"""What `pip install` puts on a machine: everything the demo needs, and nothing that shadows other people's packages."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_wheel_holds_the_package_its_assets_and_the_kernels(sources, tmp_path):
    names = zipfile.ZipFile(build_wheel(sources, tmp_path)[0]).namelist()
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
