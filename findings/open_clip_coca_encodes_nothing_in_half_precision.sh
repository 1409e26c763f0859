#!/usr/bin/env bash
# A CoCa that OpenCLIP has built with precision="bf16" (or "fp16") encodes neither images nor texts; a CLIP does both.
#
# `create_model` casts the weights of layers and leaves norms, and in a CoCa parts of both towers, in float32, so that
# their tokens meet layers in bfloat16. With precision="pure_bf16" all is cast, and it works.
# Expected: features in bfloat16, as of the CLIP.
# Seen with open_clip_torch 3.3.0, torch 2.14.1 and timm 1.0.31 on Python 3.11, random weights, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "open_clip_torch==3.3.0"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - 2> /dev/null <<'PYTHON'
import open_clip
import torch

images, texts = torch.randn(1, 3, 224, 224).bfloat16(), torch.randint(1, 400, (1, 76))
for name in ("ViT-B-32", "coca_ViT-B-32"):
    for precision in ("bf16", "pure_bf16"):
        model = open_clip.create_model(name, precision=precision).eval()
        texts = torch.nn.functional.pad(texts[:, :76], (0, 77 - 76)) if name == "ViT-B-32" else texts[:, :76]
        found = []
        for encode, x in ((model.encode_image, images), (model.encode_text, texts)):
            try:
                with torch.no_grad():
                    found.append(str(encode(x).dtype))
            except RuntimeError as error:
                found.append(str(error))
        print(f"{name} {precision}: image {found[0]}; text {found[1]}")
PYTHON
)
echo "open_clip_torch 3.3.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
refused="mat1 and mat2 must have the same dtype, but got Float and BFloat16"
expected="ViT-B-32 bf16: image torch.bfloat16; text torch.bfloat16
ViT-B-32 pure_bf16: image torch.bfloat16; text torch.bfloat16
coca_ViT-B-32 bf16: image $refused; text $refused
coca_ViT-B-32 pure_bf16: image torch.bfloat16; text torch.bfloat16"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
