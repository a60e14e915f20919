# `make demo` and `make test` are all that a fresh machine needs: they make .venv and install into it first, once.
# pip is configured from outside (PIP_* variables, pip.conf); nothing here names an index.

VENV := .venv
PY := $(VENV)/bin/python
# The newest Python that is new enough and can make an environment; `make PYTHON=/path/to/python test` overrules it.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# `python -m` looks in the current folder unless PYTHONSAFEPATH forbids it; this works in both cases.
RUN := PYTHONPATH=. $(PY)
TEST_ARGS ?=

.PHONY: demo test test-large test-parity parity-table lint

demo: $(VENV)/.installed-test
	mkdir -p outputs
	$(RUN) -m tools.edit -i examples/coffee.jpg -m examples/coffee_mask.png -p "a blue ball on sand at sunset" \
		-o outputs/demo.png --compare outputs/demo_compare.jpg
	$(RUN) -m tools.restore -i examples/coffee_small.jpg -o outputs/restored.png --fidelity 0.75 --compare outputs/restored_compare.jpg

test: $(VENV)/.installed-test
	$(RUN) -m pytest -m "not large" $(TEST_ARGS)

test-large: $(VENV)/.installed-test
	$(RUN) -m pytest -m large $(TEST_ARGS)

# Our nets, samplers and tokenizer beside diffusers, transformers and spandrel.
test-parity: $(VENV)/.installed-parity
	$(RUN) -m pytest tests/parity $(TEST_ARGS)

parity-table: $(VENV)/.installed-parity
	$(RUN) -m tests.helpers.parity_table

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

# The stamp is newer than what it was installed from, so a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found; install one, or run: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e ".[$*]"
	touch $@
