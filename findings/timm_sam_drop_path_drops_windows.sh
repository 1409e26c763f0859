#!/usr/bin/env bash
# In timm's encoder of SAM, stochastic depth drops single windows of the attention, not the branch of a sample.
#
# A block with windows applies drop_path1 before the windows are put together again, where each of them is a row of the
# batch: of one image some windows lose their attention and the others are scaled up, and an image keeps all of it only
# with the probability of a sample to the power of its windows. The MLP of the same block, and blocks without
# windows, drop whole samples. Expected: whole samples everywhere, as in timm's Swin.
# Seen with timm 1.0.31 and torch 2.14.1 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "timm==1.0.31" "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer_sam import Block

print("timm", timm.__version__, "torch", torch.__version__.partition("+")[0])


def dropped(block, name):
    """Of 200 passes of one image of four windows: how often none, some or all of them lose the attention."""
    torch.nn.init.zeros_(block.mlp.fc2.weight), torch.nn.init.zeros_(block.mlp.fc2.bias)
    block.train()
    torch.manual_seed(0)
    counts = {"none": 0, "some": 0, "all": 0}
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        for _ in range(200):
            same = (block(x) == x).view(2, 4, 2, 4, 8).all(dim=4).all(dim=3).all(dim=1)
            counts["all" if same.all() else "some" if same.any() else "none"] += 1
    print(name, {key: value > 0 for key, value in counts.items()})


dropped(Block(8, 2, window_size=4, input_size=(8, 8), drop_path=0.5), "SAM:")
dropped(Block(8, 2, window_size=0, input_size=(8, 8), drop_path=0.5), "SAM without windows:")
dropped(SwinTransformerBlock(8, (8, 8), 2, window_size=4, drop_path=0.5), "Swin:")
PYTHON
)
echo "$seen"
expected="timm 1.0.31 torch 2.14.1
SAM: {'none': True, 'some': True, 'all': True}
SAM without windows: {'none': True, 'some': False, 'all': True}
Swin: {'none': True, 'some': False, 'all': True}"
[ "$seen" = "$expected" ] || { echo "changed: expected ..."; echo "$expected"; exit 1; }
