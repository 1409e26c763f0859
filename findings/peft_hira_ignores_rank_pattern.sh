#!/usr/bin/env bash
# peft's HiRA takes a `rank_pattern`, matches the modules with it, and gives every module the rank `r`.
#
# Expected: the module that the pattern names has the pattern's rank, as with LoRA.
# Seen with peft 0.21.2 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "peft==0.21.2"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import peft
from torch import nn

for kind, part in ((peft.LoraConfig, "lora_A"), (peft.HiraConfig, "hira_A")):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = peft.get_peft_model(model, kind(r=4, target_modules=["0", "1"], rank_pattern={"1": 2}))
    ranks = [len(value) for name, value in model.named_parameters() if part in name]
    print(f"{kind.__name__}: ranks {ranks}")
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="LoraConfig: ranks [4, 2]
HiraConfig: ranks [4, 4]"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
