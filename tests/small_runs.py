"""Training runs that take a second: a tiny untrained backbone on a few coloured squares."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from visionpeft import fit
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.tasks import ImageTask

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
BACKBONE = [
    "--model.backbone",
    "test_vit",
    "--model.pretrained",
    "false",
    "--model.backbone_kwargs",
    "{img_size: 32, depth: 2}",
]


def draw_images(folder: Path, per_class: int = 10) -> Path:
    """Noisy squares of three colours in a folder for each class."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            noise = generator.integers(-60, 60, (32, 32, 3))
            pixels = np.clip(np.array(colour) * 0.7 + 40 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def draw_splits(root: Path, **per_class: int) -> Path:
    """Such images in a folder for each split, of which the number of images of a class is given."""
    for split, number in per_class.items():
        draw_images(root / split, number)
    return root


def arguments(images: Path, *more: str, epochs: int = 3, figures: bool = False) -> list[str]:
    """Command line of a run of LoRA on such images; figures take longer than the run."""
    return [
        *("--config", "images_lora.yaml", *BACKBONE, "--data.root", str(images), "--data.batch_size", "8"),
        *(
            "--model.optimisation.warmup_epochs",
            "1",
            "--trainer.max_epochs",
            str(epochs),
            "--trainer.accelerator",
            "cpu",
        ),
        *("--figures", str(figures).lower()),
        *more,
    ]


def run(folder: Path, images: Path, *more: str, epochs: int = 3, figures: bool = False) -> Path:
    """Train in this process and return the new run directory."""
    before = set(folder.glob("*"))
    assert fit.main([*arguments(images, *more, epochs=epochs, figures=figures), "--output", str(folder)]) == 0
    (made,) = set(folder.glob("*")) - before
    return made


def configure(run_directory: Path, method: dict, **options) -> None:
    """Write another method, and other options of the run, into its configuration, as somebody may by hand."""
    content = yaml.safe_load((run_directory / "config.yaml").read_text())
    content["model"]["init_args"]["method"] = method
    content |= options
    (run_directory / "config.yaml").write_text(yaml.safe_dump(content))


@contextmanager
def copied_in(epoch: int, target: Path):
    """A run that trains in this context leaves a copy of its directory as `kill -9` would leave it in an epoch.

    So an interrupted run costs no training of its own. The epoch, counted from zero, has been trained, and nothing of
    it is written.
    """
    write = EpochHistory.on_train_epoch_end

    def copy_first(self, trainer, pl_module):
        if trainer.current_epoch == epoch:
            shutil.copytree(self.path.parent, target)
        write(self, trainer, pl_module)

    with mock.patch.object(EpochHistory, "on_train_epoch_end", copy_first):
        yield


@contextmanager
def failing_in_second_epoch():
    """A training in this context ends by an error when its second epoch is trained and nothing of that is written."""
    write = EpochHistory.on_train_epoch_end

    def fail(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise ZeroDivisionError
        return write(self, trainer, pl_module)

    with mock.patch.object(EpochHistory, "on_train_epoch_end", fail), pytest.raises(ZeroDivisionError):
        yield


def history_of(run_directory: Path) -> list[dict]:
    """Its epochs as measured, without the seconds that they took."""
    rows = read_history(run_directory / "metrics.csv")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def results(run_directory: Path) -> dict:
    """Its results.json."""
    return json.loads((run_directory / "results.json").read_text())


@contextmanager
def watched_steps():
    """A list of what each training step in this context gets: its epoch, its learning rate and the sum of its batch."""
    seen, step = [], ImageTask.training_step

    def watched(self, batch, batch_idx):
        rate = self.optimizers().param_groups[0]["lr"]
        seen.append((self.current_epoch, round(rate, 9), round(batch[0].double().sum().item(), 3)))
        return step(self, batch, batch_idx)

    with mock.patch.object(ImageTask, "training_step", watched):
        yield seen
