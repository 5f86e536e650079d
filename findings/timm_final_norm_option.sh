#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: `forward_intermediates(norm=True)` gives intermediate tokens behind the model's final norm, for every ViT.
# What happens: where a model norms behind its average pooling (BEiT, EVA-02, a ViT made with global_pool="avg"),
#   `norm` is an Identity and the final norm is `fc_norm`. There norm=True and norm=False give the same tokens,
#   silently.
# Why it matters: a table that compares "normed" tokens of several models holds raw tokens for some of them, with
#   lengths that are not comparable.
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
print("expected: the option changes the tokens of all four models")
torch.manual_seed(0)
found = {}
for name, options in {
    "vit_tiny_patch16_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_tiny_patch16_224 ": {"global_pool": "avg"},
}.items():
    model = timm.create_model(name.strip(), depth=2, **options).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        which = {"indices": 1, "intermediates_only": True}
        normed, raw = (model.forward_intermediates(images, norm=norm, **which)[0] for norm in (True, False))
    found[name] = not torch.equal(normed, raw)
    print(f"seen: {name:24}{options or ''} norm is {type(model.norm).__name__}, fc_norm is",
          f"{type(model.fc_norm).__name__}: the option changes the tokens: {found[name]}")
as_described = list(found.values()) == [True, False, False, False]

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
