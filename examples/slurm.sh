#!/bin/bash
# A training on two machines with four GPUs each that goes on where its time is up, or another job takes its place.
#
#     sbatch examples/slurm.sh --config images_lora.yaml --data.root /scratch/photos
#
# Two minutes before its end it is told so; it keeps its finished epochs and ends with code 130, and the job is put into
# the queue again, where it resumes its run. Options of sbatch, before the script, stand above those of this file:
# --nodes 1 --ntasks-per-node 1 --gres gpu:1 for one GPU. All GPUs of a machine have to be seen by each of its tasks,
# so leave --gpus-per-task out.

#SBATCH --nodes=2 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=8
#SBATCH --time=04:00:00 --signal=TERM@120 --requeue --open-mode=append

set -uo pipefail
runs=runs/job-$SLURM_JOB_ID
begun=$(find "$runs" -maxdepth 2 -name config.yaml 2> /dev/null)
if [ -n "$begun" ]; then
    which=(--resume "$(dirname "$begun")")
else
    which=("$@" --output "$runs")
fi
srun python -m visionpeft.fit "${which[@]}" \
    --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" --trainer.num_nodes "$SLURM_NNODES"
code=$?
if [ "$code" -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
