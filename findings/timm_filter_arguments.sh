#!/usr/bin/env bash
# Library: timm 1.0.31.
# Expected: a weight file loaded by hand, `load_checkpoint(model, file, filter_fn=checkpoint_filter_fn)` with the
#   filter of the model's own module, gives the weights that `create_model(pretrained=True)` makes of the same file.
# What happens: `create_model` binds arguments to that filter by family: FlexiViT's and C-RADIO's tables of positions
#   are resized by bilinear interpolation without anti-aliasing. The bare filter has the general defaults (bicubic,
#   anti-aliased), so at another image size the two roads give other tables. An ordinary ViT shows no difference.
# Why it matters: a fine-tuned or local copy of such weights behaves otherwise than the published model, with no
#   message.
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
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn

print("timm", timm.__version__, "torch", torch.__version__)
print("expected: the same table of positions by both roads, for every family")
file = f"{sys.argv[1]}/weights.pth"
found = {}
for name, saved, used in (
    ("vit_small_patch16_224", 224, 448),
    ("flexivit_small", 240, 480),
    ("vit_base_patch16_radio_v3", 256, 512),
):
    torch.manual_seed(0)
    source = timm.create_model(name, img_size=saved, depth=1)
    torch.nn.init.normal_(source.pos_embed, std=0.02)
    torch.save(source.state_dict(), file)
    own = timm.create_model(name, img_size=used, depth=1, pretrained=True, pretrained_cfg_overlay={"file": file})
    bare = timm.create_model(name, img_size=used, depth=1)
    load_checkpoint(bare, file, filter_fn=checkpoint_filter_fn)
    with torch.no_grad():
        found[name] = float((own.pos_embed - bare.pos_embed).norm() / own.pos_embed.norm())
    print(f"seen: {name}, {saved} to {used} pixels: tables differ by {found[name]:.0%} of their length")
ordinary, *bound = found.values()
as_described = ordinary < 1e-6 and min(bound) > 0.05

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
