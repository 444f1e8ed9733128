# mits_nb: everything that a person does with this folder. `make` alone lists the commands.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUN    := $(VENV)/.ready-to-run
DEV    := $(VENV)/.ready-to-develop
FACTS  := settings.ini setup.py constraints.txt

.PHONY: help demo lab test sync run readme results docs wheel-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      set up, then forge, protect, detect and measure the built-in phantom (outputs/demo/report.html)"
	@echo "make lab       set up, then open the chapters in JupyterLab"
	@echo "make test      set up, then everything that continuous integration runs"
	@echo "make sync      clean the notebooks and export the modules"
	@echo "make run NB=x  execute one chapter in place, e.g. NB=01_scan"
	@echo "make readme    render README.md from nbs/index.ipynb"
	@echo "make results   render docs/results.md from the measured files"
	@echo "make docs      build the site in _docs/"
	@echo "make clean     remove what these commands made, the environment too"

# the pip that Python brings may be years old, and resolve for many minutes what a new one resolves in seconds
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^pip==' constraints.txt)"

# torch first and by its exact version, so that a build already on this machine is used
$(RUN): $(FACTS) | $(BIN)/python
	@echo "installing into $(VENV) (once; some minutes)"
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(FACTS) | $(RUN)
	@echo "adding the tools for tests and documentation"
	$(PIP) install -c constraints.txt -e '.[dev,docs]'
	@touch $(RUN) $@

demo: $(RUN)
	$(BIN)/mits_demo

lab: $(RUN)
	$(BIN)/jupyter lab nbs

sync: $(DEV)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

run: $(DEV)
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 --ExecutePreprocessor.store_widget_state=False nbs/$(NB).ipynb
	$(BIN)/nbdev_clean --fname nbs/$(NB).ipynb

readme: $(DEV)
	$(BIN)/python tools/readme.py

results: $(DEV)
	$(BIN)/python tools/results.py

docs: $(DEV)
	$(BIN)/python tools/docs.py

wheel-check: $(DEV)
	$(BIN)/python tools/wheel_check.py

test: $(DEV)
	$(BIN)/python tools/sync_check.py
	$(BIN)/python tools/readme.py --check
	$(BIN)/python tools/results.py --check
	$(BIN)/python tools/docs.py
	$(BIN)/python tools/wheel_check.py
	$(BIN)/python -m pytest tests --durations=40

clean:
	rm -rf $(VENV) _docs _proc build dist outputs *.egg-info
