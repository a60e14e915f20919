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
# For `make gpu`: a Python that has torch already, and where the results go.
GPU_PY ?= python3
OUT ?= docs/bench
GPU_ARGS ?=


define MAKE_VENV
@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found; install one, or run: make PYTHON=/path/to/python" >&2; exit 1; }
test -x $(PY) || $(PYTHON) -m venv $(VENV)
endef

.PHONY: demo test test-long test-portable test-large test-parity test-peers parity-table gpu lint

# The runtime and the official upscalers, without what the tests need: an edit by the mini bundle, a photograph
# enlarged by Real-ESRGAN, and for comparison by the mini bundle's PASD.
demo: $(VENV)/.installed-enlarge
	mkdir -p outputs
	$(RUN) -m tools.edit --model mini -i examples/coffee.jpg -m examples/coffee_mask.png -p "a blue ball on sand at sunset" \
		-o outputs/demo.png --compare outputs/demo_compare.jpg
	$(RUN) -m tools.restore --model realesrgan-x4plus -i examples/coffee_small.jpg -o outputs/restored.png --compare outputs/restored_compare.jpg
	$(RUN) -m tools.restore --model mini -i examples/coffee_small.jpg -o outputs/restored_mini.png --fidelity 0.75

# The first rung: a sample of everything the project promises, at most 20 minutes on 2 cores.
test: $(VENV)/.installed-test
	$(RUN) -m pytest -m "not large and not long" $(TEST_ARGS)

# The second rung: all that takes longer, synthetic files of full size (gigabytes of memory and disk) included. Run it
# before an issue is called resolved.
test-long: $(VENV)/.installed-test
	$(RUN) -m pytest -m "long or large" $(TEST_ARGS)

# The part of the second rung that needs gigabytes.
test-large: $(VENV)/.installed-test
	$(RUN) -m pytest -m large $(TEST_ARGS)

# The numerical tests with the kernels of other processors and with other numbers of threads, one setting after the other.
NUMERICAL := tests/nets tests/samplers tests/msbd -m "not full and not large and not long and not cuda"
SETTINGS := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 OMP_NUM_THREADS=2

test-portable: $(VENV)/.installed-test
	@for setting in $(SETTINGS); do \
		echo "== $$setting"; \
		env $$setting $(RUN) -m pytest -q $(NUMERICAL) $(TEST_ARGS) || { \
			echo "make test-portable: tests fail with $$setting; which comparisons hold: tests/helpers/rounding.py" >&2; exit 1; }; \
	done; \
	echo "== green with each of: $(SETTINGS)"

# Our nets, samplers and tokenizer beside diffusers, transformers and spandrel.
test-parity: $(VENV)/.installed-parity
	$(RUN) -m pytest tests/parity $(TEST_ARGS)

# The numbers that diffusers' own tests store, by our samplers: how many are reproduced, file by file.
test-peers: $(VENV)/.installed-parity
	$(RUN) -m pytest -q tests/peers $(TEST_ARGS)
	$(RUN) -m tests.peers.count

parity-table: $(VENV)/.installed-parity
	$(RUN) -m tests.helpers.parity_table

# What an NVIDIA GPU does with this project; see tests/gpu_check.py. Installs nothing and needs no network: torch 2.10 and
# what else pyproject.toml lists must be there. GPU_ARGS=--pretend runs the same parts without a GPU.
gpu:
	PYTHONPATH=. $(GPU_PY) -m tests.gpu_check --out $(OUT) $(GPU_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

# The stamp is newer than what it was installed from, so a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(MAKE_VENV)
	$(PY) -m pip install -c constraints.txt -e ".[$*]"
	touch $@
