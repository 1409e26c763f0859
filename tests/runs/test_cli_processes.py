"""The commands as a newcomer types them, in a process of their own in an empty directory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from visionpeft.data import dsprites

# Runs each as `python -m visionpeft.<module>` does; one process for all, as each would import Lightning anew.
AS_MODULES = """
import json, runpy, sys
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"visionpeft.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (module, end.code)
"""


def commands(folder, *given):
    """Run `python -m visionpeft.<module>` with arguments in a folder, one after another; returns what they print."""
    done = subprocess.run(
        [sys.executable, "-c", AS_MODULES, json.dumps(given)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, no remarks of libraries
    return done.stdout


@pytest.mark.slow
def test_main_job_evaluate_and_predict(tmp_path):
    """Warnings and remarks of libraries are shown by none of them."""
    Image.fromarray(dsprites.render(torch.tensor([5]).numpy())[0]).save(tmp_path / "sprite.png")
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.test_samples", "100"]
    run = tmp_path / "runs" / "dsprites_loc-VPT-1"
    printed = commands(
        tmp_path,
        ["fit", "--config", "vtab_vpt.yaml", *short],
        ["evaluate", str(run)],
        ["predict", str(run), "sprite.png", "--output", "out.csv"],
    )
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "sprite.png", "out.csv"}
    for words in (
        "VPT(num_tokens=",
        "100 test images",
        "epoch 1/1  loss and top-1: train",
        "test top-1 accuracy",
        "a fixed random subset of 73,728",
        "trainable parameters",
        "training time",
        "peak memory",
        "runs/dsprites_loc-VPT-1",
    ):
        assert words in printed
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["test_subset"] == {"samples": 100, "of": 73_728, "seed": 0}
    again = json.loads((run / "evaluation.json").read_text())["test"]
    assert again == pytest.approx(results["test"])
    assert "sprite.png" in printed
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2
