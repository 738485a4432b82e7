#!/usr/bin/env bash
# One command on a GPU: the tests, then the benchmarks, tables last, within ten minutes. Nothing is timed on a red test.
#   benchmarks/gpu.sh            writes benchmarks/results/<gpu>.csv
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
gpu=$($python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))")
csv=benchmarks/results/$gpu.csv
rm -f "$csv"
timeout 210 "$python" -m pytest -q tests/test_ops_cuda.py tests/test_compiles.py
timeout 150 "$python" -m benchmarks.run --shape wan --batch 1 16 64 --seconds 0.5 --csv "$csv"
timeout 90 "$python" -m benchmarks.run --shape sd3 --batch 1 16 64 --seconds 0.3 --variant fused one_launch compile eager --csv "$csv"
timeout 40 "$python" -m benchmarks.run --shape tiny --batch 16 --dtype bf16 --seconds 0.2 --csv "$csv"
timeout 100 "$python" -m benchmarks.discriminator --size 2b --pairs 4 --csv "$csv"
timeout 60 "$python" -m benchmarks.update --size 1.3b --repeats 3
left=$((590 - SECONDS))  # whole iterations only in what is left of the ten minutes
if [ "$left" -ge 150 ]; then
    timeout 60 "$python" -m benchmarks.step --size tiny --csv "$csv"
    timeout $((left - 60)) "$python" -m benchmarks.step --size 1.3b --iterations 2 --csv "$csv" || echo "step 1.3b: no result"
else
    echo "step: $left s left are too few"
fi
echo "wrote $csv"
