# Every target does all the set-up it needs: on a machine where nothing is missing that takes a second.
# Run as root or as a user who may use sudo.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PYTHON_IN := $(VENV)/bin/python
# Network namespaces need root. A root-owned cache would be in the way of the user's next run.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CI) env PYTHONDONTWRITEBYTECODE=1
PYTEST := $(AS_ROOT) $(PYTHON_IN) -m pytest -p no:cacheprovider
# So many files of tests at once: their networks and processes are each their own.
JOBS ?= 2
PYTHONS ?= $(wildcard $(foreach v,11 12 13 14,/usr/bin/python3.$(v) /usr/local/bin/python3.$(v) \
             $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.$(v).*/bin/python3))

.PHONY: help setup demo test lint test-pure test-all-pythons bench fuzz fake-kernel simulate calm calm-hour mutants soak \
        systemd clean

help:
	@echo "make demo              watch attackers being contained (about two minutes)"
	@echo "make test              lint and every test, also those that need the kernel"
	@echo "make lint              ruff, mypy, and the compiler's warnings"
	@echo "make test-pure         the tests that need no root"
	@echo "make test-all-pythons  those, on each Python 3.11 or later found here"
	@echo "make bench             the figures, as ratios measured in one run"
	@echo "make fuzz              the long form of the generated tests"
	@echo "make fake-kernel       the tests' kernel against the real one, two thousand times"
	@echo "make simulate          the guard in 10,000 simulated gateways (SEEDS=, or SEED= for one again)"
	@echo "make calm              a calm day at each sample policy, in simulated time (HOURS=, POLICY=, SEED=)"
	@echo "make calm-hour         an hour of the same with real sockets beside a real guard (MINUTES=, POLICY=)"
	@echo "make mutants           how many mistakes put into the guard the simulation finds"
	@echo "make soak              half an hour of attacks and honest load at once"
	@echo "make systemd           the service in a container with a real systemd"
	@echo "make clean             remove what these made in this directory"

setup:
	@./.ci/setup

demo: setup
	@$(AS_ROOT) $(PYTHON_IN) -m rstguard lab demo

lint: setup
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m mypy
	cc -Wall -Wextra -Werror -fsyntax-only \
	  -I"$$($(PYTHON_IN) -c 'import sysconfig; print(sysconfig.get_path("include"))')" rstguard/kernel/_queue.c

test: lint
	@./.ci/setup --tests
	$(PYTEST) -n $(JOBS) --dist loadfile

test-pure: setup
	$(PYTHON_IN) -m pytest -m "not netns and not fuzz_long and not soak_long and not kernel_long and not systemd"

test-all-pythons:
	@./.ci/setup --packages
	@set -eu; tried=" " failed=""; for python in $(PYTHONS); do \
	  version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || continue; \
	  case "$$tried" in *" $$version "*) continue ;; esac; \
	  tried="$$tried$$version "; \
	  PYTHON="$$python" ./.ci/setup --venv ".venv-$$version"; \
	  echo "== Python $$version ($$python)"; \
	  ".venv-$$version/bin/python" -m pytest -q -p no:cacheprovider \
	    -m "not netns and not fuzz_long and not soak_long and not kernel_long and not systemd" || failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed on Python:$$failed" >&2; exit 1; fi

bench: setup
	$(AS_ROOT) $(PYTHON_IN) -m tests.bench

fuzz: setup
	$(PYTEST) -m fuzz_long --timeout=0

fake-kernel: setup
	$(PYTEST) -m kernel_long --timeout=0

simulate: setup
	$(PYTHON_IN) -m tests.simulation

calm: setup
	$(PYTHON_IN) -m tests.calm

calm-hour: setup
	$(AS_ROOT) $(PYTHON_IN) -m tests.calm.real

mutants: setup
	$(PYTHON_IN) -m pip install --quiet --disable-pip-version-check cosmic-ray==8.7.0
	$(PYTHON_IN) -m tests.simulation.mutants

soak: setup
	$(PYTEST) -s -m soak_long --timeout=0

systemd: setup
	$(PYTEST) -m systemd --timeout=0

clean:
	$(AS_ROOT) rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	$(AS_ROOT) rm -f rstguard/kernel/_queue.*.so
	$(AS_ROOT) find rstguard tests -name __pycache__ -type d -prune -exec rm -rf {} +
