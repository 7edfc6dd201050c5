# make demo / make test do all the set-up by themselves: a .venv with the pinned packages, then the job.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo

.PHONY: setup demo up test test-system bench-chaos bench-full-size lint format clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing the packages into .venv, PyTorch among them: some GB, minutes, nothing is shown meanwhile ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/sdxl-flows demo --out $(OUT)

up: setup
	$(BIN)/sdxl-flows up

# Two test processes with two threads each share two cores: threads that spin while they wait take twice the time.
test: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-system: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m system -n 2 --dist loadfile tests/system

bench-chaos: setup
	$(BIN)/python benchmarks/chaos.py --page benchmarks/chaos.md

bench-full-size: setup
	$(BIN)/python benchmarks/full_size.py --out benchmarks/full_size.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out build *.egg-info
