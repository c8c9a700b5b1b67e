# Two commands do all the set-up: make demo (pictures, no PyTorch) and make test (the whole suite).

PYTHON ?= python3
ENGINE := train/pretrained/fashion-mnist.engine
RUNTIME := pyproject.toml .ci/constraints.txt $(shell find runtime/ddpm_runtime -name '*.py')

.PHONY: demo test check format gpu-check clean

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

# Everything that only a GPU can prove, in one call of under ten minutes: every test marked gpu, the
# device against the host, compute-sanitizer where it is on PATH, the benchmark matrix. It writes
# out/gpu-check.json and .md, and fails if a check did.
#   make gpu-check                                    in an environment of its own, .venv-gpu
#   make gpu-check GPU_EXTRAS=gpu,tensorrt,export,dev with TensorRT as well
#   make gpu-check PYTHON=python3                     offline: in what this interpreter can import
#   make gpu-check GPU_CHECK='--only parity'          one phase; benchmarks/gpu_check.py -h for more
GPU_EXTRAS ?= gpu,export,dev
GPU_CHECK ?=

ifeq ($(origin PYTHON),file)
gpu-check: .venv-gpu/.ready  ## everything that only a GPU can prove
	.venv-gpu/bin/python benchmarks/gpu_check.py $(GPU_CHECK)
else
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)
endif

clean:
	rm -rf .venv-demo .venv-test .venv-gpu out

.venv-demo/.ready: $(RUNTIME)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install -q --disable-pip-version-check '.[cpu]'
	.venv-demo/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps .
	touch $@

.venv-test/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install -q --disable-pip-version-check -c .ci/constraints.txt -e '.[export,train,bench,dev]'
	touch $@

# export brings the CPU's onnxruntime, in the same folder as the GPU's: that is put back on top
.venv-gpu/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install -q --disable-pip-version-check -e '.[$(GPU_EXTRAS)]'
	.venv-gpu/bin/pip uninstall -q -y onnxruntime
	.venv-gpu/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps onnxruntime-gpu
	touch $@
