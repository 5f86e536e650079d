#!/usr/bin/env bash
# Library: datasets 5.2.0.
# Expected: load_dataset("parquet", data_files=FILE) gives what is in FILE, at least when its length and columns
#   change.
# What happens: the cache knows a local file by its path and its time of modification. Another file at the same place
#   with the same time gives the old rows, even though it has another size, other columns and more rows.
# Why it matters: archives, containers and synchronisation preserve times or set all of them to one; a data set that
#   was exchanged that way is then measured as the old one, without a message.
#
# PYTHON=/path/to/python skips the installation and uses that interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PYTHON:-}" ]]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
fi
"$PYTHON" - "$folder" <<'EOF'
import os
import sys
import warnings

os.environ["HF_HOME"] = f"{sys.argv[1]}/cache"
warnings.simplefilter("ignore")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq

print("datasets", datasets.__version__, "pyarrow", pa.__version__)
print("expected: 3 rows of one column, then 100 rows of two, then the same")
datasets.disable_progress_bars()
file = f"{sys.argv[1]}/table.parquet"


def write(columns, time):
    pq.write_table(pa.table(columns), file)
    os.utime(file, (time, time))
    data = datasets.load_dataset("parquet", data_files=file, split="train")
    print(f"seen: {os.path.getsize(file)} bytes of time {time}: {len(data)} rows of {data.column_names}")
    return len(data), data.column_names


larger = {"x": list(range(100)), "y": list(range(100))}
first, same_time, later = write({"x": [1, 2, 3]}, 10**9), write(larger, 10**9), write(larger, 10**9 + 60)
as_described = first == same_time == (3, ["x"]) and later == (100, ["x", "y"])

sys.exit(0 if as_described else "the behaviour is no longer the one described above")
EOF
