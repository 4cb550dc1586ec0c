# make demo and make test each work alone on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export FEDSLM_ASSETS ?= ../shared/assets
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo docs test check test-kernels test-real test-federation test-oldest test-all lint bench dist demo-model install clean

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/fedslm demo --directory runs/demo

test: lint
	$(BIN)/python -m pytest -q -m "not slow and not real and not federation" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What most changes touch, and no model: linters, types, config, privacy, aggregation, data, the laws. Left out
# are comparisons with the accountants of Opacus, which needs torch.
CHECKED   = test_architecture.py test_config.py test_validation.py test_records.py test_rng.py test_storage.py \
            aggregation data privacy
UNCHECKED = accounting calibration groups
check: lint
	$(BIN)/python -m pytest -q $(addprefix tests/,$(CHECKED)) -m "not slow" -n auto --maxprocesses 4 \
	  --dist loadfile $(patsubst %,--ignore tests/privacy/test_%.py,$(UNCHECKED))

test-real: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "real and not slow" -n 2 --maxschedchunk 1 --timeout 1200

test-federation: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/deployment -m "federation and not slow" -n 2 --dist loadfile --no-loadscope-reorder --timeout 600

# What another processor may compute otherwise, under the kernels of three.
test-kernels: $(VENV)/.installed
	$(BIN)/python tests/support/processors.py

# The lowest versions that pyproject.toml allows, in an environment of their own, and tests of what they may do
# otherwise. torch comes first, as below; uv, which Flower installs, keeps it and resolves the others downwards.
OLDEST := .venv-oldest/bin/python
AGED    = test_config.py test_doctor.py test_api_model.py models/test_adapter.py models/test_peft_export.py \
          data/test_sources.py privacy/test_ledger.py
test-oldest: .venv-oldest/.installed
	$(OLDEST) -m pytest -q $(addprefix tests/,$(AGED)) -m "not slow and not real and not federation"

.venv-oldest/.installed: pyproject.toml $(VENV)/.installed
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct \
	  -e ".[train]" "pytest>=9" "pytest-timeout>=2.4" "hypothesis>=6.150"
	touch $@

test-all: lint test-kernels test-oldest
	$(BIN)/python -m pytest -q --timeout 3600

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/table.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/deployment.py

# sdist and wheel, their contents, and an installation of the wheel without extras.
dist: $(VENV)/.installed
	$(BIN)/python tests/support/distribution.py

# The site in site/, from docs/ and the docstrings; a broken link is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

demo-model: $(VENV)/.installed
	$(BIN)/python simulations/build_demo_model.py

install: $(VENV)/.installed

# torch first, at its pinned version: asked for later, a resolver may take a build with CUDA instead.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
