# Every target does its own set-up. On a bare Debian machine with Python 3.11 or newer: `make run`, `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A strict editable install links file by file, so a new or removed file means a new install.
FILES := $(shell find proxy backends dns bench -name '*.py' -o -name py.typed | LC_ALL=C sort)
STAMP := $(VENV)/.installed-$(shell echo $(FILES) | cat - pyproject.toml constraints.txt | sha256sum | cut -c1-16)

.PHONY: setup tools test-tools run test explore vm-test check bench lab clean cover
setup: tools $(STAMP)

tools:
	@PYTHON="$(PYTHON)" ./deploy/install-tools

test-tools:
	@PYTHON="$(PYTHON)" ./deploy/install-tools tests

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing vipd into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip setuptools wheel
	@rm -rf build
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --quiet --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $@

run: setup
	@$(BIN)/vipd lab demo

lab: setup
	@$(BIN)/vipd lab up

# In so many processes side by side, each with a lab of its own: tests/conftest.py.
TESTS_AT_ONCE ?= 2
test: setup test-tools
	@$(BIN)/python -m pytest -n $(TESTS_AT_ONCE)

# What reads messages of strangers, with so many of chance: docs/testing.md.
EXPLORE ?= 1000000
EXPLORED ?= tests/properties/test_dns_fuzz.py tests/properties/test_dns_fuzz_replies.py tests/properties/test_dns_zone.py tests/unit/test_dns_forward_reading.py tests/netns/test_chaos.py
explore: setup
	@VIPD_EXPLORE=$(EXPLORE) $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) $(EXPLORED)

# One virtual machine with Debian's kernel, and the tests that need it: docs/testing.md.
vm-test: setup test-tools
	@VIPD_VM_TESTS=all $(BIN)/python -m pytest tests/vm

cover: setup test-tools
	@$(BIN)/python -m coverage run -m pytest && $(BIN)/python -m coverage report

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --explicit-package-bases tests
	@$(BIN)/lint-imports

bench: setup
	@$(BIN)/vipd bench sync

clean:
	@if test -x $(BIN)/vipd; then $(BIN)/vipd lab down; fi
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
