# Everything runs in .venv inside this folder, which scripts/setup_env.py makes and keeps up to date.
#
#   PYTHON=python3.12   the interpreter to make .venv with
#   TORCH=2.11.0        another torch than the tested one (TORCH=2.13.0+cu126: a given build of it)
#   NOVA_CUDA=0         without the CUDA extension (1: fail if it cannot be built)
#   NOVA_CPP=0          without the C++ extension (likewise)

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean distclean

help:
	@echo 'make demo       make some small videos on this machine, then measure frames per second'
	@echo 'make test       run all tests and style checks'
	@echo 'make setup      only make .venv and install everything into it'
	@echo 'make lint       check style with ruff'
	@echo 'make format     rewrite the code in the style that lint asks for'
	@echo 'make clean      remove build outputs and caches'
	@echo 'make distclean  remove .venv too'

# The script itself sees in a moment whether anything is left to do.
setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	.venv/bin/nova generate --batch-file examples/shapes.txt --batch-size 6 --seed 0 --out build/demo.mp4
	$(VENV_PYTHON) benchmarks/fps.py

test: setup
	$(VENV_PYTHON) -m pytest -q tests -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: setup
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

# The extension built in place goes too, so the next set-up must install the project again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f nova_kernels/_c*.so .venv/nova-setup.stamp
	find nova nova_kernels scripts benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
