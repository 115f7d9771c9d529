# make demo    set up .venv and run a whole federation on this machine
# make test    set up .venv and run the tests (PYTEST_ARGS="-m 'not e2e and not slow'" for the quick ones)
# make test-slow  the tests that take minutes: a whole demo, kills at random, every strategy with real devices
# make check   what CI runs besides the tests: format, lint, types, layers, generated stubs, containers' files
# make compose-test  build the images and run docker-compose.yml with its demo (needs Docker, or podman and root)
# make screenshots  pictures of every page, light, dark and on a phone, into build/screenshots (needs Chromium)
# make clean   remove what make made

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?= -m "not slow"
SCREENSHOT_ARGS ?=
COMPOSE_TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
SOURCES := server client dashboard proto/glora_wire tests

# uv is several times faster than pip and comes from the same index. It reads find-links from a variable of its own.
INSTALL := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check compose-test screenshots clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/glora demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	tools/generate_stubs.sh --check
	$(BIN)/hadolint deploy/docker/Dockerfile.* tools/compose_test_images/*/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

compose-test: $(VENV)/.installed-dev
	$(BIN)/python tools/compose_test.py $(COMPOSE_TEST_ARGS)

screenshots: $(VENV)/.installed-dev
	$(BIN)/python tools/screenshots.py $(SCREENSHOT_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "glora needs Python 3.11 or newer, and $(PYTHON) is older or missing: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip uv
	@touch $@

# The development set contains the demo's, so that neither undoes the other.
$(VENV)/.installed-demo: $(INPUTS) | $(VENV)/.uv
	@echo "Installing glora and what it needs into $(VENV) (about 1.5 GB; some minutes with a slow network) …"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/.uv
	@echo "Installing glora and what its tests need into $(VENV) (about 2 GB; some minutes with a slow network) …"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo
