# Two commands: `make demo` plans and trains a tiny model, `make test` runs the tests.
# Each sets up .venv by itself; nothing but git, python >= 3.11 and make is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(RUN)/drumline plan recipes/tiny-code-lm.yaml
	$(RUN)/drumline run recipes/tiny-code-lm.yaml

test: $(VENV)/.ready-test
	PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=PASSIVE $(RUN)/python -m pytest -n 3 --dist loadgroup

lint: $(VENV)/.ready-test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "drumline needs python >= 3.11; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(RUN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
