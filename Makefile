# Two commands: `make book` and `make test`. Everything lands in .venv/ and build/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHAPTERS := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb))
EXECUTED := $(CHAPTERS:%=build/notebooks/%.ipynb)
SOURCES := $(shell find lib/vitregs -name '*.py') $(shell find data/paper data/zoo -type f)

.PHONY: book test nightly lint notebooks benchmarks environment clean
.DELETE_ON_ERROR:

# Two chapters at a time, of one thread each: small networks gain little from a second, and lose much where it must wait.
book: | $(VENV)/ready
	@$(MAKE) --no-print-directory -j 2 build/html/index.html
	@echo "The book: file://$(abspath build/html/index.html)"

environment: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	@echo "Creating the environment in $(VENV) (about 3 minutes and 6 GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[book,train,hub,test]"
	@touch $@

build/notebooks/%.ipynb: notebooks/%.ipynb $(SOURCES) | $(VENV)/ready
	@echo "Executing $*"
	@OMP_NUM_THREADS=1 $(BIN)/vitregs run $* --out $@ --results build/results

build/html/index.html: $(EXECUTED) $(shell find data/results -type f) $(shell find book -type f -not -name '*.pyc') | $(VENV)/ready
	@rm -rf build/source build/jb && mkdir -p build/source
	@cp -r book build/source/book && cp -r build/notebooks build/source/notebooks
	@cp data/results/LOG.md build/source/book/log.md
	@$(BIN)/vitregs scoreboard --markdown > build/source/book/scoreboard.md
	@echo "Building the book"
	@$(BIN)/jupyter-book build build/source --config book/_config.yml --toc book/_toc.yml --path-output build/jb \
		-W -n --keep-going -q > build/book.log 2>&1 || { cat build/book.log; exit 1; }
	@rm -rf build/html && cp -r build/jb/_build/html build/html

test: lint
	@$(MAKE) --no-print-directory book
	$(BIN)/python -m pytest -n 2 --dist loadscope

nightly: test
	$(BIN)/python -m pytest -n 2 --dist loadscope -m nightly

lint: | $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Stored results name the commit they come from, so nothing that they depend on may differ from it.
notebooks: | $(VENV)/ready
	@changed=$$(git status --porcelain -- lib notebooks data) || { echo "make notebooks needs the git repository of the book"; exit 1; }; \
	test -z "$$changed" || { echo "Commit or stash first: stored results must come from a committed state, and these differ:" $$changed; exit 1; }
	@for chapter in $(CHAPTERS); do echo "Refreshing $$chapter"; $(BIN)/vitregs run $$chapter --out notebooks/$$chapter.ipynb --results data/results || exit 1; done

benchmarks: | $(VENV)/ready
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf build
