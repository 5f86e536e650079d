#!/usr/bin/env bash
# Library: nbval 0.11.0 (with IPython 9.18.1, ipykernel 7.4.0).
# Expected: a notebook that was executed a moment ago passes `pytest --nbval`.
# What happens: a cell that ends in a semicolon, IPython's way to show no result, has no output in Jupyter, nbclient
#   or papermill, but fails in nbval: the kernel is asked to run without history, and IPython looks into its history
#   for the semicolon. The result is shown, and nbval reports an unexpected output.
# Why it matters: notebooks of figures end their cells in `axes.plot(...);`. None of them can be held against itself.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        nbval==0.11.0 nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0 ipython==9.18.1 pytest==9.2.0
fi
"$PYTHON" - "$folder" <<'EOF'
import re
import subprocess
import sys
from importlib.metadata import version

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

print(*(f"{name} {version(name)}" for name in ("nbval", "nbclient", "ipykernel", "ipython", "pytest")))
print("expected: both cells pass, as both were executed just now")
notebook = new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 + 1;")])
NotebookClient(notebook, kernel_name="python3").execute()
file = f"{sys.argv[1]}/fresh.ipynb"
nbformat.write(notebook, file)
print("seen: outputs of nbclient:", [len(cell.outputs) for cell in notebook.cells])
command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", file]
said = subprocess.run(command, capture_output=True, text=True, cwd=sys.argv[1])
lines = re.sub(r"\x1b\[[0-9;]*m", "", said.stdout).splitlines()
reason = next((line for line in lines if "Unexpected output" in line), "")
print("seen:", lines[-1], "|", reason)
as_described = (
    [len(cell.outputs) for cell in notebook.cells] == [1, 0] and "1 failed, 1 passed" in said.stdout and bool(reason)
)

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
