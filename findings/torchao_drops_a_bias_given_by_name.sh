#!/usr/bin/env bash
# `F.linear(x, weight, bias=bias)` with an int8 weight of torchao is computed without the bias, and without an error.
#
# torchao takes the place of `F.linear` for its tensors and reads its arguments by their places alone. A bias given by
# its name is not seen, and with `weight=` given by its name, too, an IndexError says "tuple index out of range" (timm's
# BEiT and EVA call it so). Expected: what positional arguments give, x W^T + b, as with a plain weight.
# Seen with torchao 0.18.0 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchao==0.18.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_

torch.manual_seed(0)
layer, x = torch.nn.Linear(64, 64), torch.randn(2, 64)
quantize_(layer, Int8WeightOnlyConfig())
w, b = layer.weight, layer.bias
numbers = w.dequantize()
assert torch.equal(F.linear(x, weight=numbers, bias=b), F.linear(x, numbers, b))  # plain: the same in every way
for call in ("F.linear(x, w, b)", "F.linear(x, w, bias=b)", "F.linear(x, weight=w, bias=b)"):
    try:
        y = eval(call)
    except IndexError as error:
        print(f"{call}: IndexError: {error}")
        continue
    with_bias, without = (torch.allclose(y, F.linear(x, numbers, bias), atol=1e-5) for bias in (b, None))
    print(f"{call}: with the bias {with_bias}, without it {without}")
PYTHON
)
echo "torchao 0.18.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="F.linear(x, w, b): with the bias True, without it False
F.linear(x, w, bias=b): with the bias False, without it True
F.linear(x, weight=w, bias=b): IndexError: tuple index out of range"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
