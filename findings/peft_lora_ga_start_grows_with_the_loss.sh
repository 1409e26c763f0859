#!/usr/bin/env bash
# peft's LoRA-GA with scale="stable" multiplies B by the singular values of the gradient, so that the start grows with
# the loss and with the number of batches; the authors' code scales two orthonormal factors, whatever their size.
#
# Expected: the same directions with the same lengths for ten times the loss, of A and of B.
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
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import nn


def start(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(8, 16)
    ga = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=ga)
    preprocess_loraga(model, config, lambda: (factor * model(x).square().mean()).backward())
    layer = peft.get_peft_model(model, config).base_model.model[0]
    return layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)


(down, up), (down_of_ten, up_of_ten) = start(1.0), start(10.0)
print(f"ten times the loss: A {(down_of_ten / down).mean():.1f} times, B {(up_of_ten / up).mean():.1f} times as long")
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="ten times the loss: A 1.0 times, B 10.0 times as long"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
