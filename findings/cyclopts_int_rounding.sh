#!/usr/bin/env bash
# Library: cyclopts 5.5.2.
# Expected: a command with a parameter `layer: int` refuses `--layer 2.5`, as int("2.5") and argparse do.
# What happens: the text is rounded, half to even: 2.5 becomes 2, 3.5 becomes 4 and 2.999 becomes 3.
# Why it matters: in a command line around a network, a share typed where a count is wanted (`--images 0.5`) becomes a
#   whole number, here 0, and the command goes on.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check cyclopts==5.5.2
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import cyclopts

print("cyclopts", cyclopts.__version__)
print("expected: an error for each of 2.5, 3.5, 2.999 and 0.4")
app = cyclopts.App(result_action="return_value")


@app.default
def command(layer: int) -> int:
    return layer


found = {}
for text in ("2.5", "3.5", "2.999", "0.4"):
    try:
        found[text] = app(["--layer", text], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        found[text] = error
print("seen:", ", ".join(f"{text} becomes {value!r}" for text, value in found.items()))
as_described = list(found.values()) == [2, 4, 3, 0]

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
