PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin/python
OLDEST_PYTHON ?= $(firstword $(foreach minor,10 11 12,$(shell python3.$(minor) -c "" 2>/dev/null && echo python3.$(minor))) $(PYTHON))  # one that runs
CORE := $(addprefix tests/test_, $(addsuffix .py, advantage attention dropin extras functorch layering nft nft_options noise \
	ops_nft triton_versions))

.PHONY: demo test test-interpreter test-fake-cuda test-oldest gpu bench lint docs dist release clean

demo: .venv/installed
	$(BIN)/afd-fast demo --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests
	$(MAKE) -j2 --output-sync=target test-interpreter test-fake-cuda

test-interpreter:  # two processes of their own: Triton's interpreter, and a GPU without numbers
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_kernels_interpreter.py

test-fake-cuda:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.fake_cuda.device tests/fake_cuda

test-oldest: .venv-oldest/installed  # what needs no extra, on the oldest versions that pyproject.toml allows
	$(OLDEST) -m pytest -q $(CORE)

gpu:  # on a machine with a GPU, whose PyTorch is used as it is
	benchmarks/gpu.sh

bench: .venv/installed
	$(BIN)/python -m benchmarks.run

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed  # build/site/index.html; a link that leads nowhere is an error, and nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: .venv/installed  # an sdist, and a wheel for every Python on Linux with glibc 2.28 (tests/test_packaging.py)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --sdist
	$(BIN)/python -m build --no-isolation --wheel -C=--build-option=--plat-name=manylinux_2_28_$$(uname -m)

release:  # dist, checked as a stranger gets it
	.ci/release

clean:
	rm -rf .venv .venv-oldest build dist runs *.egg-info .pytest_cache .ruff_cache

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml setup.py
	$(OLDEST_PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install -q --disable-pip-version-check torch==2.6.0 numpy==1.26.4 typing_extensions==4.10.0 pytest -e .
	touch $@
