#!/usr/bin/env bash
# Libraries: transformers 5.24.0 and timm 1.0.31.
# Expected: DINOv2 (without registers, positions for 518 pixels) used at 224 pixels has the same positions in both.
# What happens: transformers resizes the table by bicubic interpolation without anti-aliasing, timm with it. For
#   DINOv2 with registers transformers anti-aliases too and the two agree.
# Why it matters: features of "the same model" differ between the two libraries at every size below 518 pixels, for
#   one of two networks that are compared to see what registers do.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        transformers==5.24.0 timm==1.0.31 torch==2.15.0 torchvision==0.29.2
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import timm
import torch
import transformers
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

print("timm", timm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("expected: 0% of the length of the positions, for both networks and both tables")
file = f"{sys.argv[1]}/weights.pth"
wave = torch.arange(37.0) / 37 * 2 * torch.pi
noise = torch.randn(1, 37 * 37, 384, generator=torch.Generator().manual_seed(0))
smooth = (wave.sin()[:, None] + (2 * wave).cos()).reshape(1, -1, 1) * noise[:, :1]
found = {}
for network, configuration, model_class in (
    ("vit_small_patch14_dinov2", Dinov2Config, Dinov2Model),
    ("vit_small_patch14_reg4_dinov2", Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
):
    for kind, table in {"smooth, with a tenth of noise": smooth + 0.1 * noise, "noise": noise}.items():
        source = timm.create_model(network, depth=1)
        with torch.no_grad():
            source.pos_embed[:, -37 * 37 :] = table
        torch.save(source.state_dict(), file)
        local = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
        small = timm.create_model(network, img_size=224, depth=1, **local)
        in_timm = small.pos_embed[:, -256:]
        other = model_class(
            configuration(hidden_size=384, num_attention_heads=6, num_hidden_layers=1, image_size=518, patch_size=14)
        ).embeddings
        with torch.no_grad():
            other.position_embeddings[:, 1:] = table
            in_transformers = other.interpolate_pos_encoding(torch.zeros(1, 257, 384), 224, 224)[:, 1:]
            found[network, kind] = float((in_timm - in_transformers).norm() / in_timm.norm())
        print(f"seen: {network}, table {kind}: at 224 pixels positions differ by {found[network, kind]:.0%}")
plain, plain_noise, registers, registers_noise = found.values()
as_described = plain > 0.02 and plain_noise > 0.5 and max(registers, registers_noise) < 1e-4

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
