# make demo and make test are all that a person types; see the README.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev

.PHONY: help install demo test slow lint audit docs clean

help:
	@echo "make install   the set-up alone: .venv with the rankopt command"
	@echo "make demo      compress a small CNN on real digits, also to be as fast, and write runs/demo/report.html"
	@echo "make test      install what tests need and run them"
	@echo "make slow      tests that take minutes or measure this machine (keep it calm), and random examples"
	@echo "make lint      ruff, mypy and the rooms' import contract"
	@echo "make audit     known weaknesses of the installed packages, where their index can be reached"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[ray,studies]"
	@touch $@

$(STAMP_DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(STAMP)

install: $(STAMP)

demo: install
	@rm -rf runs/demo
	$(BIN)/rankopt search digits --budget params=0.3 --strategy optuna --trials 30 --as-fast --out runs/demo
	@echo "open runs/demo/report.html"

test: $(STAMP_DEV)
	@tests/install_browser.sh
	@tests/install_models.sh $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(STAMP_DEV)
	@tests/install_browser.sh
	@tests/install_models.sh $(BIN)/python
	$(BIN)/python -m pytest -m "slow or timing"
	HYPOTHESIS_PROFILE=drawn $(BIN)/python -m pytest tests/robustness/test_untrusted.py tests/strategies/test_allocation.py tests/core/test_budget.py

lint: $(STAMP_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(STAMP_DEV)
	$(BIN)/python tests/audit.py

docs: $(STAMP_DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "open build/docs/index.html"

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
