"""pytest-benchmark entry points: pytest benchmarks/test_speed.py --benchmark-only"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, DTYPES, SHAPES, Setting
from benchmarks.rows import CUDA, DEVICE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["sd3", "tiny"])
@pytest.mark.parametrize("variant", ["fused", "reference", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark: Callable[..., Any], name: str, variant: str, shape: str, dtype: str) -> None:
    case = CASES[name](Setting((4, *SHAPES[shape]), DTYPES[dtype], DEVICE))
    if variant not in case.variants:
        pytest.skip("no such variant")
    benchmark.extra_info["bytes"] = case.bytes_moved  # type: ignore[attr-defined]

    def call() -> None:
        case.variants[variant]()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(call)
