#!/usr/bin/env bash
# torchvision's detectors round the stride of a map: anchors and regions lie elsewhere on backbones with patches of 14.
#
# AnchorGenerator divides the image by the map in whole numbers, so that 148 anchors in 518 pixels are 3 pixels apart, not
# 3.5, and the last one lies at 441, not at 514.5. MultiScaleRoIAlign rounds the scale to a power of two, so that of
# patches of 14 pixels a region is read with 1/16: columns 100 to 170 of a map that holds its own columns in pixels have
# the mean 125, not 142 (torchvision counts from the corner of a place, hence 142 and not 135). No error, no warning.
# Seen with torchvision 0.29.1 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

images = ImageList(torch.zeros(1, 3, 518, 518), [(518, 518)])
(anchors,) = AnchorGenerator(((4,),), ((1.0,),))(images, [torch.zeros(1, 1, 148, 148)])
print("last anchor at", anchors[-1].mean().item())
columns = ((torch.arange(37) + 0.5) * 14).expand(1, 1, 37, 37).contiguous()  # of each patch, in pixels
region = torch.tensor([[100.0, 100.0, 170.0, 170.0]])
found = MultiScaleRoIAlign(["0"], 7, 2)({"0": columns}, [region], [(518, 518)])
right = roi_align(columns, [region], 7, 1 / 14, 2)
print(f"mean column {found.mean().item():.1f}, with 1/14 {right.mean().item():.1f}")
PYTHON
)
echo "torchvision 0.29.1, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="last anchor at 441.0
mean column 125.1, with 1/14 142.0"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
