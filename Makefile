# make demo | test | slow | course | bench | certificate | recipes | curves | sampling | classifiers | guidance | readme | clean     (PYTHON=python3.12 make … picks another Python)
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
TESTENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=agg
NB_WORKERS ?= 2
.NOTPARALLEL:
.PHONY: demo test sync notebooks slow course bench certificate recipes curves sampling classifiers guidance readme export clean

demo: .venv/installed
	$(BIN)/rulediff demo

test: sync notebooks
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --deselect tests/test_sync.py

sync: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_sync.py

notebooks: .venv/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TESTENV) $(BIN)/nbdev-test --n-workers $(NB_WORKERS) --timing --do-print

slow: .venv/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 MPLBACKEND=agg $(BIN)/nbdev-test --flags slow --n-workers 0 --cell-timeout 7200 --timing --do-print
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 7200

course: .venv/installed-dev
	cd nbs && ../$(BIN)/jupyter lab

bench: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench

certificate: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/certify.py

recipes: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/recipes.py

curves: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/curves.py

sampling: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/sampling.py

classifiers: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/classify.py --weights rulediff_nb/weights/classifiers

guidance: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/guidance.py

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
