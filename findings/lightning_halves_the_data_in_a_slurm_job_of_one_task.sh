#!/usr/bin/env bash
# In a Slurm job of one task, Lightning's Trainer(devices=2) trains on half of the data, and says nothing.
#
# Lightning takes the tasks of a job for the processes of a training, which Slurm has started, and so starts none. With
# two tasks it refuses a job without --ntasks-per-node; with one task and two devices there is nothing wrong by its
# checks. Expected: two processes, or an error. Seen: one process, whose sampler leaves the other half to a second one.
# What a batch script without srun has in its environment in Slurm 22.05 is set here by hand, so that no Slurm is needed.
# Seen with lightning 2.6.6 and torch 2.14.1 on Python 3.11, 2026-12-01.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "lightning==2.6.6"
cd "$work"
cat > train.py <<'PYTHON'
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel


class Counted(BoringModel):
    seen = 0

    def training_step(self, batch, index):
        Counted.seen += len(batch)
        return super().training_step(batch, index)


if __name__ == "__main__":
    trainer = pl.Trainer(
        devices=2, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )
    model = Counted()
    trainer.fit(model)
    if trainer.is_global_zero:
        print(f"devices asked for: {trainer.num_devices}, world: {trainer.world_size}, "
              f"of 64 samples seen here: {Counted.seen}")
PYTHON
job="SLURM_JOB_ID=1 SLURM_JOB_NAME=train SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NNODES=1"
job="$job SLURM_NODELIST=localhost"
inside=$(env $job "$work/venv/bin/python" -W ignore train.py 2> log.txt | grep asked) || { cat log.txt; exit 1; }
outside=$("$work/venv/bin/python" -W ignore train.py 2> log.txt | grep asked) || { cat log.txt; exit 1; }
echo "lightning 2.6.6, torch 2.14.1, $("$work/venv/bin/python" -V)"
echo "in a job of one task: $inside"
echo "without Slurm: $outside"
[ "$inside" = "devices asked for: 2, world: 1, of 64 samples seen here: 32" ] || { echo "changed"; exit 1; }
[ "$outside" = "devices asked for: 2, world: 2, of 64 samples seen here: 32" ] || { echo "changed"; exit 1; }
