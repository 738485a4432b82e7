#!/usr/bin/env bash
# The tests and benchmarks that need a GPU, in parts of less than ten minutes that run apart:
#   benchmarks/gpu.sh [PART ...]     1 tests, 2 kernels, 3 rollout, 4 batches and the official model, 5 training; none: all
# OUT=folder      rows (GPU.csv), logs and tables; without it benchmarks/results
# WHEELS=folder   wheels to install beside the environment: diffusers (VAE, iterations), ...; no index is asked
# PEER=folder     a checkout of Self-Forcing, whose model is timed next to ours
# PYTHON=python   of the environment with PyTorch
# Nothing stops at what fails: every command has its own limit and its status in the table at the end. Without a GPU every
# command stops where it needs one, which shows whether it starts at all.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${OUT:-benchmarks/results} python=${PYTHON:-python}
command -v "$python" > /dev/null || python=python3
mkdir -p "$results"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --target "$site" "$WHEELS"/*.whl ||
        echo "WHEELS=$WHEELS: not all of them could be installed"
fi
export PYTHONPATH="$PWD:$PWD/kernels:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else 'no-gpu')") || exit 2
csv=$results/$gpu.csv
table=() red=0

run() { # run LIMIT_IN_SECONDS NEEDED_PACKAGES COMMAND ...: its output goes to the part's log too
    local limit=$1 needs=$2 missing="" module status begin=$SECONDS
    shift 2
    for module in ${needs//,/ }; do
        "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || missing+=" $module"
    done
    if [ -n "$missing" ]; then
        echo "skipped, needs$missing (WHEELS=folder with the wheels): $*" | tee -a "$log"
        table+=("$part  skipped  needs$missing: $*")
        return
    fi
    echo "== $*" | tee -a "$log"
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || red=1
    case $status in 0) status=ok ;; 124 | 137) status="over $limit s" ;; *) status="exit $status" ;; esac
    table+=("$part  $status  $((SECONDS - begin)) s: $*")
}

bench() { # bench LIMIT NEEDED_PACKAGES MODULE ARGUMENTS ...
    run "$1" "$2" "$python" -m "benchmarks.$3" --gpu --csv "$csv" "${@:4}"
}

build() { # the CUDA C++ kernels, timed as the variant one_launch
    cmake -S . -B "$site/build" -DAFD_CUDA=ON && cmake --build "$site/build" -j4 &&
        cmake --install "$site/build" --prefix kernels/afd_kernels
}
export -f build
export site

[ $# -gt 0 ] || set -- 1 2 3 4 5
for part; do
    log=$results/part$part.log
    : > "$log"
    case $part in
        1)
            run 240 "" "$python" -m pytest -q -rs tests/test_ops_cuda.py
            run 240 "" "$python" -m pytest -q -rs tests/test_cuda_models.py
            ;;
        2)
            run 100 "" bash -c build
            bench 220 "" run --shape wan --batch 1 16 64 --seconds 0.4
            bench 120 "" run --shape sd3 --batch 1 16 64 --seconds 0.2 --variant fused one_launch compile eager
            bench 40 "" run --shape tiny --batch 16 --dtype bf16 --seconds 0.2
            bench 60 "" rollout operators
            ;;
        3)
            bench 120 "" rollout attention forward --repeats 5
            bench 180 "" rollout rollout --repeats 3
            bench 120 diffusers rollout vae --repeats 3
            bench 90 "" rollout window --repeats 2
            bench 60 "" rollout length --repeats 1
            ;;
        4)
            bench 150 "" rollout batch --repeats 2
            bench 240 diffusers rollout video --repeats 2
            if [ -n "${PEER:-}" ]; then
                bench 180 diffusers,einops peers "$PEER" --size 1.3b --repeats 3
            else
                table+=("4  skipped  needs PEER=folder: benchmarks.peers")
            fi
            ;;
        5)
            bench 120 "" update --size 1.3b --repeats 3
            bench 150 "" discriminator --size 2b --pairs 4
            bench 60 diffusers step --size tiny
            bench 240 diffusers step --size 1.3b --iterations 2
            ;;
        *)
            echo "unknown part $part: 1 tests, 2 kernels, 3 rollout, 4 batches and the official model, 5 training"
            red=1
            ;;
    esac
done
if [ -e "$csv" ]; then
    "$python" -m benchmarks.report "$csv" --out "$results/performance.md"
    cat "$results/performance.md"
fi
printf '\npart, status, command\n'
printf '%s\n' "${table[@]+"${table[@]}"}"
exit $red
