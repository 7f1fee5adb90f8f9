# `make` lists the targets. Each makes the environment first where it is not there or its requirements have changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo gpu test test-fast test-faults test-mutations coverage check pages notebooks train refine lab test-release test-install test-recipes \
	kaggle-env test-kernel test-browser kaggle-code kaggle-weights kaggle-push kaggle-check kaggle-submit

PYTHON ?= python3
SCALE ?= quick
MODEL ?= lite0
FOLD ?= 0
STAGE ?= 2
OVERRIDES ?=
KERNEL ?= submission
MESSAGE ?=
DRY_RUN ?=
JOBS ?= 2
COVERAGE ?=
KAGGLE_PYTHON ?=
PYTHON313 ?=
MINUTES ?= 8
OUTPUT ?=
bin := .venv/bin
stamp := .venv/requirements-are-installed
export OMP_WAIT_POLICY := PASSIVE# torch processes side by side would spin away each other's time

# papermill: rank 0's lines are shown; without </dev/null it takes a piped stdin for the path of its output
papermill = mkdir -p working/runs && $(bin)/papermill --log-output --no-progress-bar
parameters = -p model $(MODEL) -p fold $(FOLD) $(if $(OVERRIDES),-r overrides "$(OVERRIDES)") </dev/null

# one way only: --sync would trust file times, and could take an old .ipynb for the newer one
build_notebooks = $(bin)/jupytext --quiet --to ipynb --update $(1)/*.py && \
	$(bin)/nbstripout --extra-keys "metadata.language_info cell.metadata.papermill metadata.papermill" $(1)/*.ipynb

kaggle = $(bin)/kutils kaggle
dry = $(if $(DRY_RUN),--dry-run)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(stamp) ## the environment in .venv, exact versions of constraints.txt (PYTHON=python3.12 chooses another Python)

# $(1) a Python of an environment, $(2) pip's arguments. Wheels stay in pip's cache folder (PIP_CACHE_DIR moves it), so that
# another clone downloads nothing; pip's own cache would hold nothing where an index forbids it.
define install
@wheels=$$($(1) -m pip cache dir)/kutils-wheels; \
	echo "1 of 2: downloading what is not in $$wheels yet (3 GB in all): 2 to 5 minutes the first time"; \
	$(1) -m pip wheel --no-cache-dir --wheel-dir "$$wheels" "setuptools>=77" $(2) | sed -un 's/^ *\(Downloading .*)\)$$/  \1/p'; \
	rm -f "$$wheels"/kutils-*.whl; \
	echo "2 of 2: installing, 7 GB: 1 to 3 minutes"; \
	$(1) -m pip install --quiet --no-index --find-links "$$wheels" $(2)
endef

$(stamp): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; version = sys.version_info[:2]; name = "Python {}.{}".format(*version); \
		version < (3, 11) and sys.exit("error: $(PYTHON) is " + name + "; 3.11 or newer is needed: make env PYTHON=python3.12"); \
		version > (3, 13) and print("warning: the tests ran on Python 3.11 to 3.13, not yet on " + name)'
	$(PYTHON) -m venv .venv
	@$(bin)/python -m pip install --quiet --upgrade pip
	$(call install,$(bin)/python,-r requirements.txt -e '.[dev]' -c constraints.txt)
	@touch $@

demo: env ## the whole pipeline at small scale on the CPU, and a table of scores: 10 minutes (SCALE=full: longer)
	$(bin)/kutils demo --scale $(SCALE)

gpu: ## check and measure on this machine's GPUs with PYTHON as it is: torch, torchvision, timm (MINUTES=8, OUTPUT=FOLDER)
	$(PYTHON) -m kutils gpu-check --minutes $(MINUTES) $(if $(OUTPUT),--output "$(OUTPUT)")

test: env ## all tests but those of the targets below, on two processes: 6 minutes (JOBS=0: on one)
	$(bin)/python -m pytest -n $(JOBS) --dist worksteal --durations=20 $(COVERAGE)

test-fast: env ## the quick tests of the rooms that a change touches (against main, uncommitted files too): a minute
	@changed=$$(git diff --name-only $$(git merge-base HEAD main || echo HEAD); git ls-files --others --exclude-standard); \
	tests=$$(echo "$$changed" | sed -En 's,^(kutils|tests)/([a-z]+)/.*,tests/\2,p; s,^tests/test_[a-z_]+\.py$$,&,p; \
		s,^notebooks/.*,tests/test_notebooks.py,p; s,^kutils/demo\.py$$,tests/test_demo.py,p' | sort -u); \
	$(bin)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not recipes and not kernel and not browser' \
		$$(ls -d tests/test_rooms.py $$tests)

coverage: ## make test, and what share of each room's lines it runs: none may be below 85 %
	$(MAKE) test COVERAGE="--cov=kutils --cov-report="
	@rm -f .coverage.* */.coverage.*  # cut short by the tests that kill processes
	@for room in $$(ls -d kutils/*/ | grep -v __); do echo "$$room"; \
		$(bin)/coverage report --include="$$room*" --format=total --fail-under=85; done

test-faults: env ## kills, damaged files, full disks and the like, done to the commands at random: 20 minutes (root: all of it)
	PYTHONPATH=tests:. $(bin)/python tests/fault_campaign.py --jobs $(JOBS)

test-mutations: env ## are the tests sharp? each fault of tests/mutations.toml, put into a copy, must fail a test: 15 minutes
	$(bin)/python tests/mutation_check.py

check: env ## style, format, notebooks built from their scripts and without outputs
	$(bin)/ruff check --output-format concise
	$(bin)/ruff format --check
	@built=$$(mktemp -d); trap 'rm -r "$$built"' EXIT; cp notebooks/*.py notebooks/*.ipynb notebooks/*.toml "$$built"; \
		$(call build_notebooks,"$$built"); diff -rq --exclude=.ipynb_checkpoints --exclude=README.md notebooks "$$built" || \
		{ echo "error: the notebooks are not what their scripts make, or hold outputs: make notebooks" >&2; exit 1; }

pages: env ## build kutils/README.md from the docstrings of its modules
	$(bin)/python tests/fixtures/rooms_page.py

notebooks: env ## build every notebooks/*.ipynb from its .py, without outputs
	$(call build_notebooks,notebooks)

train: env ## stage 1 of MODEL on FOLD; OVERRIDES="epochs=1 lr=3e-5" changes the recipe
	$(papermill) notebooks/train.ipynb working/runs/train_$(MODEL)_fold$(FOLD).ipynb $(parameters)

refine: env ## stage 2 (STAGE=3: 3) of MODEL on FOLD, from the stage before
	$(papermill) notebooks/refine.ipynb working/runs/refine$(STAGE)_$(MODEL)_fold$(FOLD).ipynb -p stage $(STAGE) $(parameters)

lab: env ## JupyterLab on the notebooks, in this environment; begin with explore.ipynb
	$(bin)/jupyter lab notebooks $(LAB_OPTIONS)

kaggle-code: env ## upload the committed package as a Kaggle data set (DRY_RUN=1: only show it, here and below)
	$(kaggle) code $(dry)

kaggle-weights: env ## upload the fitted ensemble and its checkpoints in float16 as a Kaggle data set
	$(kaggle) weights $(dry)

kaggle-push: env ## push a kernel (KERNEL=submission or train), wait for its run, fetch and check its output
	$(kaggle) push $(KERNEL) $(dry)

kaggle-check: env ## wait for the version of KERNEL pushed last, fetch its output and check it
	$(kaggle) check $(KERNEL)

kaggle-submit: env ## submit the checked version of the submission kernel (MESSAGE="...")
	$(kaggle) submit $(dry) $(if $(MESSAGE),--message "$(MESSAGE)")

test-release: test-recipes test-install ## what the gate leaves out, to be run before a release: 30 minutes

test-recipes: env ## the real networks, the twelve recipes in a chain on miniature data, and those beyond: 30 minutes
	$(bin)/python -m pytest -m recipes tests/test_recipes.py

kaggle-env: .venv-kaggle/requirements-are-installed ## Python 3.13 with Kaggle's versions in .venv-kaggle, for test-kernel

.venv-kaggle/requirements-are-installed: tests/kaggle_requirements.txt
	@for python in $(PYTHON313) python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13.*/bin/python; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null; then break; fi; python=; done; \
	test -n "$$python" || { echo "error: no Python 3.13; name one: make kaggle-env PYTHON313=PATH" >&2; exit 1; }; \
	"$$python" -m venv .venv-kaggle
	$(call install,.venv-kaggle/bin/python,-r $<)
	@touch $@

test-kernel: env $(if $(KAGGLE_PYTHON),,kaggle-env) ## the kernels as Kaggle runs them, without network (root): 8 minutes
	KAGGLE_PYTHON=$(or $(KAGGLE_PYTHON),$(CURDIR)/.venv-kaggle/bin/python) $(bin)/python -m pytest -m kernel tests/kaggle

test-browser: env ## explore in JupyterLab and a run's report, in chromium: 2 minutes; screenshots in working/browser/
	$(bin)/python -m pytest -m browser tests/test_browser.py

test-install: env ## a fresh copy with nothing but requirements.txt runs every command of the README: 15 minutes
	$(bin)/python tests/install_check.py
