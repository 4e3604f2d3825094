# Every target does its own set-up: a fresh clone needs nothing but Python 3.11 or 3.12 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOCKED ?=  # anything: what overproof needs comes from requirements.lock, by its hashes
TORCH_INDEX ?=  # an index for torch and nothing else, which pip would otherwise ask about every package
TORCH := $(shell sed -n 's/^ *"\(torch>[^"]*\)",.*/\1/p' pyproject.toml)

.PHONY: install demo test trials gallery chromium check clean

install: $(INSTALLED)  ## the environment in .venv, which every other target makes as well

demo: $(INSTALLED)  ## the whole loop, ending with a table and a live answer; ARGS=--keep leaves the server up
	$(BIN)/overproof demo $(ARGS)

test: $(INSTALLED) chromium  ## the suite, on a real cluster of several nodes on this machine
	$(BIN)/pytest $(or $(ARGS),--numprocesses 2 --dist loadgroup --no-loadscope-reorder)

trials: $(INSTALLED)  ## what is long by nature: many kills, whole loops; ends with a table
	$(BIN)/pytest -m trial $(ARGS)

chromium:  # the browser that the report's test opens
	@command -v chromium >/dev/null || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	    || { echo 'make test needs chromium: as root, apt-get install chromium (or your system'"'"'s way)' >&2; exit 1; }; \
	  echo 'installing chromium (once)'; \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; }

gallery: $(INSTALLED) chromium  ## the pictures of docs/gallery.md anew, from real runs
	$(BIN)/python jobs/gallery.py

check: $(INSTALLED)  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@test ! -e platform/__init__.py || { echo 'platform/__init__.py shadows the standard library: delete it'; exit 1; }

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"overproof needs Python 3.11 or 3.12, {sys.executable} is %d.%d; name one: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv .venv
	@echo 'installing the dependencies (1 to 5 minutes, once)'
	$(BIN)/pip install --quiet 'pip>=25.3,<26'  # takes half the time of the one that comes with Python 3.11
	$(if $(LOCKED),$(BIN)/pip install --quiet --require-hashes --requirement requirements.lock)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) '$(TORCH)')
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/python -m compileall -q platform/overproof  # or each worker would, where no bytecode is written
	@touch $@

clean:  ## the store and the environment
	rm -rf store .venv
