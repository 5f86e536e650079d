#!/usr/bin/env bash
# Library: lightly 1.6.0.
# Expected: a DINO loss that is only evaluated, in eval mode and under no_grad, leaves the training as it was.
# What happens: every call moves the loss's centre, a buffer that all later losses and gradients depend on.
# Why it matters: watching the loss on validation images during DINO training changes the training, and a run with
#   such an evaluation cannot be reproduced without it.
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
import sys
from importlib.metadata import version

import torch
from lightly.loss import DINOLoss

print("lightly", version("lightly"), "torch", torch.__version__)
print("expected: the same loss for the same outputs before and after an evaluation of others; an unmoved centre")
torch.manual_seed(0)
loss = DINOLoss(output_dim=8)
loss.eval()
teacher, student = [torch.randn(16, 8)] * 2, [torch.randn(16, 8)] * 2
others = [torch.randn(16, 8) + torch.arange(8)] * 2
start = loss.center.clone()
with torch.no_grad():
    for _ in range(10):
        loss(others, others, epoch=0)
moved = float((loss.center - start).abs().max())
fresh = DINOLoss(output_dim=8).eval()
with torch.no_grad():
    before, after = float(fresh(teacher, student, epoch=0)), float(loss(teacher, student, epoch=0))
print(f"seen: the centre moved by {moved:.2f}; loss without the evaluation {before:.2f}, after it {after:.2f}")
as_described = moved > 0.1 and abs(after - before) > 0.01

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
