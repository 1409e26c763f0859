"""Regenerates the table of docs/video.md: methods on the embedded motion videos with nano_vit, mean and std over seeds.

    python examples/compare_video_methods.py --output results/motion.csv

No frame by itself tells the class, so a method that acts in each frame by itself can only guess. All are trained on the
same batches for the same number of steps. Reported is the test accuracy of the last epoch, and that of the same model
on the same frames in a random order. Opposite motions have the same frames, so that the most that frames without their
order can give is 50 %: which motion it is, but not in which direction. Finished runs are kept in the output file, so
that an interrupted comparison continues.
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
from visionpeft.data import FrameSampling, Motion
from visionpeft.tasks import VideoClassification
from visionpeft.tasks.optimisation import Optimisation

FRAMES, STRIDE, TEST_CLIPS, BATCH, IMAGE_SIZE = 4, 2, 3, 16, 32
# method and learning rate of what is trained outside the head
METHODS = {
    "linear probe on the mean of frames": (vp.LinearProbe(), 1e-2),
    "LoRA in each frame, rank 8, q v": (vp.LoRA(rank=8), 3e-3),
    "AdaptFormer in each frame, 64": (vp.AdaptFormer(bottleneck=64), 3e-3),
    "VPT-deep in each frame, 10 tokens": (vp.VPT(num_tokens=10), 5e-3),
    "ST-Adapter, 96, both positions": (
        vp.STAdapter(bottleneck=96, positions=("before_attention", "before_mlp"), norm_of_mean=False),
        3e-3,
    ),
    "AIM, two temporal adapters": (vp.AIM(num_temporal=2, scale=1.0, drop_path=0.0, num_frames=FRAMES), 1.5e-3),
}
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
        backbone_kwargs={"img_size": IMAGE_SIZE},
        num_frames=FRAMES,
        dropout=0.0,
        seed=seed,
        optimisation=Optimisation(lr=lr, weight_decay=1e-2, warmup_epochs=0.5),
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
        sampling=FrameSampling("dense", FRAMES, stride=STRIDE, test_clips=TEST_CLIPS),
        batch_size=BATCH,
        seed=seed,
        **options,
    )


def markdown(rows: pd.DataFrame) -> str:
    """The table of a finished comparison."""
    lines = [
        "| method | trained, without head | lr | seeds | test top-1, mean ± std | frames shuffled in the test |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [name for name in METHODS if name in set(rows.method)]:
        group = rows[rows.method == name]
        test, shuffled = (spread(100 * scores) for scores in (group.test, group.shuffled))
        trained, lr = group.trainable.iloc[0], group.lr.iloc[0]
        lines.append(f"| {name} | {trained:,} | {lr:g} | {len(group)} | {test} | {shuffled} |")
    return "\n".join(lines)


def spread(scores: pd.Series) -> str:
    """Mean and standard deviation, which a single score does not have."""
    return f"{scores.mean():.1f} ± {scores.std():.1f}" if len(scores) > 1 else f"{scores.mean():.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/motion.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--root", help="where the videos are kept; by default in the user's cache folder")
    main(**vars(parser.parse_args()))
