#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: `create_model("vit_small_patch14_dinov2", init_values=None)` builds the network without LayerScale, as
#   `VisionTransformer(init_values=None)` and the model's own function do.
# What happens: create_model drops every option whose value is None, so the preset (1e-5) stays and the network has
#   LayerScale. No option of a preset can be switched off by None through create_model; nothing is printed.
# Why it matters: an ablation of LayerScale compares a network with itself.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check timm==1.0.31 torch==2.15.0 torchvision==0.29.2
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import timm
import torch
from timm.models.vision_transformer import vit_small_patch14_dinov2

print("timm", timm.__version__, "torch", torch.__version__)
print("expected: Identity by both roads")
by_name = timm.create_model("vit_small_patch14_dinov2", init_values=None, depth=1).blocks[0].ls1
by_function = vit_small_patch14_dinov2(init_values=None, depth=1).blocks[0].ls1
print("seen: create_model:", by_name, " the model's own function:", by_function)
as_described = type(by_name).__name__ == "LayerScale" and isinstance(by_function, torch.nn.Identity)

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
