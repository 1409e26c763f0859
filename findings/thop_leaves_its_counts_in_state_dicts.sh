#!/usr/bin/env bash
# thop's `profile` counts in buffers of every module and takes them away only from those modules that it has a counter
# for: `total_ops` and `total_params` of all others stay in the state dict, which the same model then cannot load.
#
# Expected: profiling leaves the model as it was.
# Seen with thop 0.1.1.post2209072238 and torch 2.14.1 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6" "thop==0.1.1.post2209072238"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from thop import profile
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

model = build()
profile(model, inputs=(torch.randn(1, 8),), verbose=False)
print(sorted(model.state_dict().keys() - build().state_dict().keys()))
try:
    build().load_state_dict(model.state_dict())
except RuntimeError as error:
    print("Unexpected key(s)" in str(error))
PYTHON
)
echo "thop 0.1.1.post2209072238, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="['1.total_ops', '1.total_params']
True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
