# Two commands on a fresh machine: `make demo` and `make test`. Both make the virtual environment they need.
#
#   PYTHON=python3.12        which Python (>= 3.11) makes the environment
#   TORCH_INDEX=URL          where to take torch from, for example a CUDA build's index; empty: wherever pip looks

PYTHON ?= python3
TORCH_INDEX ?=
RUN := runs/demo
BIN := .venv/bin
STAMP := .venv/installed-$(shell { cat constraints.txt pyproject.toml; echo "$(TORCH_INDEX)"; $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)'; } 2>/dev/null | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check

export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: help install environment demo demo-data ground-truth ablation test test-faults fuzz lint constraints clean-demo

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6
	@echo "Targets: demo ground-truth ablation test test-faults fuzz lint install constraints clean-demo"

install: $(STAMP)

# One at a time: a second `make` beside this one waits for the environment instead of taking it away from the first.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	@$(PYTHON) -c 'import fcntl, os; lock = open(".venv.lock", "w"); os.set_inheritable(lock.fileno(), True); fcntl.flock(lock, fcntl.LOCK_EX); os.path.exists("$(STAMP)") or os.execvp("$(MAKE)", ["$(MAKE)", "--no-print-directory", "environment"])'
	@touch $(STAMP)

environment:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) install -q --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Every command below continues where it was stopped and does nothing when it is done.
demo: demo-data
	$(BIN)/python -m trainer --config recipes/demo_mdlm.yaml
	$(BIN)/python -m trainer --config recipes/demo_mdlm_gumbel.yaml
	$(BIN)/python -m trainer --config recipes/demo_mdlm_independent.yaml
	$(BIN)/python -m eval report --config recipes/demo_report.yaml

demo-data: $(STAMP)
	$(BIN)/python -m pipeline tokenizer --config recipes/demo.yaml
	$(BIN)/python -m pipeline extract --config recipes/demo.yaml --noise.extraction none --output $(RUN)/text
	$(BIN)/python -m pipeline extract --config recipes/demo.yaml --noise.extraction none --corpus.split held_out --output $(RUN)/text-heldout
	$(BIN)/python -m trainer --config recipes/demo_teacher.yaml
	$(BIN)/python -m trainer --config recipes/demo_judge.yaml
	$(BIN)/python -m pipeline extract --config recipes/demo.yaml
	$(BIN)/python -m pipeline extract --config recipes/demo.yaml --corpus.split held_out --output $(RUN)/heldout

# Languages of which everything is known: where parallel decoding fails, and what noise repairs.
ground-truth: $(STAMP)
	$(BIN)/python -m eval truth --config recipes/demo_truth.yaml

# Every part of every student, over seeds; by its parts two and a half hours on 2 cores. Writes ablation.md in $(RUN)/ablation.
ablation: demo-data
	$(BIN)/python -m pipeline generate --config recipes/demo_generate.yaml --generate.rows 40960
	$(BIN)/python -m trainer --config recipes/demo_mdlm.yaml
	$(BIN)/python -m eval ablation --config recipes/demo_ablation.yaml

clean-demo:
	rm -rf $(RUN)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Packages that one file of eval/ may use come last and apart: nothing else needs them, and where one cannot be had its tests are skipped.
test: lint
	@for extra in zero-shot mauve; do test -e .venv/$$extra || { $(PIP) install -q -c constraints.txt -e ".[$$extra]" && touch .venv/$$extra; } \
		|| echo "$$extra cannot be installed: its tests are skipped"; done
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Real clusters whose workers, nodes and drivers are killed; several minutes.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# The readers of files from strangers, guided by coverage, an hour each; needs `pip install atheris`.
fuzz: $(STAMP)
	mkdir -p runs/fuzz
	$(BIN)/python -m tests.noise.fuzz $(or $(TARGET),shard) runs/fuzz tests/corpus/$(or $(TARGET),shard) -max_total_time=3600 -max_len=20000 -timeout=20

constraints:
	{ head -1 constraints.txt; $(PIP) freeze --exclude-editable | sed 's/ @ .*//; s/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt
