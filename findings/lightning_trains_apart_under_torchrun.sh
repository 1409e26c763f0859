#!/usr/bin/env bash
# Under torchrun, Lightning's Trainer(devices=1) trains as often as there are processes, each alone, and says nothing.
#
# With devices=3 for two processes it refuses. Expected: the same for devices=1, as a configuration for one device has
# it. Seen: each process has a world of one, so that every one of them trains on all data and writes all files.
# Seen with lightning 2.6.6 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "lightning==2.6.6"
cd "$work"
cat > train.py <<'PYTHON'
import os
import pathlib
import sys

import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

trainer = pl.Trainer(
    devices=int(sys.argv[1]), accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
try:
    trainer.fit(BoringModel())
    said = f"trained in a world of {trainer.world_size}, first of it: {trainer.is_global_zero}"
except ValueError as error:
    said = f"refused: {str(error)[:19]}"
pathlib.Path(f"{sys.argv[1]}-{os.environ['RANK']}.txt").write_text(said)
PYTHON
for devices in 1 3; do
    "$work/venv/bin/python" -W ignore -m torch.distributed.run --standalone --nproc-per-node 2 train.py "$devices" \
        > log.txt 2>&1 || { cat log.txt; exit 1; }
done
seen=$(for file in 1-0 1-1 3-0 3-1; do echo "devices=${file%-*}, process ${file#*-}: $(cat "$file.txt")"; done)
echo "lightning 2.6.6, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="devices=1, process 0: trained in a world of 1, first of it: True
devices=1, process 1: trained in a world of 1, first of it: True
devices=3, process 0: refused: You set \`devices=3\`
devices=3, process 1: refused: You set \`devices=3\`"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
