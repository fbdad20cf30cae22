PYTHON ?= python

.PHONY: help install test lint mutants smoke clean

help:
	@echo "make install   packages for running and developing"
	@echo "make test      all tests"
	@echo "make lint      ruff, formatting, mypy, who may import whom"
	@echo "make mutants   does a test notice when the mathematics is changed? (an hour; MUTANTS=mmedexpert.training.advantages*)"
	@echo "make smoke     every stage in about a minute, on the CPU"
	@echo "make clean     caches and build leftovers; outputs/ stays"

install:
	$(PYTHON) -m pip install -r requirements-dev.txt

test:
	$(PYTHON) -m pytest -n auto

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	lint-imports

MUTANTS ?=
mutants:
	$(PYTHON) -m mutmut run $(MUTANTS)
	$(PYTHON) -m mutmut results

smoke:
	$(PYTHON) run.py debug=smoke

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
