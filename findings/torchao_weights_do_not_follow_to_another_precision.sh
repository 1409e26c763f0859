#!/usr/bin/env bash
# After `model.to(torch.bfloat16)`, weights that torchao quantised in float32 still name float32 as their type.
#
# An int8 layer then gives bfloat16 all the same, so that code which reads `weight.dtype` to choose a precision is wrong;
# a float8 layer raises a RuntimeError at its next call; an int4 one (Intx) follows. Expected: one behaviour, that of int4.
# Seen with torchao 0.18.0 and torch 2.14.1 on Python 3.11 (CPU), 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchao==0.18.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch
from torchao.quantization import (
    Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_,
)

int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
for name, configuration in (("int8", Int8WeightOnlyConfig()), ("int4", int4), ("float8", Float8WeightOnlyConfig())):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_(model, configuration)
    model.to(torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16
    try:
        gives = model(torch.ones(1, 64, dtype=torch.bfloat16)).dtype
    except RuntimeError:
        gives = "RuntimeError"
    print(f"{name}: weight.dtype {model[0].weight.dtype}, the layer gives {gives}")
PYTHON
)
echo "torchao 0.18.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="int8: weight.dtype torch.float32, the layer gives torch.bfloat16
int4: weight.dtype torch.bfloat16, the layer gives torch.bfloat16
float8: weight.dtype torch.float32, the layer gives RuntimeError"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
