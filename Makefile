# Each target is enough on a fresh clone with python3 (3.11 or later, with venv).
PYTHON ?= python3
BIN := .venv/bin
ONCE ?=
PORT ?=
# More than cores, because most tests wait for processes; but no crowd on a large machine.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, 2 * (os.cpu_count() or 1)))')
ORDERS ?=

.PHONY: help demo test quick coverage orders mapped schemas asked bench crash endure soak races faults kills junk search check format lint types docs pages lock clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | sort

.venv/made: pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, %s is too old; try make PYTHON=python3.12 …" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# `make demo` needs only what running needs, and no installed package.
.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, %s is too old; try make PYTHON=python3.12 demo" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Installing what the service needs to run into .venv ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements.txt
	@touch $@

demo: $(if $(wildcard .venv/made),.venv/made,.venv/run) ## Send a recorded history to the service and show the result (ONCE=1 exits afterwards; PORT=)
	@PYTHONPATH=src $(BIN)/python -m logto_webhooks demo $(if $(filter-out 0 no,$(ONCE)),--once) $(if $(PORT),--port $(PORT))

test: .venv/made ## Run all tests
	$(BIN)/pytest -n $(WORKERS)

quick: .venv/made ## Run the tests that need neither PostgreSQL nor processes, in less than a minute
	$(BIN)/pytest -n 2 -m "not postgres and not process and not slow" tests/unit tests/integration

coverage: .venv/made ## Run all tests and measure line and branch coverage (report in build/coverage)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

orders: .venv/made ## Run the recorded histories in ORDERS random orders each (default 1000)
	LOGTO_WEBHOOKS_TEST_ORDERS=$(or $(ORDERS),1000) $(BIN)/pytest -n $(WORKERS) tests/integration/test_histories.py --durations 12

mapped: .venv/made ## Run the recorded histories through mapped tables, in ORDERS random orders each (default 200)
	LOGTO_WEBHOOKS_TEST_MAPPED_ORDERS=$(or $(ORDERS),200) $(BIN)/pytest -n $(WORKERS) tests/integration/test_mapping.py -k equal --durations 8

schemas: .venv/made ## Map generated tables, SEEDS of them (default 300) on each database
	LOGTO_WEBHOOKS_TEST_SCHEMAS=$(or $(SEEDS),300) $(BIN)/pytest -n $(WORKERS) tests/integration/test_generated_schemas.py

asked: .venv/made ## Run the recorded histories in ORDERS random orders each (default 200), with a Management API
	LOGTO_WEBHOOKS_TEST_ASKED_ORDERS=$(or $(ORDERS),200) $(BIN)/pytest -n $(WORKERS) tests/integration/test_refetch.py -k equals --durations 8

bench: .venv/made ## Compare with a plain server, a typical route and plain SQL (needs wrk; ROWS=, ROUNDS=)
	$(BIN)/python -m bench $(if $(ROWS),--rows $(ROWS)) $(if $(ROUNDS),--rounds $(ROUNDS))

crash: .venv/made ## Kill everything KILLS times (default 100) under load, and check the result
	$(BIN)/python -m tests.crash --kills $(or $(KILLS),100) $(if $(SEED),--seed $(SEED))

endure: .venv/made ## Load 2 receivers and 4 workers on one PostgreSQL for MINUTES (default 10)
	$(BIN)/python -m tests.crash --kills 0 --minutes $(or $(MINUTES),10) --workers 4 --database postgres $(if $(SEED),--seed $(SEED))

soak: .venv/made ## Serve for MINUTES (default 30) while PostgreSQL and handlers fail and attackers send requests
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

races: .venv/made ## Race deletions against additions and changes 1,000 times on PostgreSQL
	LOGTO_WEBHOOKS_TEST_RACES=1000 $(BIN)/pytest -n $(WORKERS) tests/integration/test_races.py

faults: .venv/made ## Kill Logto and the service while webhooks are lost, SEEDS times (default 50) per database
	LOGTO_WEBHOOKS_TEST_FAULTS=$(or $(SEEDS),50) $(BIN)/pytest -n $(WORKERS) tests/e2e/test_lossy_logto.py

kills: .venv/made ## Kill workers KILLS times (default 30) while their handlers fail at random
	LOGTO_WEBHOOKS_TEST_JOB_KILLS=$(or $(KILLS),30) $(BIN)/pytest tests/e2e/test_jobs_crash.py

junk: .venv/made ## Rotate a key amid JUNK forged requests (default 100000)
	LOGTO_WEBHOOKS_TEST_JUNK=$(or $(JUNK),100000) $(BIN)/pytest tests/integration/test_key_rotation.py -k with_credentials

search: .venv/made ## Run each property test with 3,000 new examples
	LOGTO_WEBHOOKS_TEST_PROFILE=search $(BIN)/pytest -n $(WORKERS) tests/integration/test_generated_histories.py tests/unit

check: .venv/made lint types test docs ## Run all checks: format, lint, layers, types, tests, docs

format: .venv/made ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: .venv/made ## Check the types with mypy, and those that users see with pyright, too
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

docs: .venv/made ## Build the docs into build/docs, and fail on a broken link
	$(BIN)/sphinx-build -c docs -n -W --keep-going -q . build/docs

pages: .venv/made ## Write the generated parts of the docs: options, events, states, output of examples
	$(BIN)/python -m tests.pages

lock: ## Pin the dependencies of development, the image and its build, with hashes
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --group dev --extra serve --extra cli --extra postgres --custom-compile-command 'make lock' -o requirements-dev.txt pyproject.toml
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --extra all --constraint requirements-dev.txt --custom-compile-command 'make lock' -o requirements.txt pyproject.toml
	printf 'hatchling\n' | $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --constraint requirements-dev.txt --custom-compile-command 'make lock' -o requirements-build.txt -

clean: ## Remove the files that other targets created
	rm -rf .venv dist build
