#!/usr/bin/env bash
# peft puts LoRA on q, k, v of the attention pool of CLIP's ResNets, counts it as trainable, and it has no effect.
#
# Expected: another output, or a refusal. The pool reads the weights of its layers and never calls them, so that what
# wraps them is passed by; nothing gets a gradient, and nothing is said. Merged, the change is there all at once.
# Seen with peft 0.21.2, open_clip_torch 3.3.0 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "open_clip_torch==3.3.0" "peft==0.21.2"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import torch
from open_clip.modified_resnet import ModifiedResNet
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
tower = ModifiedResNet((1, 1, 1, 1), output_dim=32, heads=2, image_size=32, width=8).eval()
images = torch.randn(2, 3, 32, 32)
before = tower(images).detach()
config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
model = get_peft_model(tower, config)
print(f"trainable: {model.get_nb_trainable_parameters()[0]}")
print(f"output changed: {not torch.equal(model(images), before)}, has a gradient: {model(images).requires_grad}")
print(f"output changed after merging: {not torch.allclose(model.merge_and_unload()(images), before, atol=1e-3)}")
PYTHON
)
echo "peft 0.21.2, open_clip_torch 3.3.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="trainable: 3072
output changed: False, has a gradient: False
output changed after merging: True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
