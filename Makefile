# The only place that knows the commands. `make` alone lists them.
# Everything runs in .venv, which the first command makes; after `make setup`
# nothing below needs a network.

VENV ?= .venv
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13 python3; \
	do command -v $$p; done))
REQUIREMENTS ?= requirements.txt
PORT ?= 8000
SEED ?= 0

BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BROWSER := $(VENV)/.browser
SANDBOX := $(VENV)/.sandbox
PIP := $(BIN)/python -m pip install --quiet --quiet
# Two processes; the next lesson, file or slow test goes to the one that is free.
PYTEST_2 := $(BIN)/python -m pytest -q -n 2
BY_FILE := $(PYTEST_2) --dist loadfile --no-loadscope-reorder
ONE_BY_ONE := $(PYTEST_2) --dist load --maxschedchunk 1
NBVAL := $(BY_FILE) --nbval --nbval-current-env \
	--nbval-cell-timeout=120 notebooks/*.ipynb
# Tests of the built pages; the rest of the slow ones run the notebooks.
SITE_TESTS := tests/test_site.py tests/test_search.py tests/test_design.py \
	tests/test_pdf.py
LESSON_TESTS := tests/test_answers.py tests/test_notebooks.py
SLOW_TESTS := $(LESSON_TESTS) $(SITE_TESTS)

# Lessons and pages are made with one thread: with more, sums round in another
# order and waiting threads slow a busy machine down. `make lab` uses them all.
check check-portable notebooks test book html pages: export OMP_NUM_THREADS ?= 1
check check-portable notebooks test book html pages: export OMP_WAIT_POLICY = PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup book html serve lab check test notebooks check-portable \
	check-colab newest pages quizzes assignments grade slides pdf zip validate \
	bench outside-vllm outside-ray outside-torchrun outside-openai clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
		awk -F ':.*## ' '{ printf "make %-16s %s\n", $$1, $$2 }'

setup: $(PACKAGES) $(BROWSER) $(SANDBOX)  ## make .venv with everything in it, browser too

book: html  ## build the book and serve it on this computer; PORT=8000
	@$(BIN)/python tools/serve.py $(PORT)

html: $(PACKAGES)  ## build the book into _build/html
	rm -rf _build/html _build/.doctrees
	$(BIN)/jupyter-book build . -W -n --keep-going

serve: $(PACKAGES)  ## serve what is built; PORT=8000
	@$(BIN)/python tools/serve.py $(PORT)

lab: $(PACKAGES)  ## open the exercise copies in JupyterLab
	$(BIN)/python -m jupyterlab notebooks/student

check: $(PACKAGES) $(BROWSER) $(SANDBOX)  ## everything that CI checks, cheap first
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BY_FILE) $(SLOW_TESTS:%=--ignore=%)
	$(BIN)/python tools/notebooks.py --check
	$(NBVAL)
	$(ONE_BY_ONE) $(LESSON_TESTS)
	$(MAKE) html
	$(BIN)/python tools/leaks.py
	$(PYTEST_2) --dist worksteal $(SITE_TESTS)

test: $(PACKAGES)  ## the tests of the package only
	$(BY_FILE) $(SLOW_TESTS:%=--ignore=%)

notebooks: $(PACKAGES)  ## run all lesson texts, write the notebooks
	$(BIN)/python tools/notebooks.py

check-portable: $(PACKAGES)  ## outputs also hold on AVX2 and on two threads
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(NBVAL)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST_2) \
		tests/test_notebooks.py -k the_rest_repeats
	OMP_NUM_THREADS=2 $(NBVAL)

check-colab: $(PACKAGES)  ## run an exercise copy in a bare environment (slow)
	$(BIN)/python tools/check_colab.py

# What can change a number. The book's own tools keep their pins.
LOOSE := torch|numpy|scipy|scikit-learn|transformers|tokenizers|safetensors|$\
	huggingface_hub|peft|accelerate|bitsandbytes|matplotlib|pillow|tqdm

newest:  ## check with the newest torch, transformers, ... in its own .venv
	sed -E 's/^($(LOOSE))==.*/\1/' requirements.txt > .newest.txt
	$(MAKE) check VENV=.venv-newest REQUIREMENTS=.newest.txt

pages: $(PACKAGES)  ## make again what pages take from lessons and records
	for page in conventions errata evidence outside paths coverage objectives \
			teaching instructors numbers; do \
		$(BIN)/python tools/$${page}_page.py || exit 1; done

quizzes: $(PACKAGES)  ## write the quizzes as Moodle XML and QTI, into _build/quizzes
	$(BIN)/python tools/export_quizzes.py

assignments: $(PACKAGES)  ## build the problem sets into _build/assignments; SEED=0
	$(BIN)/python tools/assignments.py --seed $(SEED)
	$(BIN)/python tools/leaks.py

