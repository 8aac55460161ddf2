# Everything that a fresh machine needs: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test slow lint docs package oldest clean

install: $(STAMP)

# torch first and pinned: a range pulls gigabytes of CUDA on Linux.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python benchmarks/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process for each core, of one thread: the models are tiny, and threads that wait for each other take longer.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -W error -n auto

test: lint
	$(PYTEST) -m "not slow"

# The modules that take longest: tests/conftest.py names them.
slow: install
	$(PYTEST) -m slow

# The documentation as a site, in site/: strict, without network, and every reference in it checked.
docs: install
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python website/check.py site

# The wheel and the sdist, and the wheel tried in a clean environment.
package: install
	bash .ci/package

# The tests on the oldest transformers that is supported.
oldest: install
	bash .ci/oldest

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .hypothesis demo-out site
