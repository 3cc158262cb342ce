# `make demo` and `make test` set up .venv by themselves; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := runtime kernels export engines bench tests tools

.PHONY: demo test lint long gpu gpu-kernels gpu-step clean FORCE

demo: .venv/core
	$(BIN)/python tools/demo.py demo

test: .venv/dev lint
	$(BIN)/python -m pytest -n 2 -m "not long and not gpu"

lint: .venv/dev build/links
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

long: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "long and not gpu"

# A machine with a GPU brings its own torch and triton and may have no network: nothing is installed, nothing fetched.
# Each half ends within nine minutes. One that has more to do says so and fails: call it again, it goes on.
gpu: build/links
	@status=0; for half in kernels step; do $(MAKE) --no-print-directory gpu-$$half || status=1; done; exit $$status

gpu-kernels gpu-step: gpu-%: build/links
	PYTHONPATH=$(CURDIR)/build/links$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -P -m fluxkiln.bench.gpu --half $* --results bench/results

.venv/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"fluxkiln needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/core: .venv/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trt]'
	touch $@

# The package as a tree of links: for type checkers, which do not follow an editable install, and for `make gpu`.
build/links: FORCE
	rm -rf $@ && mkdir -p $@/fluxkiln
	for f in runtime/*.py runtime/py.typed runtime/models; do ln -s $(CURDIR)/$$f $@/fluxkiln/; done
	for p in kernels export engines bench; do ln -s $(CURDIR)/$$p $@/fluxkiln/$$p; done

clean:
	rm -rf .venv build demo .pytest_cache .ruff_cache .mypy_cache
