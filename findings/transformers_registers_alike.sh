#!/usr/bin/env bash
# Library: transformers 5.24.0.
# Expected: the four registers of a `Dinov2WithRegistersModel` made from its configuration and trained from scratch
#   become four different tokens, as the registers of the published models are.
# What happens: all registers start as zeros and have no positions, so they are interchangeable: they get the same
#   gradient at every step and stay equal, in the parameters and behind the last layer, however long one trains. The
#   same training with registers drawn at random (standard deviation 0.02, as transformers' own DINOv3 draws them)
#   keeps them apart.
# Why it matters: whoever trains with N registers trains one register in N copies. Draw them before training.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.15.0
fi
"$PYTHON" - "$folder" <<'EOF'
import sys

import torch
import transformers
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

print("transformers", transformers.__version__, "torch", torch.__version__)
print("expected: registers that differ from each other after training, however they start")


def spread(tokens):
    """The distance of tokens (1 or n, registers, width) from their mean, as a share of their length."""
    return float((tokens - tokens.mean(1, keepdim=True)).norm() / tokens.norm())


def train(draw):
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            num_register_tokens=4,
        )
    )
    registers = model.embeddings.register_tokens
    if draw:
        torch.nn.init.normal_(registers, std=0.02)
    head = torch.nn.Linear(64, 10)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(30):  # a mark in one of ten columns of the image is its class
        images, labels = torch.randn(16, 3, 56, 56), torch.randint(0, 10, (16,))
        images[torch.arange(16), :, :, 5 * labels] += 4
        loss = torch.nn.functional.cross_entropy(head(model(images).last_hidden_state[:, 0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return registers.norm().item(), spread(registers), spread(model(images).last_hidden_state[:, 1:5])


made, drawn = train(draw=False), train(draw=True)
for name, (length, parameters, states) in {"as made": made, "drawn at random": drawn}.items():
    print(f"seen: {name}: length {length:.2f}, spread {parameters:.1e}, behind the last layer {states:.1e}")
as_described = made[0] > 0.01 and max(made[1:]) < 1e-2 and min(drawn[1:]) > 3e-2

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
