# Set-up and the two commands of the README; everything happens inside .venv, which is brought up to date only when a
# requirement changes. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
REQUIREMENTS := setup.cfg pyproject.toml

.PHONY: demo app serve docs test quality wheels clean

demo: .venv/installed-lora  ## edit a photograph with the scene editor and print where the picture is
	$(BIN)/python examples/edit_photo.py

app: .venv/installed-app  ## edit in the browser with the scene editor, at http://127.0.0.1:7860
	$(BIN)/editar-hf app --model examples/scene-editor --image examples/photo.png --prompt "remove the dog"

serve: .venv/installed-serve  ## serve the scene editor at http://127.0.0.1:8000
	$(BIN)/editar-hf serve --model examples/scene-editor

docs: .venv/installed-docs  ## build the documentation in docs/_build/html, with warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

test: .venv/installed-dev  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quality: .venv/installed-dev  ## check style, imports and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# pip matches the number of a platform exactly.
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

wheels: | $(BIN)/python  ## pack what benchmarks/gpu_slot.sh unpacks on a machine without a network, in a minute
	rm -rf .whl
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --only-binary=:all: --python-version 3.12 \
		--implementation cp $(PLATFORMS:%=--platform %) --target .whl/site -r benchmarks/gpu_slot_wheels.txt
	tar -C .whl/site -cJf .whl/site.tar.xz . && rm -r .whl/site

clean:  ## remove the virtual environment
	rm -rf .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, this one is " + sys.version.split()[0] + ": try make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/installed-%: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@
