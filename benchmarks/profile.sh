#!/usr/bin/env bash
# Nsight Systems over a short training run: benchmarks/profile.sh RUN key=value ...
set -euo pipefail
cd "$(dirname "$0")/.."
command -v nsys > /dev/null || { echo "profile.sh needs nsys on the PATH: install NVIDIA Nsight Systems" >&2; exit 2; }
nsys profile --trace cuda,nvtx,osrt --pytorch=autograd-nvtx --cuda-memory-usage true --force-overwrite true -o profile \
    "${PYTHON:-python}" -m afd_fast train "$@" --out runs/profile --overwrite
nsys stats --report nvtx_sum,cuda_gpu_kern_sum --timeunit ms profile.nsys-rep
