#!/usr/bin/env bash
# OpenCLIP's CoCa gives unit features from `encode_image` and `encode_text`, all its other models give raw ones.
#
# Expected: one meaning of one method for every model that `create_model` returns. Whoever scales raw features, as
# residual and cache methods do, gets another scale on CoCa without a word.
# Seen with open_clip_torch 3.3.0 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "open_clip_torch==3.3.0"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import open_clip
import torch

for name in ("ViT-B-32", "coca_ViT-B-32"):
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        image = model.encode_image(torch.randn(2, 3, 224, 224)).norm(dim=-1)
        text = model.encode_text(open_clip.get_tokenizer(name)(["a cat", "a dog"])).norm(dim=-1)
    unit = [bool(torch.allclose(each, torch.ones(2), atol=1e-5)) for each in (image, text)]
    print(f"{type(model).__name__}: unit images {unit[0]}, unit texts {unit[1]}")
PYTHON
)
echo "open_clip_torch 3.3.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="CLIP: unit images False, unit texts False
CoCa: unit images True, unit texts True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
