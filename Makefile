# make demo | test | slow | wheelnbs | course | bench | study NAME=… | gpu | readme | clean     (PYTHON=python3.12 make … picks another Python)
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export OMP_WAIT_POLICY ?= PASSIVE
TESTENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=agg
NB_WORKERS ?= 2
.NOTPARALLEL:
.PHONY: demo test sync notebooks slow wheelnbs course bench study gpu readme export clean

demo: .venv/installed
	$(BIN)/rulediff demo

test: sync notebooks
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --deselect tests/test_sync.py

sync: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_sync.py

notebooks: .venv/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TESTENV) $(BIN)/nbdev-test --n-workers $(NB_WORKERS) --timing --do-print

slow: .venv/installed-dev
	$(BIN)/python -m pip install -q -e '.[dev,ray]' $(PIPC)
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 MPLBACKEND=agg $(BIN)/nbdev-test --flags slow --n-workers 0 --cell-timeout 7200 --timing --do-print
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 7200

# Every notebook from the wheel alone, in an empty folder and a real kernel; a part of `slow`.
wheelnbs: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 7200 tests/test_wheelnbs.py

course: .venv/installed-dev
	cd nbs && ../$(BIN)/jupyter lab

bench: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench

# Measures what is missing of a study and puts its table into the package; without NAME it lists the studies.
WORKERS ?= 2
study: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/rulediff study $(if $(NAME),$(NAME) --workers $(WORKERS) --ship)

# The prepared run for a machine that has an accelerator for ten minutes: it stops by itself and leaves at most eight files in OUT.
# It takes the .venv if there is one, else a Python that has the dependencies. ARGS=--quick tries it at tiny sizes on any machine.
BUDGET ?= 540
OUT ?= runs/gpu/out
GPUPY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	HF_HUB_OFFLINE=1 $(GPUPY) -m rulediff_nb study gpu --budget $(BUDGET) --workers 3 --out runs/gpu/run $(ARGS)
	$(GPUPY) -c "from rulediff_nb.gpu import collect; print(*collect('runs/gpu/run', '$(OUT)'), sep='\n')"

readme: .venv/installed-dev
	$(BIN)/python tests/make_readme.py

export: .venv/installed-dev
	$(BIN)/nbdev-export

# Two stamps: the demo needs the package alone, the rest the dev extra as well. A stamp is renewed when a file it was
# made from has changed. CONSTRAINTS= (empty) takes the newest versions instead of the pinned ones.
CONSTRAINTS ?= constraints.txt
PIPC := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rulediff_nb needs Python 3.11 or later: PYTHON=python3.11 make …")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -e . $(PIPC)
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -e '.[dev]' $(PIPC)
	touch .venv/installed $@

clean:
	rm -rf .venv build dist *.egg-info _proc _docs
