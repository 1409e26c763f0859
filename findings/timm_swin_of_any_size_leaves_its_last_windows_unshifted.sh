#!/usr/bin/env bash
# A Swin of timm that takes images of any size computes other features than the same weights made for the size it sees.
#
# With dynamic_img_size=True (or strict_img_size=False) masks follow the image, but whether windows are shifted is decided
# once, by img_size: at 224 pixels the last stage has 7 x 7 places, one window, so its shift is left out for good. Expected:
# at 448 pixels, where it has 14 x 14 places, the features of a model made for 448 with the same weights. The first three
# stages agree, the last one does not; always_partition=True at creation makes them agree. No error, no warning.
# Seen with timm 1.0.31 and torch 2.14.1 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "timm==1.0.31" "numpy==2.4.6"
cd "$work"
seen=$(HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import timm
import torch

SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 0}


def made(**options):
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SMALL, **options).eval()


own = made(img_size=448)
any_size = made(img_size=224, dynamic_img_size=True)
partitioned = made(img_size=224, dynamic_img_size=True, always_partition=True)
for model in (any_size, partitioned):
    model.load_state_dict(own.state_dict())
image = torch.randn(1, 3, 448, 448)
with torch.no_grad():
    expected, *others = (model.forward_intermediates(image, intermediates_only=True) for model in (own, any_size, partitioned))
for name, maps in zip(("dynamic_img_size", "and always_partition"), others):
    print(f"{name}: stages agree", [torch.allclose(*pair, atol=1e-5) for pair in zip(maps, expected)])
print("shift of the last block", own.layers[3].blocks[1].shift_size, any_size.layers[3].blocks[1].shift_size)
PYTHON
)
echo "timm 1.0.31, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="dynamic_img_size: stages agree [True, True, True, False]
and always_partition: stages agree [True, True, True, True]
shift of the last block (3, 3) (0, 0)"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
