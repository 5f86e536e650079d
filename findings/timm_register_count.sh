#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: models with registers say how many in one way; `num_reg_tokens` of VisionTransformer is that way.
# What happens: DINOv3 is built from timm's Eva class, which has registers (`reg_token`, 4 of them) and counts them in
#   `num_prefix_tokens`, but has no `num_reg_tokens`. The usual getattr(model, "num_reg_tokens", 0) says 0.
# Why it matters: such code takes the DINOv3 networks for networks without registers, and a figure of registers beside
#   patches leaves them out or mixes them with other tokens.
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

print("timm", timm.__version__, "torch", torch.__version__)
print("expected: 4 registers for both")
found = {}
for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
    model = timm.create_model(name, img_size=224, depth=1)
    found[name] = getattr(model, "num_reg_tokens", 0)
    print(f"seen: {name}: num_reg_tokens {found[name]}, reg_token {tuple(model.reg_token.shape)},",
          f"num_prefix_tokens {model.num_prefix_tokens}")
as_described = list(found.values()) == [4, 0] and model.reg_token.shape[1] == 4 and model.num_prefix_tokens == 5

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
