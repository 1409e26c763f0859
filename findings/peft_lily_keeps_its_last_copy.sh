#!/usr/bin/env bash
# peft's Lily has one matrix B for all layers, saves it once for each layer, and at loading only the last copy counts.
#
# A file of four layers holds four equal tensors `lily_B`, and the parameter count of the model counts one. What is changed
# in the first three has no effect; where they differ, nothing says so. Expected: one tensor, or an error for copies
# that contradict each other.
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
from safetensors.torch import load_file, save_file
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.fc(x))


def base():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(4)))


model = peft.get_peft_model(base(), peft.LilyConfig(r=2, num_B=2, stride_A=2, target_modules=["fc"])).eval()
for parameter in model.parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter, std=0.5)
model.save_pretrained("adapter")
tensors = load_file("adapter/adapter_model.safetensors")
copies = sorted(key for key in tensors if "lily_B" in key)
equal = all(torch.equal(tensors[copies[0]], tensors[key]) for key in copies)
print(f"{len(copies)} tensors lily_B, equal {equal}; {sum('lily_B' in n for n, _ in model.named_parameters())} parameter")
x = torch.randn(3, 8)
with torch.no_grad():
    before = model(x)
    for key in copies:
        changed = {name: value + (name == key) for name, value in tensors.items()}
        save_file(changed, "adapter/adapter_model.safetensors")
        after = peft.PeftModel.from_pretrained(base(), "adapter").eval()(x)
        print(f"copy {copies.index(key)} changed: other output {not torch.allclose(after, before, atol=1e-6)}")
PYTHON
)
echo "peft 0.21.2, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="4 tensors lily_B, equal True; 1 parameter
copy 0 changed: other output False
copy 1 changed: other output False
copy 2 changed: other output False
copy 3 changed: other output True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
