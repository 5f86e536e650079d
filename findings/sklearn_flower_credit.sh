#!/usr/bin/env bash
# Library: scikit-learn 1.9.1 (the same in 1.5.2).
# Expected: the credit that ships beside the sample image flower.jpg names the photographer whom its source names.
# What happens: README.txt says "Some rights reserved by" the photographer of the other image, china.jpg, while both links of
#   flower.jpg lead to another account. The licence (CC BY 2.0) asks for the right name.
# Why it matters: a figure that shows the flower and copies the line beside it credits the wrong person.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check scikit-learn==1.9.1
fi
"$PYTHON" - <<'EOF'
import re
import sys
from importlib.metadata import version
from pathlib import Path

import sklearn

print("scikit-learn", version("scikit-learn"))
text = (Path(sklearn.__file__).parent / "datasets" / "images" / "README.txt").read_text()
found = {}
for part in text.split("Image: ")[1:]:
    name = part.split()[0]
    credit = re.search(r"reserved by (\S+)", part)[1]
    found[name] = (credit, sorted(set(re.findall(r"flickr\.com/photos/([^/]+)/", part))))
print("expected: the name in the credit is the account in the links")
print("seen:", {name: f"credited to {credit}, linked to {', '.join(links)}" for name, (credit, links) in found.items()})
agree = {name: links == [credit] for name, (credit, links) in found.items()}
sys.exit(agree != {"china.jpg": True, "flower.jpg": False})
EOF
