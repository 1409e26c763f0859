#!/usr/bin/env bash
# A model trained with peft's `init_lora_weights="pissa_niter_4"` is another one each time it is loaded.
#
# The file holds the trained A and B and the name of the initialisation. Loading takes the first singular values out of
# the base's weights once more, by a randomised decomposition, so that they are not those that were taken out in the
# training. Expected: the output before saving, as with "pissa", whose decomposition is exact.
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


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64))


x = torch.ones(1, 64)
for beginning in ("pissa", "pissa_niter_4"):
    model = base()
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=beginning, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(beginning)
        outputs = [model(x)]
        for seed in (2, 3):
            again = base()
            torch.manual_seed(seed)
            outputs.append(peft.PeftModel.from_pretrained(again, beginning)(x))
    pairs = [("saved and loaded", 0, 1), ("loaded twice", 1, 2)]
    print(f"{beginning}:", ", ".join(f"{n} equal {torch.allclose(outputs[i], outputs[j], atol=1e-3)}" for n, i, j in pairs))
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="pissa: saved and loaded equal True, loaded twice equal True
pissa_niter_4: saved and loaded equal False, loaded twice equal False"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
