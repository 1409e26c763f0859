#!/usr/bin/env bash
# A layer whose activations torchao quantises, too, silently gives no gradient to the layers before it.
#
# Its bias and everything after it still learn, so `backward` raises nothing and the loss falls; what comes before has
# `grad` None for ever. Expected: a gradient, as with int8 weights alone, or an error.
# Seen with torchao 0.18.0 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchao==0.18.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

for configuration in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    quantize_(second, configuration)
    second(first(torch.randn(2, 64))).square().sum().backward()
    has = {"before": first.weight.grad is not None, "its bias": second.bias.grad is not None}
    print(f"{type(configuration).__name__}: gradient {has}")
PYTHON
)
echo "torchao 0.18.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="Int8WeightOnlyConfig: gradient {'before': True, 'its bias': True}
Int8DynamicActivationInt8WeightConfig: gradient {'before': False, 'its bias': True}"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
