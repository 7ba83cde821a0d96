# Every target sets up what it needs in .venv; nothing else has to be installed but Python >= 3.10 with venv.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= demo-output

.PHONY: demo test test-integration check bench clean

demo: .venv/installed  ## The whole job on a tiny model, about 15 minutes on two cores
	OMP_WAIT_POLICY=PASSIVE $(BIN)/vipyloqwen demo $(OUTPUT)

test: .venv/installed check  ## Style and every test
	$(BIN)/python -m pytest -n auto

test-integration: .venv/installed-integration  ## Tests in a browser and beside other tools: CONTRIBUTING.md
	$(BIN)/python -m pytest -n 0 -v --durations=10 tests/integration

check: .venv/installed  ## Style: ruff's lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed  ## Against stock sentence-transformers, memory, a profile: written to benchmarks/results.md
	$(BIN)/python benchmarks/encode_vs_stock.py --output benchmarks/results.md
	$(BIN)/python benchmarks/train_vs_stock.py --output benchmarks/results.md
	$(BIN)/python benchmarks/gradcache_memory.py --output benchmarks/results.md
	$(BIN)/python benchmarks/where_time_goes.py --output benchmarks/results.md

clean:
	rm -rf .venv build dist *.egg-info $(OUTPUT)

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/installed-integration: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,benchmarks,integration]'
	touch $@
