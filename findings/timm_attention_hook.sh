#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: `AttentionExtract(model, method="hook")` returns the attention maps of a ViT, or says why it cannot.
# What happens: with fused attention, which is timm's default, it returns an empty dictionary and says nothing: the
#   softmax that it hooks is never called. After set_fused_attn(False), before the model is made, it returns the maps.
# Why it matters: a loop over the maps of all blocks runs over nothing and passes for a result.
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
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

print("timm", timm.__version__, "torch", torch.__version__)
print("expected: 3 maps for 3 blocks, with fused attention and without it")
found = {}
for fused in (True, False):
    set_fused_attn(fused)
    model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    with torch.no_grad():
        found[fused] = AttentionExtract(model, method="hook")(torch.randn(1, 3, 224, 224))
    print(f"seen: fused attention {fused}: {len(found[fused])} maps")
as_described = len(found[True]) == 0 and len(found[False]) == 3

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
