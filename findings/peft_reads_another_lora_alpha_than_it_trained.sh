#!/usr/bin/env bash
# peft reads its own adapter with another lora_alpha than it was trained with, if two patterns match one layer.
#
# Of the entries of `alpha_pattern` that match a module peft takes the first, in the order of the dict. In the file
# `adapter_config.json` they are sorted by name, so that another one is the first when it is loaded again, and the
# change of the layer has another scale: the logits differ, without a word. Ranks are sorted, too; there loading fails.
# Expected: the scale that was trained.
# Seen with peft 0.21.2 and torch 2.14.1 on Python 3.11, 2026-11-30.
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


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def scales(model):
    return [model.base_model.model[index].scaling["default"] for index in (0, 1)]


for pattern in ({"1": 4, "0|1": 32}, {"1": 4, "0": 32}):
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"], alpha_pattern=pattern)
    model = peft.get_peft_model(fresh(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    model.save_pretrained("saved")
    again = peft.PeftModel.from_pretrained(fresh(), "saved")
    x = torch.ones(1, 16)
    same = torch.allclose(model(x), again(x))
    print(f"{pattern}: trained with scales {scales(model)}, read with {scales(again)}, same outputs: {same}")
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="{'1': 4, '0|1': 32}: trained with scales [16.0, 2.0], read with [16.0, 16.0], same outputs: False
{'1': 4, '0': 32}: trained with scales [16.0, 2.0], read with [16.0, 2.0], same outputs: True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
