"""Imports point down the list; kernels/ never imports afd_fast; only kernels/ imports triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"reference"},
    {"ops"},
    {"models"},
    {"rollout", "generate", "config", "recipes", "flops", "video_io", "teachers"},
    {"training", "evaluation", "data"},
    {"trainer", "base_student", "estimate", "run_folder"},
    {"report", "compare", "comparison_report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for d in ("afd_fast", "kernels") for p in (ROOT / d).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        if part[0] == "kernels":
            assert not name.startswith("afd_fast"), f"kernels/ must not import {name}"
            continue
        assert name.split(".")[0] != "triton", "only kernels/ may import triton"
        pieces = name.split(".")
        if pieces[0] == "afd_fast" and len(pieces) > 1 and pieces[1] in RANK and part[1] != "__init__":
            assert RANK[pieces[1]] <= RANK[part[1]], f"{part[1]} imports upward: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_import_is_light():
    code = "import sys, afd_fast; print([m for m in ('transformers', 'diffusers', 'peft', 'av') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
