#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: the preprocessing that timm derives from a model fits that model: after `create_model(..., img_size=384)`,
#   `resolve_model_data_config(model)` says 384.
# What happens: it says 224, the size of the published weights, since it reads the model's pretrained_cfg and not the
#   model. With dynamic_img_size=True nothing fails: the network for 384 pixels sees images of 224, its positions
#   resized.
# Why it matters: norms, attention maps and scores "at 384 pixels" are measured at 224.
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
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

print("timm", timm.__version__, "torch", torch.__version__)
print("expected: an input size of (3, 384, 384), and 24 x 24 patches and CLS behind the network")
model = timm.create_model("vit_tiny_patch16_224", img_size=384, dynamic_img_size=True, depth=1).eval()
config = resolve_model_data_config(model)
image = create_transform(**config)(Image.new("RGB", (640, 480)))
with torch.no_grad():
    tokens = model.forward_features(image[None])
print("seen: input size", config["input_size"], "for a table of", model.pos_embed.shape[1], "positions;",
      tokens.shape[1], "tokens behind the network, without a message")
as_described = config["input_size"] == (3, 224, 224) and tokens.shape[1] == 197 and model.pos_embed.shape[1] == 577

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
