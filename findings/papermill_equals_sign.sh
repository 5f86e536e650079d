#!/usr/bin/env bash
# Library: papermill 2.7.0.
# Expected: `inspect_notebook` lists every parameter of a `parameters` cell, with type, default and the comment as help.
# What happens: a parameter whose comment or default holds an equals sign is left out, with the log line "Unable to parse".
#   The cell is plain Python, runs as ever, and the parameter can be set; but `papermill --help-notebook` does not show it,
#   and a run that sets it warns of an unknown parameter.
# Why it matters: `threshold: float = 1.6  # outlier if norm / median >= 1.6`, the natural way to say what a number means.
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
from importlib.metadata import version

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

print("papermill", version("papermill"))
lines = {
    "count": "count: int = 64  # images",
    "ratio": "ratio: float = 1.6  # outlier if norm / median >= 1.6",
    "query": 'query: str = "split=test"  # which part',
}
found = {}
for name, line in lines.items():
    cell = new_code_cell(line, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    file = f"{sys.argv[1]}/{name}.ipynb"
    nbformat.write(new_notebook(cells=[cell], metadata=kernel), file)
    found[name] = sorted(papermill.inspect_notebook(file))
print("expected: each line names one parameter")
print("seen:", found)
sys.exit(found != {"count": ["count"], "ratio": [], "query": []})
EOF
