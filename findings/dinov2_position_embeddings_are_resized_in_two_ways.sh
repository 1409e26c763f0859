#!/usr/bin/env bash
# One DINOv2 gives other features in timm than in transformers at any image size but the one it was stored for.
#
# Both resize the position embeddings bicubically, but timm antialiases when the grid gets smaller and transformers does
# not. Expected: equal weights and an equal image give equal tokens in both, at 224 as at 518 pixels. They do at 518; at
# 224, at which most people use the ViT-S/14 of 518, positions and tokens differ, however smooth the embeddings are.
# Seen with transformers 5.24.0, timm 1.0.31 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "timm==1.0.31" "transformers==5.24.0"
cd "$work"
seen=$(HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from transformers import Dinov2Config, Dinov2Model

WIDTH, DEPTH = 32, 2
torch.manual_seed(0)
theirs = Dinov2Model(
    Dinov2Config(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=518, patch_size=14)
).eval()
# smooth position embeddings, as trained ones are: sums of a few waves over the grid of 37 x 37
rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
waves = [(torch.cos if c % 2 else torch.sin)(0.05 * (c % 9) * rows + 0.07 * (c % 5) * columns) for c in range(WIDTH)]
with torch.no_grad():
    theirs.embeddings.position_embeddings[:, 1:] = torch.stack(waves, -1).reshape(1, -1, WIDTH)

state = theirs.state_dict()
vectors = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
weights = {
    "cls_token": state["embeddings.cls_token"],
    "pos_embed": state["embeddings.position_embeddings"],
    "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
    "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    "norm.weight": state["layernorm.weight"],
    "norm.bias": state["layernorm.bias"],
}
for i in range(DEPTH):
    block = next(key for key in state if key.endswith(f"layer.{i}.norm1.weight")).removesuffix("norm1.weight")
    for part in ("weight", "bias"):
        for name in vectors:
            weights[f"blocks.{i}.{name}.{part}"] = state[f"{block}{name}.{part}"]
        own = [state[f"{block}attention.{each}_proj.{part}"] for each in "qkv"]
        weights[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(own)
        weights[f"blocks.{i}.attn.proj.{part}"] = state[f"{block}attention.o_proj.{part}"]
    for scale in "12":
        weights[f"blocks.{i}.ls{scale}.gamma"] = state[f"{block}layer_scale{scale}.lambda1"]
for size in (518, 224):
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=size, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0
    ).eval()
    model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours, other = model.forward_features(images), theirs(images).last_hidden_state
        stored = state["embeddings.position_embeddings"]
        grid = stored[:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
        plain = torch.nn.functional.interpolate(grid, size=(size // 14,) * 2, mode="bicubic", align_corners=False)
        plain = torch.cat((stored[:, :1], plain.flatten(2).transpose(1, 2)), dim=1)
        model.pos_embed.copy_(plain)
        again = model.forward_features(images)
    apart = ((ours - other).norm() / other.norm()).item()
    print(f"{size}: equal tokens {apart < 1e-4}; equal without antialiasing {torch.allclose(again, other, atol=1e-4)}")
PYTHON
)
echo "transformers 5.24.0, timm 1.0.31, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="518: equal tokens True; equal without antialiasing True
224: equal tokens False; equal without antialiasing True"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
