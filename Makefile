# Every target sets up what it needs in .venv; nothing else has to be installed but Python >= 3.10 with venv.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= demo-output

.NOTPARALLEL:  # what is measured has the machine to itself
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

ABLATED = info_nce_only no_score_mse one_mix published_pair_weight published_triplet no_prefix prefix_forgotten
ONCE = published_triplet_weighed no_cosine no_triplet \
    no_text_pair_prefix no_instr_prefix no_ocr_prefix no_vqa_single_prefix no_vqa_multi_prefix \
    last_token_pooling attention_pooling weighted_mean_pooling mixed_batches all_negatives \
    in_batch grad_cache in_batch_192 grad_cache_192 cut matryoshka matryoshka_cut \
    only_text_pair only_instr only_ocr only_vqa_single only_vqa_multi
ABLATION_DATA = vqa_questions=7 vqa_multi=3000 captions=2000 lines=15000 text_pairs=3000 instructions=2500 \
    eval.pages=60 eval.instructions=400
ABLATION_ABOUT = The base is a random Qwen2-VL of three million parameters, so all that a model knows it has learned here. The \
    data are what vipyloqwen demo makes: questions about the pictures of shapes of easy-vqa, of one turn, of several, and of \
    several pictures; rendered lines and pages of Vietnamese text; names, dates and amounts of CLDR in Vietnamese, English \
    and Chinese, as pairs of texts and as instructions; captions. make ablation does all of it, by docs/ablation.yaml: two runs \
    at a time, of one thread each, on a virtual machine of two cores and 24 GB of memory; a few of those below were one of three.
ABLATE = OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/vipyloqwen ablate --recipe docs/ablation.yaml \
    --base ablation-output/demo/base --train ablation-output/demo/data/train.jsonl \
    --eval ablation-output/demo/data/eval.jsonl --output ablation-output --about '$(ABLATION_ABOUT)'
define IN_TWO_PROCESSES
trap 'kill $$processes 2>/dev/null' EXIT INT TERM; for process in 1 2; do \
    $(1) & processes="$$processes $$!"; \
done; for process in $$processes; do wait $$process || exit 1; done
endef
ablation: .venv/installed  ## What each part of the method is worth: three seeds of ABLATED, one of ONCE; some three hours
	OMP_WAIT_POLICY=PASSIVE $(BIN)/vipyloqwen demo ablation-output/demo --data-only $(ABLATION_DATA:%=--size %)
	$(call IN_TWO_PROCESSES,$(ABLATE) --seeds 3 $(ABLATED:%=--variant %))
	$(call IN_TWO_PROCESSES,$(ABLATE) --seeds 1 $(ONCE:%=--variant %))
	mkdir -p docs/ablation && cp ablation-output/results.json docs/ablation/
	$(BIN)/python docs/write_figures.py

FIGURES = figures-output
figures: .venv/installed-integration  ## Every figure of READMEs and docs anew, several hours on two cores: CONTRIBUTING.md
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { echo "The pictures need chromium and chromium-driver: CONTRIBUTING.md"; exit 1; }
	rm -rf $(FIGURES) ablation-output
	$(MAKE) bench
	$(MAKE) demo OUTPUT=$(FIGURES)
	$(BIN)/vipyloqwen mteb $(FIGURES)/training/model --output $(FIGURES)/mteb --json $(FIGURES)/mteb.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/index.py --rows 100000 --rounds 7 --output benchmarks/index.md
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/index.py --rows 1000000 --output benchmarks/index.md
	$(BIN)/python benchmarks/shortlist_recall.py $(FIGURES)/training/model $(FIGURES)/data/train.jsonl $(FIGURES)/data/eval.jsonl \
	    --output benchmarks/index.md
	$(BIN)/python benchmarks/data_scale.py --rows 100000 1000000 11000000 --output benchmarks/scale.md
	$(MAKE) ablation
	$(BIN)/python docs/write_figures.py $(FIGURES)
	$(BIN)/python docs/make_pictures.py $(FIGURES)

clean:
	rm -rf .venv build dist *.egg-info $(OUTPUT) $(FIGURES) ablation-output

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/installed-integration: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,benchmarks,integration]'
	touch $@
