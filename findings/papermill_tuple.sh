#!/usr/bin/env bash
# Library: papermill 2.7.0.
# Expected: a parameter (224, 448) given to execute_notebook reaches the notebook as a tuple, or as a list like the
#   JSON record of it.
# What happens: the notebook gets the text "(224, 448)", while the record in the notebook's metadata says [224, 448].
# Why it matters: `for size in sizes` then runs over characters, `len(sizes)` is 10, and whoever looks up the record
#   finds that the run was right. Image sizes are the tuples of this field.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check papermill==2.7.0 nbformat==5.11.1
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

print("papermill", papermill.__version__, "nbformat", nbformat.__version__)
print("expected: sizes = (224, 448) or [224, 448]")
notebook = new_notebook(cells=[new_code_cell("sizes = (224,)", metadata={"tags": ["parameters"]})])
notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
before, after = (f"{sys.argv[1]}/{name}.ipynb" for name in ("before", "after"))
nbformat.write(notebook, before)
papermill.execute_notebook(before, after, {"sizes": (224, 448)}, prepare_only=True, progress_bar=False)
made = nbformat.read(after, 4)
line = made.cells[1].source.splitlines()[-1]
record = made.metadata["papermill"]["parameters"]["sizes"]
print("seen: the notebook runs", line, " and its record says", record)
as_described = line == 'sizes = "(224, 448)"' and record == [224, 448]

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
