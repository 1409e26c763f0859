"""Regenerates the README's table: methods on the embedded motion videos with nano_vit, mean and std over seeds.

    python examples/compare_video_methods.py --output results/motion.csv

No frame by itself tells the class, so a method that acts in each frame by itself can only guess. Reported is the test
accuracy of the last epoch, and that of the same model on the same frames in a random order. Finished runs are
kept in the output file, so an interrupted comparison continues.
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
from visionpeft.data import ClipAugmentation, FrameSampling, Motion
from visionpeft.tasks import VideoClassification
from visionpeft.tasks.optimisation import Optimisation

FRAMES, STRIDE, BATCH, AREA = 4, 3, 16, (0.5, 1.0)
# method and learning rate of what is trained outside the head
METHODS = {
    "linear probe on the mean of frames": (vp.LinearProbe(), 1e-3),
    "LoRA in each frame, rank 8, q v": (vp.LoRA(rank=8), 2e-3),
    "AdaptFormer in each frame, 64": (vp.AdaptFormer(bottleneck=64), 2e-3),
    "VPT-deep in each frame, 10 tokens": (vp.VPT(num_tokens=10), 5e-3),
    "ST-Adapter, 96, both positions": (
        vp.STAdapter(bottleneck=96, positions=("before_attention", "before_mlp")),
        3e-3,
    ),
    "AIM": (vp.AIM(num_frames=FRAMES, drop_path=0.0), 1e-3),
}
HEAD_LR = 3e-4
FIELDS = ("method", "lr", "seed", "test", "shuffled", "trainable", "seconds")


def main(output: Path, seeds: list[int], epochs: int, methods: list[str], root: str | None) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    output.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in methods:
            once(output, name, seed, epochs, root)
    print(markdown(pd.read_csv(output)))


def once(output: Path, name: str, seed: int, epochs: int, root: str | None) -> None:
    """Train once and append the scores, unless the output has them already."""
    if output.is_file():
        done = pd.read_csv(output)
        if ((done.method == name) & (done.seed == seed)).any():
            return
    lightning.seed_everything(seed, verbose=False)
    method, lr = METHODS[name]
    data = videos(seed, root)
    task = VideoClassification(
        method,
        data.class_names,
        num_frames=FRAMES,
        dropout=0.0,
        seed=seed,
        optimisation=Optimisation(lr=lr, head_lr=HEAD_LR, warmup_epochs=epochs / 10),
    )
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
    test, shuffled = (
        trainer.test(task, videos(seed, root, shuffle_test_frames=shuffle), verbose=False)[0]["test/top1"]
        for shuffle in (False, True)
    )
    new = not output.is_file()
    with open(output, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow((name, lr, seed, test, shuffled, vp.summary(task.model).adapter, seconds))
    print(f"{name}, seed {seed}: {test:.1%}, shuffled {shuffled:.1%}, {seconds} s", flush=True)


def videos(seed: int, root: str | None, **options) -> Motion:
    """The motion videos as clips."""
    return Motion(
        root,
        sampling=FrameSampling("dense", FRAMES, stride=STRIDE),
        augmentation=ClipAugmentation(area=AREA),
        batch_size=BATCH,
        seed=seed,
        **options,
    )


def markdown(rows: pd.DataFrame) -> str:
    """The table of a finished comparison."""
    lines = [
        "| method | trained, without head | lr | test top-1, mean ± std | frames shuffled in the test |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, group in rows.groupby("method", sort=False):
        test, shuffled = (
            f"{100 * scores.mean():.1f} ± {100 * scores.std():.1f}" for scores in (group.test, group.shuffled)
        )
        lines.append(f"| {name} | {group.trainable.iloc[0]:,} | {group.lr.iloc[0]:g} | {test} | {shuffled} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/motion.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--root", help="where the videos are kept; by default in the user's cache folder")
    main(**vars(parser.parse_args()))
