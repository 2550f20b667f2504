# Each target sets up what it needs first: .venv, data, training, evaluation, report.
PYTHON ?= python3
BIN := .venv/bin
FLAGS ?=
MINUTES ?= 24
FROM ?=
DEEPSPEED := deepspeed --log_level warning
DS_CONFIG := fastclr/recipes/fp32_clipped.json
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED = 1

.PHONY: demo cifar10 studies throughput test verify gpu-check drills bench-check check format clean
.DELETE_ON_ERROR:

# What runs on the GPU where there is one, and tests that need one.
GPU_TESTS = tests/kernels/test_nt_xent_triton.py tests/kernels/test_lars_kernels.py \
	tests/kernels/test_augment_triton.py tests/pipelines/test_augment.py \
	tests/end_to_end/test_engines.py tests/gpu/loading.py tests/gpu/training.py

demo: data/demo/train/manifest.json data/demo/test/manifest.json
	$(DEEPSPEED) fastclr/train.py --ds-config $(DS_CONFIG) --recipe demo \
		--data.train data/demo/train --run-dir runs/demo $(FLAGS)
	python tools/evaluate.py --run runs/demo --train data/demo/train --test data/demo/test
	python tools/report.py --run runs/demo

cifar10: data/cifar10/train/manifest.json data/cifar10/test/manifest.json
	$(DEEPSPEED) fastclr/train.py --ds-config $(DS_CONFIG) --recipe cifar10-cpu \
		--minutes $(MINUTES) --data.train data/cifar10/train --run-dir runs/cifar10 $(FLAGS)
	python tools/evaluate.py --run runs/cifar10 --train data/cifar10/train --test data/cifar10/test
	python tools/report.py --run runs/cifar10

studies: data/cifar10/train/manifest.json data/cifar10/test/manifest.json
	fastclr study all --out fastclr/studies --data data/cifar10/train data/cifar10/test $(FLAGS)

throughput: .venv/.installed
	python benchmarks/throughput.py $(FLAGS)

bench-check: .venv/.installed
	python benchmarks/check.py $(FLAGS)

test: .venv/.installed
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FLAGS)

verify: .venv/.installed
	python tools/verify.py
	for ranks in 1 2 4; do $(DEEPSPEED) --num_accelerators $$ranks tools/verify.py \
		--ds-config tests/verify/stage3.json || exit 1; done
	for ranks in 2 4; do $(DEEPSPEED) --num_accelerators $$ranks tools/verify.py || exit 1; done

# On a machine with a GPU: kernels compiled, views, training, the gradient, and two figures.
gpu-check: .venv/.installed
	TRITON_INTERPRET=0 python -m pytest -s -k "not numba" $(GPU_TESTS) $(FLAGS)
	python tools/verify.py
	python benchmarks/nt_xent.py --device cuda
	python benchmarks/lars.py --device cuda

# Tier P of the drills; FLAGS="--tier L --out benchmarks/results" for a release.
drills: .venv/.installed
	python tests/drills/run.py $(FLAGS)

check: .venv/.installed
	ruff format --check .
	ruff check .
	pyright
	lint-imports
	codespell
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

format: .venv/.installed
	ruff format .
	ruff check --fix .

# A failed or interrupted set-up leaves no stamp, so the next run does it again.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv || ($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e ".[dev,bench]"
	touch $@

data/photos: | .venv/.installed
	python tools/fetch_dataset.py photos --out $@

data/demo/%/manifest.json: | data/photos
	python tools/make_shards.py data/photos/$* --out data/demo/$*

data/images/cifar10: | .venv/.installed
	python tools/fetch_dataset.py cifar10 --out $@ $(if $(FROM),--from $(FROM))

data/cifar10/%/manifest.json: | data/images/cifar10
	python tools/make_shards.py data/images/cifar10/$*.tar --out data/cifar10/$*

clean:
	rm -rf .venv data runs build *.egg-info .pytest_cache .ruff_cache
