# The two commands: `make demo` and `make test`. Everything they need is installed into .venv, versions pinned.
PYTHON ?= python3
BIN := .venv/bin
SITE = $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html -c docs . site

.PHONY: demo test check docs interop stacks format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/installed ## quantize the bundled model, verify it, and say where the report is
	$(BIN)/quantkit awq demo --w-bit 4 --group 128 --offline --fresh --out outputs/demo

test: .venv/installed ## all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/installed ## what CI runs: format, lint, types, documentation, tests, and the quick part of interop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SITE)
	$(BIN)/python -m pytest -n auto --dist worksteal
	$(BIN)/python -m interop.run --quick

docs: .venv/installed ## the documentation site, in site/; a warning is an error
	$(SITE)
	@echo site/index.html

interop: .venv/installed ## other programs read what quantkit writes, and the other way; makes interop/RESULTS.md
	$(BIN)/python -m interop.run

CORE := streaming sites config_refusals formats format_configs reading scheme grid gptq awq checkpoint_reader checkpoint_writer journal pipeline resume bad_input verify_command verify_other_tools convert convert_other_tools inspection

stacks: .venv/installed ## the core tests on the oldest transformers, in an environment of its own
	$(BIN)/python -m interop.environments transformers-4.51
	.interop/transformers-4.51/bin/python -m pytest -n auto -o filterwarnings=default $(CORE:%=tests/test_%.py)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist site