grade: $(PACKAGES) $(SANDBOX)  ## grade a folder of submissions: SUBMISSIONS=folder
	@test -n "$(SUBMISSIONS)" || { echo "say which: \
	make grade SUBMISSIONS=folder"; exit 2; }
	$(BIN)/python tools/grade.py --seed $(SEED) "$(SUBMISSIONS)"

slides: $(PACKAGES)  ## make slides of the lessons, into _build/slides
	$(BIN)/python tools/make_slides.py
	$(BIN)/python tools/leaks.py _build/slides

pdf: html $(BROWSER)  ## print the book into _build/lora-from-scratch.pdf
	$(BIN)/python tools/make_pdf.py
	$(BIN)/python tools/leaks.py _build/lora-from-scratch.pdf

zip: html  ## pack the book into one zip that opens without a server
	$(BIN)/python tools/make_zip.py
	$(BIN)/python tools/leaks.py _build/lora-from-scratch.zip

validate: html  ## check the pages with html-validate (needs node and npm)
	npx --yes html-validate@9.7.1 --preset standard --formatter text \
		_build/html/*.html _build/html/book/*.html _build/html/notebooks/*.html

bench: $(PACKAGES)  ## time the layers against PEFT: 16 bits, 4, mixed batches
	OMP_NUM_THREADS=1 $(BIN)/python bench/against_peft.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/qlora.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/mixed_batch.py

# Our adapters in other systems, most in an environment of their own; no part
# of `make check`. The last results stand on a page of the book.
OUTSIDE := outside-vllm outside-ray outside-torchrun outside-openai
$(OUTSIDE): export OMP_NUM_THREADS ?= 1
$(OUTSIDE): export LORA_PROGRESS = 0

outside-vllm: .venv-outside-vllm/.packages  ## our adapters in vLLM (3.5 GB)
	$(<D)/bin/python tests/outside/vllm_greedy.py
	$(<D)/bin/python tools/outside_page.py

outside-ray: .venv-outside-ray/.packages  ## our engine in Ray Serve (1.6 GB)
	$(<D)/bin/python tests/outside/ray_replicas.py
	$(<D)/bin/python tools/outside_page.py

outside-torchrun: .venv-outside-torchrun/.packages  ## LoRA on two processes
	$(<D)/bin/torchrun --nproc_per_node 2 tests/outside/torchrun_lora.py
	$(<D)/bin/python tools/outside_page.py

outside-openai: $(PACKAGES)  ## OpenAI's client against our server
	$(BIN)/python tests/outside/openai_client.py
	$(BIN)/python tools/outside_page.py

clean:  ## remove what was built, keep .venv
	rm -rf _build .newest.txt .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# PyPI's torch for Linux carries 3 GB of CUDA libraries: without an NVIDIA GPU,
# take the CPU build of the same version first, where its index can be reached.
$(PACKAGES): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed; make PYTHON=/path/to/python")'
	@echo "Installing into $(VENV): 2 GB, some minutes, once"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || \
		$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25'
	@test "$$(uname -s)" != Linux || command -v nvidia-smi > /dev/null || \
		$(PIP) --no-deps --retries 0 --timeout 10 \
		--index-url https://download.pytorch.org/whl/cpu \
		$$(grep -E '^torch(==|$$)' $(REQUIREMENTS)) || \
		echo "No CPU build of torch at pytorch.org; taking PyPI's"
	@$(PIP) -r $(REQUIREMENTS)
	@$(BIN)/python -c 'import matplotlib.font_manager' # its first run warns
	@touch $@

# These run without a GPU, so they take the CPU build of torch anyhow. vLLM
# asks for three packages that its CPU build cannot import beside that torch.
.venv-outside-%/.packages: tests/outside/requirements-%.txt
	@echo "Installing into $(@D): some minutes, once"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --upgrade 'pip>=25' setuptools
	@$(@D)/bin/python -m pip install --quiet --quiet --no-deps --retries 0 \
		--timeout 10 --index-url https://download.pytorch.org/whl/cpu \
		$$(grep -E '^torch==' requirements.txt) || \
		echo "No CPU build of torch at pytorch.org; looking elsewhere"
	@$(@D)/bin/python -m pip install --quiet -r $<
	@$(@D)/bin/python -m pip uninstall --quiet --quiet --yes \
		torchvision torchaudio torchcodec
	@$(@D)/bin/python -m pip install --quiet --quiet --no-deps -e .
	@touch $@

$(BROWSER): tools/find_chromium.py | $(PACKAGES)
	@$(BIN)/python tools/find_chromium.py --install
	@touch $@

$(SANDBOX): tools/sandbox.py tools/worker.py | $(PACKAGES)
	@$(BIN)/python tools/sandbox.py --install
	@touch $@
