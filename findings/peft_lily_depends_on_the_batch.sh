#!/usr/bin/env bash
# What a model with peft's Lily adapter gives for an input depends on the other inputs of its batch, also in evaluation.
#
# The router's probabilities are averaged over the whole batch before they weigh the shared matrices. Expected: a row of
# a batch gives what it gives alone, as with every other adapter of peft and the model itself in `eval()`.
# Seen with peft 0.21.2 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "peft==0.21.2"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import torch
from torch import nn

configurations = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["0", "2"]),
    "Lily": peft.LilyConfig(r=2, num_B=2, stride_A=1, target_modules=["0", "2"]),
}
for name, configuration in configurations.items():
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
        x = torch.randn(4, 8)
        difference = (model(x)[0] - model(x[:1])[0]).abs().max().item()
    print(f"{name}: a row alone as in its batch {difference < 1e-5}")
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="LoRA: a row alone as in its batch True
Lily: a row alone as in its batch False"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
