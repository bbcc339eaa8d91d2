# make demo   the main job, start to end, on the checkpoints in examples/
# make test   every test that this machine can run
# make torture   N hostile inputs for every reader, on all cores (SECURITY.md); KILLS exports killed at random moments
# make mutants   faults put into good artifacts: parity must catch all, and refuse nothing else; half an hour
# make lint   formatting, style and types
# make test-clients   artifacts in real clients, each in an environment of its own; needs Node.js and npm as well
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
OUT := demo-out
N := 10000
KILLS := 50
OPTIMUM := .venv-optimum
TRANSFORMERS_JS := tests/clients/transformers_js
EMBED_JS := examples/embed_js
TRITON := tests/exporter/triton-requirements.txt

.PHONY: demo test torture mutants lint test-clients clean

demo: .venv/demo.stamp
	$(BIN)/export-llm inspect examples/tiny_llama
	$(BIN)/export-llm export examples/tiny_llama -o $(OUT) --target tensorrt-rtx --force
	$(BIN)/export-llm verify $(OUT) --reference examples/tiny_llama
	$(BIN)/export-llm generate $(OUT) --prompt "27+58="
	$(BIN)/export-llm generate $(OUT) --prompt "reverse planet="
	$(BIN)/export-llm export examples/tiny_vision -o $(OUT)-vision --force
	$(BIN)/export-llm generate $(OUT)-vision --image examples/tiny_vision/picture.png --prompt "<|image|>where is the triangle?"

test: .venv/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

torture: .venv/test.stamp
	$(BIN)/python -m tests.torture --cases $(N)
	$(BIN)/python -m tests.torture.kills --kills $(KILLS)

mutants: .venv/test.stamp
	$(BIN)/python -m tests.mutants

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-clients: .venv/test.stamp .venv/genai.stamp $(OPTIMUM)/made.stamp $(TRANSFORMERS_JS)/node_modules/made.stamp \
		$(EMBED_JS)/node_modules/made.stamp
	$(MAKE) -C examples/embed_cpp PYTHON=$(abspath $(BIN)/python)
	EXPORT_LLM_REQUIRE_CLIENTS=1 $(BIN)/python -m pytest tests/clients tests/test_embedding.py $(PYTEST_ARGS)

# A stamp is newer than what decides its contents, so a second run installs (and downloads) nothing.
.venv/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(MAKE) --question --no-print-directory .venv/test.stamp || $(PIP) --editable '.[cpu,tensorrt-rtx]'
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt $(TRITON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[cpu,tensorrt-rtx,test,dev]'
	$(PIP) --no-deps --requirement $(TRITON)
	touch $@

.venv/genai.stamp: .venv/test.stamp tests/clients/genai/requirements.txt
	$(PIP) --requirement tests/clients/genai/requirements.txt
	touch $@

$(OPTIMUM)/made.stamp: tests/clients/optimum/requirements.txt
	test -x $(OPTIMUM)/bin/python || $(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch $@

$(TRANSFORMERS_JS)/node_modules/made.stamp: $(TRANSFORMERS_JS)/package.json
	npm install --prefix $(TRANSFORMERS_JS) --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

$(EMBED_JS)/node_modules/made.stamp: $(EMBED_JS)/package.json $(EMBED_JS)/package-lock.json
	npm ci --prefix $(EMBED_JS)
	touch $@

clean:
	rm -rf .venv $(OPTIMUM) $(TRANSFORMERS_JS)/node_modules $(EMBED_JS)/node_modules examples/embed_cpp/build $(OUT) $(OUT)-vision build *.egg-info .pytest_cache .mypy_cache .ruff_cache
