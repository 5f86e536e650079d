#!/usr/bin/env bash
# Library: kornia 0.9.0 (compared with torchvision 0.29.2).
# Expected: kornia's RandomResizedCrop, which stands for torchvision's on batches, averages over pixels where it
#   shrinks, as torchvision's does by default.
# What happens: it samples single points in both of its cropping modes and has no option for anti-aliasing (Resize has
#   one, off by default). Noise of 512 pixels shrunk to 64 keeps most of its contrast.
# Why it matters: a vision transformer trained on such crops sees aliased texture, and full-size, anti-aliased images
#   in evaluation: a shift between training and test that no setting shows.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check kornia==0.9.0 torch==2.15.0 torchvision==0.29.2
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import kornia
import torch
import torchvision
from torchvision.transforms import v2

print("kornia", kornia.__version__, "torchvision", torchvision.__version__, "torch", torch.__version__)
torch.manual_seed(0)
images = torch.rand(1, 3, 512, 512)
whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
print(f"expected: 0.04 or less by all: 8 times smaller white noise, with a standard deviation of {images.std():.2f}")
reference = v2.RandomResizedCrop(64, **whole)(images).std().item()
print(f"seen: torchvision: standard deviation {reference:.3f}")
found = []
for mode in ("slice", "resample"):
    crop = kornia.augmentation.RandomResizedCrop((64, 64), cropping_mode=mode, **whole)
    found.append(crop(images).std().item())
    print(f"seen: kornia, cropping_mode={mode!r}: standard deviation {found[-1]:.3f}")
as_described = reference < 0.05 and min(found) > 0.12

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
