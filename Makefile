# kickcall: from a fresh Debian or Ubuntu with Python, git and make.
# Every target does its own set-up (scripts/setup.sh), which does nothing when all is there.

SETUP  := scripts/setup.sh
PY     := .venv/bin/python
PYTEST_ARGS ?=
KVM_ARGS ?=
MATRIX := tests/rig/test_fault_matrix.py
SOURCES := src tests $(if $(wildcard bench/*.py),bench)

.DEFAULT_GOAL := help
.PHONY: help demo test rig matrix kvm check lint docs bench setup clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## lose a kick and a call on a real guest, and repair both
	@$(SETUP) run lab
	@.venv/bin/kickcall demo

test: ## everything: lint, types, unit tests, tests on real QEMU and on a KVM host
	@$(SETUP) dev lab rigs
	@$(MAKE) --no-print-directory lint
	@echo "tests on real QEMU, and on a KVM host beside them; each says what it saw when it ends"
	@$(MAKE) --no-print-directory -j 2 --output-sync=target rig kvm KVM_ARGS='-m "not long"'

rig: ## unit tests, and those that boot real QEMUs
	@$(SETUP) dev lab rigs
	$(PY) -m pytest tests/unit tests/rig --ignore $(MATRIX) -n 3 --dist loadfile $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory matrix

matrix: ## every fault on every device and layout, and what diagnose says of it
	@$(SETUP) dev lab rigs
	$(PY) -m pytest $(MATRIX) -n 4 --dist loadgroup $(PYTEST_ARGS)

kvm: ## the tests that need a KVM host: this machine, or one that the lab boots
	@$(SETUP) dev lab rigs
	scripts/kvm-tests.sh $(KVM_ARGS) $(PYTEST_ARGS)

check: ## what fits in a minute: lint, types, unit tests
	@$(SETUP) dev
	@$(MAKE) --no-print-directory lint
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

lint:
	@$(SETUP) dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy $(SOURCES)

docs: ## the documentation into site/, warnings as errors
	@$(SETUP) docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: ## the numbers that must hold, as ratios
	@$(SETUP) dev lab bench
	$(PY) -m pytest bench $(PYTEST_ARGS)

setup: ## all that the other targets would set up
	@$(SETUP) dev docs lab rigs

clean: ## remove what was built and installed here (downloads stay cached)
	rm -rf .venv site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
