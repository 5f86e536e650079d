#!/usr/bin/env bash
# Library: xarray 2026.9.0 (with numpy 2.4.6).
# Expected: the mean of finite float16 values that are all 400 is 400, as numpy's own mean says, since there is no
#   NaN.
# What happens: DataArray.mean() gives inf. Its default for floats, skipna=True, sums in float16, whose largest number
#   is 65504; numpy's mean, and mean(skipna=False), sum in float32.
# Why it matters: token norms kept as float16 to save room have lengths of hundreds where a vision transformer has
#   outliers, and 196 tokens of an image are enough to overflow.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check xarray==2026.9.0 numpy==2.4.6
fi
"$PYTHON" - "$folder" <<'EOF'
import sys
import warnings

import numpy as np
import xarray as xr

print("xarray", xr.__version__, "numpy", np.__version__)
warnings.simplefilter("ignore")  # numpy does warn of the overflow
norms = xr.DataArray(np.full(196, 400, np.float16), dims="token")
print("expected: 400 three times")
default, exact, plain = norms.mean().item(), norms.mean(skipna=False).item(), float(norms.values.mean())
print(f"seen: mean() {default}, mean(skipna=False) {exact}, numpy's mean {plain}")
as_described = np.isinf(default) and exact == plain == 400

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
