#!/usr/bin/env bash
# A shuffled stream of Parquet files ends every pass with five seconds of sleep, also one of 16 rows.
#
# `IterableDataset.shuffle` of datasets 5.2 interleaves up to ten files by default, with a pool of threads, and sleeps at
# the end of a pass for the threads of pyarrow to end. So each epoch of a training costs five seconds more, in
# each of its workers. In order, or with `max_buffer_input_shards=1`, a pass takes what reading takes. Expected: the
# same of both.
# Seen with datasets 5.2.0 and pyarrow 26.0.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "datasets==5.2.0" "pyarrow==26.0.1"
cd "$work"
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1
cat > read.py <<'PYTHON'
import time

import datasets

datasets.disable_progress_bars()
for number in range(2):
    datasets.Dataset.from_dict({"number": range(8 * number, 8 * number + 8)}).to_parquet(f"rows-{number}.parquet")


def seconds(files, **options):
    """Of a pass over all rows."""
    rows = datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    if options:
        rows = rows.shuffle(seed=0, **options)
    start = time.monotonic()
    assert sorted(row["number"] for row in rows) == list(range(8 * len(files)))
    return round(time.monotonic() - start)


both = ["rows-0.parquet", "rows-1.parquet"]
print("two files in order:", seconds(both), "s")
print("one file shuffled:", seconds(both[:1], buffer_size=4), "s")
print("two files shuffled:", seconds(both, buffer_size=4), "s")
print("two files shuffled, max_buffer_input_shards=1:", seconds(both, buffer_size=4, max_buffer_input_shards=1), "s")
PYTHON
seen=$("$work/venv/bin/python" read.py)
echo "datasets 5.2.0, pyarrow 26.0.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="two files in order: 0 s
one file shuffled: 5 s
two files shuffled: 5 s
two files shuffled, max_buffer_input_shards=1: 0 s"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
