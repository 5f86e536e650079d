# Two commands: `make book` and `make test`. Everything lands in .venv/ and build/.
# Two makes at once take turns. A build that fails or is killed leaves the book as it was.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHAPTERS := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb))
EXECUTED := $(CHAPTERS:%=build/notebooks/%.ipynb)
LOCKED := $(PYTHON) book/lock.py Makefile
JUPYTER_BOOK ?= $(BIN)/jupyter-book
SOURCES := $(shell find lib/vitregs -name '*.py') $(shell find data/paper data/zoo -type f)

.PHONY: book test nightly portable lint notebooks benchmarks gpu-pack gpu-merge environment clean
.DELETE_ON_ERROR:

# Two chapters at a time, of one thread each: small networks gain little from a second, and lose much where it must wait.
book:
	@+$(LOCKED) $(MAKE) --no-print-directory -j 2 build/html/index.html
	@echo "The book: file://$(abspath build/html/index.html)"

environment:
	@+$(LOCKED) $(MAKE) --no-print-directory -s $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	@echo "Creating the environment in $(VENV) (about 3 minutes and 6 GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[book,train,hub,test]"
	@touch $@

build/notebooks/%.ipynb: notebooks/%.ipynb $(SOURCES) | $(VENV)/ready
	@echo "Executing $*"
	@OMP_NUM_THREADS=1 $(BIN)/vitregs run $* --out $@ --results build/results

# Built aside and moved into place when whole, dated as of its beginning: what changes meanwhile is built next time.
build/html/index.html: $(EXECUTED) $(shell find data/results -type f) $(shell find book -type f -not -name '*.pyc') | $(VENV)/ready
	@$(BIN)/vitregs scoreboard --boxes build/notebooks
	@rm -rf build/source build/jb build/old && mkdir -p build/source && touch build/begun
	@cp -r book build/source/book && cp -r build/notebooks build/source/notebooks
	@cp data/results/LOG.md build/source/book/log.md
	@$(BIN)/vitregs scoreboard --markdown > build/source/book/scoreboard.md
	@echo "Building the book"
	@$(JUPYTER_BOOK) build build/source --config book/_config.yml --toc book/_toc.yml --path-output build/jb \
		-W -n --keep-going -q > build/book.log 2>&1 || { cat build/book.log; exit 1; }
	@touch -r build/begun build/jb/_build/html/index.html
	@if [ -d build/html ]; then mv build/html build/old; fi && mv build/jb/_build/html build/html && rm -rf build/old

# Two workers of one thread each, as for chapters.
test: lint book
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# And what `test` leaves out for time: every chapter under nbval, more simulated draws, every arithmetic.
nightly: lint book
	VITREGS_NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
	@$(MAKE) --no-print-directory portable

# Every chapter under every arithmetic this machine can do; name some: make portable SETTINGS=default-1 WANTED="05 06"
portable: environment
	$(BIN)/python -m tests.portable $(SETTINGS:%=--setting %) $(WANTED:%=--chapter %)

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Stored results name the commit they come from, so nothing that they depend on may differ from it. Verdicts rest on the results
# of several chapters, so the boxes that show them are filled when all are stored.
notebooks: environment
	@changed=$$(git status --porcelain -- lib notebooks data) || { echo "make notebooks needs the git repository of the book"; exit 1; }; \
	test -z "$$changed" || { echo "Commit or stash first: stored results must come from a committed state, and these differ:" $$changed; exit 1; }
	@for chapter in $(CHAPTERS); do echo "Refreshing $$chapter"; $(BIN)/vitregs run $$chapter --out notebooks/$$chapter.ipynb --results data/results || exit 1; done
	@$(BIN)/vitregs scoreboard --boxes notebooks

benchmarks: environment
	$(BIN)/python -m tests.benchmarks

# Many runs by one command on a GPU that is lent for minutes: make gpu-pack IMAGES=folder WEIGHTS=file [ARMS='"ARM" "ARM setting=value"'],
# there `python .gpu/run.py --out OUT --minutes 6`, and make gpu-merge FROM=OUT files what came back.
gpu-pack: environment
	@$(BIN)/python -m vitregs.train.pack pack --images "$(IMAGES)" --weights "$(WEIGHTS)" $(if $(ARMS),--arms $(ARMS))

gpu-merge: environment
	@$(BIN)/python -m vitregs.train.pack merge "$(FROM)"

clean:
	$(LOCKED) rm -rf build
