# Two commands do all the set-up: make demo (pictures, no PyTorch) and make test (the whole suite).

PYTHON ?= python3
ENGINE := train/pretrained/fashion-mnist.engine
RUNTIME := pyproject.toml .ci/constraints.txt $(shell find runtime/ddpm_runtime -name '*.py')

.PHONY: demo test check format clean

demo: .venv-demo/.ready  ## 64 garments and how they came to be, from the shipped engine
	mkdir -p out
	.venv-demo/bin/ddpm-run --engine $(ENGINE) -n 64 --class all --out out/demo.png --gif out/demo.gif

test: .venv-test/.ready  ## every test
	.venv-test/bin/python -m pytest

check: .venv-test/.ready  ## format, lint, types
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

format: .venv-test/.ready
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

clean:
	rm -rf .venv-demo .venv-test out

.venv-demo/.ready: $(RUNTIME)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install -q --disable-pip-version-check '.[cpu]'
	.venv-demo/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps .
	touch $@

.venv-test/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install -q --disable-pip-version-check -c .ci/constraints.txt -e '.[export,train,bench,dev]'
	touch $@
