"""Regenerates the table of docs/results.md: every method on the clip-art images, mean and std over seeds.

    python examples/compare_methods.py --output results/clipart.csv

The learning rate of each method is chosen on the validation split with one seed. Reported is the test accuracy of the
last epoch at that rate. Finished runs are kept in the output file, so an interrupted comparison continues.
"""

import argparse
import csv
import logging
import time
import warnings
from pathlib import Path

import lightning
import pandas as pd

import visionpeft as vp
from visionpeft.data import ClipArt
from visionpeft.tasks import ImageClassification
from visionpeft.tasks.optimisation import Optimisation

METHODS = {
    "linear probe, random weights": (vp.LinearProbe(), {"pretrained": False}),
    "linear probe": (vp.LinearProbe(), {}),
    "full fine-tuning": (vp.FullFineTuning(), {}),
    "last block": (vp.LastBlocks(1), {}),
    "BitFit": (vp.BitFit(), {}),
    "VPT-shallow, 10 tokens": (vp.VPT(num_tokens=10, deep=False), {}),
    "VPT-deep, 10 tokens": (vp.VPT(num_tokens=10), {}),
    "Adapter (Houlsby), 8": (vp.Adapter(bottleneck=8, placement="houlsby"), {}),
    "Adapter (Pfeiffer), 8": (vp.Adapter(bottleneck=8, placement="pfeiffer"), {}),
    "Adapter+, 8": (vp.Adapter(bottleneck=8, placement="adapter_plus"), {}),
    "AdaptFormer, 8": (vp.AdaptFormer(bottleneck=8), {}),
    "LoRA, rank 8, q v": (vp.LoRA(rank=8), {}),
    "SSF": (vp.SSF(), {}),
    "prefix tuning, 10 tokens": (vp.PrefixTuning(num_tokens=10), {}),
}
FIELDS = ("backbone", "method", "lr", "seed", "val", "test", "trainable", "seconds")


def main(output: Path, seeds: int, epochs: int, methods: list[str], learning_rates: list[float], backbone: str) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in methods:
        for lr in learning_rates:
            once(output, name, lr, seed=0, epochs=epochs, backbone=backbone)
        for seed in range(1, seeds):
            once(output, name, chosen(finished(output, backbone), name), seed, epochs, backbone)
    print(markdown(finished(output, backbone)))


def finished(output: Path, backbone: str) -> pd.DataFrame:
    """What is in the output of a backbone."""
    if not output.is_file():
        return pd.DataFrame(columns=FIELDS)
    rows = pd.read_csv(output)
    if "backbone" not in rows:
        raise SystemExit(f"{output} does not say with which backbone it was made; name another --output")
    return rows[rows.backbone == backbone]


def chosen(rows: pd.DataFrame, name: str) -> float:
    """The learning rate with the best validation accuracy for seed 0."""
    rows = rows[(rows.method == name) & (rows.seed == 0)]
    return float(rows.loc[rows.val.idxmax(), "lr"])


def once(output: Path, name: str, lr: float, seed: int, epochs: int, backbone: str) -> None:
    """Train once and append the scores, unless the output has them already."""
    done = finished(output, backbone)
    if ((done.method == name) & (done.lr == lr) & (done.seed == seed)).any():
        return
    lightning.seed_everything(seed, verbose=False)
    method, options = METHODS[name]
    data = ClipArt(batch_size=64, seed=seed)
    optimisation = Optimisation(lr=lr, warmup_epochs=epochs / 10)
    task = ImageClassification(method, data.class_names, backbone, seed=seed, optimisation=optimisation, **options)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(task, data)
    seconds = round(time.perf_counter() - start, 1)
    val, test = (
        trainer.test(task, loader, verbose=False)[0]["test/top1"]
        for loader in (data.val_dataloader(), data.test_dataloader())
    )
    new = not output.is_file()
    with open(output, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow((backbone, name, lr, seed, val, test, vp.summary(task.model).adapter, seconds))


def markdown(rows: pd.DataFrame) -> str:
    """The table of a finished comparison."""
    lines = ["| method | trained, without head | lr | test top-1, mean ± std |", "| --- | ---: | ---: | ---: |"]
    for name in dict.fromkeys(rows.method):
        lr = chosen(rows, name)
        group = rows[(rows.method == name) & (rows.lr == lr)]
        score = f"{100 * group.test.mean():.1f} ± {100 * group.test.std():.1f}"
        lines.append(f"| {name} | {group.trainable.iloc[0]:,} | {lr:g} | {score} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/clipart.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--backbone", default="nano_vit.distilled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    main(**vars(parser.parse_args()))
