# make test    everything from nothing: creates .venv, installs, checks
# make check   formatting, lint, types, floors and tests in the .venv that is there
# make fix     repair what the tools can repair
# make demo    find objects in photographs that scikit-image ships
# make clean   remove what was built; .venv stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := refinedet_cli tests examples benchmarks

.PHONY: test check fix demo clean

test: $(VENV)/.installed-dev
	$(MAKE) check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py demo/photos
	$(BIN)/refinedet detect demo/photos --out demo/found

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call quick; --group needs pip 25.1.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --group dev --editable .
	touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --group demo --editable .
	touch $@
