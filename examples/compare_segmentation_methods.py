"""Regenerates the table of docs/segmentation.md: methods under one head on the embedded scenes, over seeds.

    python examples/compare_segmentation_methods.py --output results/scenes.csv

The head is the same for all methods, a batch normalisation and one linear layer on the last block of nano_vit, or a
comparison of methods would be one of heads. All are trained on the same crops for the same number of steps. Of the
learning rates of a method the one with the best mean IoU on the validation scenes of the first seed is taken for all;
test scenes are made of other drawings and are not looked at before. Finished runs are kept in the output file, so that
an interrupted comparison continues.
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
from visionpeft.data import ComposedScenes
from visionpeft.runs.masks_record import MasksRecord
from visionpeft.tasks import SemanticSegmentation
from visionpeft.tasks.optimisation import Optimisation

HEAD = vp.LinearSegmentation(layers=1)
RATES = (1e-3, 3e-3, 1e-2)
ALL = ("q", "k", "v", "proj", "fc1", "fc2")
# method, and learning rates to choose from
METHODS = {
    "head alone": (vp.LinearProbe(), RATES),
    "LoRA, rank 8, all linear layers": (vp.LoRA(rank=8, targets=ALL), RATES),
    "VPT-deep, 10 tokens": (vp.VPT(num_tokens=10, deep=True), RATES),
    "AdaptFormer, 64": (vp.AdaptFormer(bottleneck=64), RATES),
    "full fine-tuning": (vp.FullFineTuning(), tuple(rate / 10 for rate in RATES)),
}
FIELDS = ("method", "lr", "seed", "val", "test", "foreground", "accuracy", "trainable", "seconds")
BATCH, SIDE = 8, 128


def main(output: Path, seeds: list[int], scenes: int, methods: list[str]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in methods:
        for lr in METHODS[name][1]:
            once(output, name, lr, seeds[0], scenes)
    for seed in seeds[1:]:
        for name in methods:
            once(output, name, chosen(pd.read_csv(output), name, seeds[0]), seed, scenes)
    print(markdown(pd.read_csv(output), seeds[0]))


def chosen(rows: pd.DataFrame, name: str, seed: int) -> float:
    """The learning rate with the best mean IoU on the validation scenes of a seed."""
    candidates = rows[(rows.method == name) & (rows.seed == seed)]
    return float(candidates.lr[candidates.val.idxmax()])


def once(output: Path, name: str, lr: float, seed: int, scenes: int) -> None:
    """Train once and append the scores, unless the output has them already."""
    if output.is_file():
        done = pd.read_csv(output)
        if ((done.method == name) & (done.seed == seed) & (done.lr == lr)).any():
            return
    lightning.seed_everything(seed, verbose=False)
    data = ComposedScenes(train=scenes, side=SIDE, size=SIDE, batch_size=BATCH, seed=seed)
    task = SemanticSegmentation(
        METHODS[name][0],
        data.class_names,
        head=HEAD,
        seed=seed,
        optimisation=Optimisation(lr=lr, weight_decay=1e-4, warmup_epochs=0.1),
    )
    record = MasksRecord(data.class_names, data.palette)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    start = time.perf_counter()
    trainer.fit(task, data)
    seconds = round(time.perf_counter() - start, 1)
    val = float(trainer.callback_metrics["val/miou"])
    test = trainer.test(task, data, verbose=False)[0]
    new = not output.is_file()
    with open(output, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        scores = val, test["test/miou"], foreground(record), test["test/pixel_accuracy"]
        writer.writerow((name, lr, seed, *scores, vp.summary(task.model).adapter, seconds))
    print(f"{name}, lr {lr:g}, seed {seed}: mIoU val {val:.1%}, test {test['test/miou']:.1%}, {seconds} s", flush=True)


def foreground(record: MasksRecord) -> float:
    """IoU of all objects together against the background, whatever class they were given."""
    found, all_ = record.confusion[1:, 1:].sum(), record.confusion.sum() - record.confusion[0, 0]
    return (found / all_).item()


def markdown(rows: pd.DataFrame, first: int) -> str:
    """The table of a finished comparison."""
    lines = [
        "| method | trained, without head | lr | seeds | test mIoU, mean ± std | objects against background, IoU |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [name for name in METHODS if name in set(rows.method)]:
        lr = chosen(rows, name, first)
        group = rows[(rows.method == name) & (rows.lr == lr)]
        test, objects = (spread(100 * scores) for scores in (group.test, group.foreground))
        lines.append(f"| {name} | {group.trainable.iloc[0]:,} | {lr:g} | {len(group)} | {test} | {objects} |")
    return "\n".join(lines)


def spread(scores: pd.Series) -> str:
    """Mean and standard deviation, which a single score does not have."""
    return f"{scores.mean():.1f} ± {scores.std():.1f}" if len(scores) > 1 else f"{scores.mean():.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/scenes.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=800, help="to train on, once each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    main(**vars(parser.parse_args()))
