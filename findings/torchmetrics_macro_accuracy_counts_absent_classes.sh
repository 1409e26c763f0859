#!/usr/bin/env bash
# torchmetrics' macro accuracy of the same two right and one wrong answers depends on which wrong class was named.
#
# A class without any sample enters the mean as 0 as soon as it is predicted once, and not otherwise. Expected: the mean
# of the recalls of the classes that occur, as scikit-learn's `balanced_accuracy_score` has it: 0.75 in both lines.
# Seen with torchmetrics 1.9.0 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchmetrics==1.9.0"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchmetrics.classification import MulticlassAccuracy

target = torch.tensor([0, 0, 1, 1])  # of three classes, the third of which does not occur
for predicted in ([0, 0, 1, 0], [0, 0, 1, 2]):
    macro = MulticlassAccuracy(num_classes=3, average="macro")(torch.tensor(predicted), target).item()
    print(f"{predicted}: {macro}")
PYTHON
)
echo "torchmetrics 1.9.0, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="[0, 0, 1, 0]: 0.75
[0, 0, 1, 2]: 0.5"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
