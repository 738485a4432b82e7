PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test gpu bench lint clean

demo: .venv/installed
	$(BIN)/afd-fast demo --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_kernels_interpreter.py
	$(BIN)/python -m pytest -q -p tests.fake_cuda.device tests/fake_cuda

gpu:  # on a machine with a GPU, whose PyTorch is used as it is
	benchmarks/gpu.sh

bench: .venv/installed
	$(BIN)/python -m benchmarks.run

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist runs *.egg-info .pytest_cache .ruff_cache

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
