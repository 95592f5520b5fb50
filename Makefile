# `make demo` and `make test` need Python 3.11 or newer, git and make; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One more than two cores: some tests wait for other processes.
TEST_PROCESSES := $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -gt 2 ] && echo 4 || echo 3)

.PHONY: setup demo tables tables-seeds beyond test lint bench gpu faults slow dist docs lock audit clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt vatt/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 4; }
	@echo "setup: installing into $(VENV), about 2 GB, some minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "this Python cannot make virtual environments: install its venv package"; exit 4; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]" --constraint constraints.txt
	@touch $@
	@echo "setup: done"

demo: setup
	@$(BIN)/vattctl demo

tables: setup  # every table of the paper, scaled down, and the report: within an hour on two cores
	@$(BIN)/vattctl table all
	@$(BIN)/vattctl report

tables-seeds: setup  # DropToken and specific against agnostic with three seeds: slower
	@$(BIN)/vattctl table all --seeds
	@$(BIN)/vattctl report

beyond: setup  # the studies of docs/beyond.md, three seeds each; a killed one continues
	@$(BIN)/vattctl table beyond
	@$(BIN)/vattctl report

test: setup
	@echo "test: fast tests, about a quarter of an hour on two cores ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_PROCESSES) --dist loadfile

slow: setup
	$(BIN)/python -m pytest -m "slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs vatt vattctl stages tests bench

bench: setup  # all but a visit to a GPU and the faults, which have targets of their own
	@for script in $(filter-out bench/gpu.py bench/faults.py bench/reference.py, $(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu: setup  # at most eight minutes on one H100 or H200; SHARDS=DIR trains the stage on ready shards
	@$(BIN)/python bench/gpu.py $(if $(SHARDS),--shards $(SHARDS))

faults: setup  # 200 kills and some 50 kinds of damage on a small project: well over an hour
	@PYTHONPATH=. $(BIN)/python bench/faults.py

docs: setup  # the site, in site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

dist: setup  # dist/vattctl-VERSION-py3-none-any.whl: all that a project without a clone needs
	@rm -rf build dist
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@rm -rf build
	@ls dist/*.whl

lock: setup  # requirements.lock: the pins of constraints.txt with hashes; all but torch and vattctl
	@$(BIN)/pip install --quiet --disable-pip-version-check uv --constraint constraints.txt
	@echo "torch ; python_version < '3'" > $(VENV)/no-torch.txt
	@$(BIN)/uv pip compile pyproject.toml --all-extras --constraint constraints.txt \
		--override $(VENV)/no-torch.txt --python-version 3.11 --universal --generate-hashes \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet \
		--output-file requirements.lock

audit: setup  # known weaknesses of the pinned packages; asks pypi.org
	@$(BIN)/pip install --quiet --disable-pip-version-check uv --constraint constraints.txt
	@$(BIN)/python .ci/audit.py $(BIN)/uv

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@echo "clean: data/, runs/, reports/ and mlflow.db are kept: they are your results"
