#!/usr/bin/env bash
# safetensors writes other bytes each time where the header holds more than one word of metadata.
#
# The words stand in the order of a hash table that is seeded anew for each call, so that two files with the same tensors
# and the same metadata have different hashes, in one process already. Expected: equal content gives equal bytes, as it
# does with one word and as it does for the tensors, which are sorted; caches and registries that name a file by its hash
# count on that.
# Seen with safetensors 0.8.0 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "safetensors==0.8.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

TENSORS = {"lora_B": np.ones((2, 3), np.float32), "lora_A": np.zeros((3, 2), np.float32)}
WORDS = {"format": "pt", "method": "LoRA", "rank": "8", "backbone": "vit_small_patch14_dinov2"}


def files(metadata):
    """What fifty calls write."""
    return {save(dict(TENSORS), metadata=metadata) for _ in range(50)}


print("safetensors", version("safetensors"))
for count in (1, 4):
    written = files(dict(list(WORDS.items())[:count]))
    equal = all(np.array_equal(load(file)[name], values) for file in written for name, values in TENSORS.items())
    print(f"{count} of metadata: {'one file' if len(written) == 1 else 'several files'}, equal tensors: {equal}")
PYTHON
)
echo "$seen"
expected="safetensors 0.8.0
1 of metadata: one file, equal tensors: True
4 of metadata: several files, equal tensors: True"
[ "$seen" = "$expected" ] || { echo "changed: expected"; echo "$expected"; exit 1; }
