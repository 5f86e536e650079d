#!/usr/bin/env bash
# Library: lightly 1.6.0.
# Expected: a teacher is a deep copy of its student, and a new DINOProjectionHead can be copied like any module.
# What happens: copy.deepcopy raises a RuntimeError. The head's last layer has the deprecated weight norm of torch,
#   which keeps the computed weight, part of the graph, as an attribute. After one forward pass under no_grad the copy
#   works, so that whether it does depends on what was called last.
# Why it matters: the usual way round it, a second head from the constructor, gives a teacher with weights of its own:
#   DINO and DINOv2 then start from two different networks unless one loads the student's state.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check lightly==1.6.0 torch==2.15.0 torchvision==0.29.2
fi
"$PYTHON" - "$folder" <<'EOF'
import copy
import sys
import warnings
from importlib.metadata import version

import torch

warnings.simplefilter("ignore")
from lightly.models.modules import DINOProjectionHead

print("lightly", version("lightly"), "torch", torch.__version__)
print("expected: a copy, at any time")


def copies(head):
    try:
        copy.deepcopy(head)
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:60]} ..."
    return "a copy"


head = DINOProjectionHead(16, 32, 8, 64)
new = copies(head)
with torch.no_grad():
    head(torch.zeros(2, 16))
later = copies(head)
print("seen: a new head:", new)
print("seen: after a forward pass under no_grad:", later)
as_described = new.startswith("RuntimeError") and later == "a copy"

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
