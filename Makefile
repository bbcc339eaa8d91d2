# make demo   the main job, start to end, on the checkpoints in examples/
# make test   every test that this machine can run
# make lint   formatting, style and types
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
OUT := demo-out

.PHONY: demo test lint clean

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

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A stamp is newer than what decides its contents, so a second run installs (and downloads) nothing.
.venv/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(MAKE) --question --no-print-directory .venv/test.stamp || $(PIP) --editable '.[cpu,tensorrt-rtx]'
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[cpu,tensorrt-rtx,test,dev]'
	touch $@

clean:
	rm -rf .venv $(OUT) $(OUT)-vision build *.egg-info .pytest_cache .mypy_cache .ruff_cache
