"""pytest-benchmark entry points: pytest benchmarks/test_speed.py --benchmark-only"""

import pytest
import torch

from benchmarks.cases import CASES, DTYPES, SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["sd3", "tiny"])
@pytest.mark.parametrize("variant", ["fused", "reference", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark, name, variant, shape, dtype):
    case = CASES[name]((4, *SHAPES[shape]), DTYPES[dtype], DEVICE)
    if variant not in case.variants:
        pytest.skip("no such variant")
    sync = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    benchmark.extra_info["bytes"] = case.bytes_moved
    benchmark(lambda: (case.variants[variant](), sync()))
