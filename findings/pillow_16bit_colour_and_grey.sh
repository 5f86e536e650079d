#!/usr/bin/env bash
# Library: Pillow 13.0.0.
# Expected: a PNG of 16 bits a sample becomes the same 8-bit image whether the file is stored as colour or as grey:
#   the upper 8 bits of every sample.
# What happens: colour is scaled (65535 becomes 255) and opens as mode "RGB", with nothing that tells of 16 bits. Grey
#   opens as "I;16" and convert("RGB") or convert("L") clips it: everything from 255 on becomes white.
# Why it matters: the usual Image.open(file).convert("RGB") in front of a vision transformer turns a 16-bit grey image
#   (X-ray, microscope, depth map) into a nearly white one, and takes 8 of 16 bits from colour without a message.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
fi
"$PYTHON" - "$folder" <<'EOF'
import io
import struct
import sys
import zlib

import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__, "numpy", np.__version__)


def png(samples, colour):
    """A PNG of 16 bits a sample with one row: grey, or the same values in three channels."""
    row = np.repeat(samples, 3) if colour else samples
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", len(samples), 1, 16, 2 if colour else 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0" + row.astype(">u2").tobytes()),
        b"IEND": b"",
    }
    chunks = (struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


samples = np.array([0, 200, 300, 1000, 32768, 65535], np.uint16)
upper = (samples >> 8).tolist()
print("expected: the samples", samples.tolist(), "become", upper, "in both")
found = {}
for colour in (True, False):
    image = Image.open(io.BytesIO(png(samples, colour)))
    found[image.mode] = np.asarray(image.convert("RGB"))[0, :, 0].tolist()
    print(f"seen: {'colour' if colour else 'grey'}: mode {image.mode}, becomes {found[image.mode]}")
as_described = found == {"RGB": upper, "I;16": np.minimum(samples, 255).tolist()}

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
