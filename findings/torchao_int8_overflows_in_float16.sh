#!/usr/bin/env bash
# A layer with int8 weights of torchao gives infinity in float16 where the right answer is 7.65.
#
# Its product sums x times the integers (up to 127 each) in float16, which ends at 65504, and multiplies by the scale only
# afterwards. 768 inputs of 1 with equal weights of 0.01 sum up to 97,536. Expected: 7.65, as with the dequantised weight
# in float16, and as torchao gives it in bfloat16, up to rounding.
# Seen with torchao 0.18.0 and torch 2.14.1 on Python 3.11 (CPU), 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchao==0.18.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    layer = torch.nn.Linear(768, 1, bias=False).to(dtype)
    torch.nn.init.constant_(layer.weight, 0.01)
    quantize_(layer, Int8WeightOnlyConfig())
    x = torch.ones(1, 768, dtype=dtype)
    with torch.no_grad():
        quantised, plain = layer(x).item(), torch.nn.functional.linear(x, layer.weight.dequantize()).item()
    print(f"{dtype}: {quantised:.0f}, with the dequantised weight {plain:.0f}")
PYTHON
)
echo "torchao 0.18.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="torch.float32: 8, with the dequantised weight 8
torch.bfloat16: 8, with the dequantised weight 8
torch.float16: inf, with the dequantised weight 8"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
