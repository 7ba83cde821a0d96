# Every target sets up what it needs in .venv; nothing else has to be installed but Python >= 3.10 with venv.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= demo-output

.PHONY: demo test test-integration check bench ablation figures clean

demo: .venv/installed  ## The whole job on a tiny model, about 20 minutes on two cores
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

ABLATED = info_nce_only one_mix published_pair_weight published_triplet no_prefix prefix_forgotten
ablation: .venv/installed  ## What each part of the method is worth: 18 trainings, over an hour and a half on two cores
	OMP_WAIT_POLICY=PASSIVE $(BIN)/vipyloqwen demo ablation-output/demo --data-only
	trap 'kill $$processes 2>/dev/null' EXIT INT TERM; for process in 1 2; do \
	    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/vipyloqwen ablate --recipe tiny.yaml --seeds 3 \
	        --base ablation-output/demo/base --train ablation-output/demo/data/train.jsonl \
	        --eval ablation-output/demo/data/eval.jsonl --output ablation-output \
	        --set max_steps=1700 --set eval_steps=0 --set save_steps=400 $(ABLATED:%=--variant %) & \
	    processes="$$processes $$!"; \
	done; for process in $$processes; do wait $$process || exit 1; done
	mkdir -p docs/ablation && cp ablation-output/results.json docs/ablation/
	$(BIN)/python docs/write_figures.py

figures: .venv/installed-integration  ## Every figure of READMEs and docs anew, several hours on two cores: CONTRIBUTING.md
	rm -rf $(OUTPUT) ablation-output
	$(MAKE) bench demo ablation
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/index.py --rows 100000 --rounds 7 --output benchmarks/index.md
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/index.py --rows 1000000 --output benchmarks/index.md
	$(BIN)/python benchmarks/shortlist_recall.py $(OUTPUT)/training/model $(OUTPUT)/data/train.jsonl $(OUTPUT)/data/eval.jsonl \
	    --output benchmarks/index.md
	$(BIN)/python docs/write_figures.py $(OUTPUT)
	$(BIN)/python docs/make_pictures.py $(OUTPUT)

clean:
	rm -rf .venv build dist *.egg-info $(OUTPUT) ablation-output

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/installed-integration: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,benchmarks,integration]'
	touch $@
