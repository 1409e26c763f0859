#!/bin/bash
# How runs/ and protocol/ were made with the old commit, in this folder; not needed to use them.
set -e
python -m visionpeft.fit --config config_dotted.yaml --output runs
python -m visionpeft.fit --config config_dotted_few_shot.yaml --output runs
python -m visionpeft.fit --config config_dotted_video.yaml --output runs
# The same as the first but with --report last, ended by an error in its third epoch, before that is recorded.
python - <<'P' || true
from visionpeft import fit
from visionpeft.reports.history import EpochHistory
original = EpochHistory.on_train_epoch_end
def failing(self, trainer, pl_module):
    if trainer.current_epoch == 2:
        raise ZeroDivisionError("interrupted for the fixture")
    original(self, trainer, pl_module)
EpochHistory.on_train_epoch_end = failing
fit.main(["--config", "config_dotted.yaml", "--report", "last", "--output", "runs"])
P
# What it must become: results.json and metrics.csv of the uninterrupted run are in expected_after_resume/.
python -m visionpeft.fit --config config_dotted.yaml --report last --output whole
mkdir -p expected_after_resume && mv whole/*/results.json whole/*/metrics.csv expected_after_resume/ && rm -r whole
mv "runs/dsprites_ori-VPT+LoRA-1" runs/image_finished
mv "runs/dsprites_ori-VPT+LoRA-2" runs/image_interrupted
mv runs/drawings-CoOp-1 runs/learner_finished
mv runs/motion-STAdapter-1 runs/video_finished
cd protocol
python -m visionpeft.protocol vtab1k --configs vtab_small.yaml --tasks dsprites_ori --seeds 7 --output vtab1k
python -m visionpeft.protocol few_shot --configs fewshot_small.yaml --datasets drawings --shots 1 --seeds 1 2 --output few_shot
cd ..
python clean_runs.py
rm runs/video_finished/checkpoints/best.ckpt
