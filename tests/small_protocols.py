"""Protocols that take seconds: a tiny untrained backbone on a few rendered images."""

import csv
import os
from pathlib import Path

from visionpeft.errors import ConfigurationError

CONFIG = """
model:
  class_path: ImageClassification
  init_args:
    backbone: test_vit
    pretrained: false
    backbone_kwargs: {img_size: 32, depth: DEPTH}
    method: {class_path: METHOD}
    optimisation: {lr: 1e-3, warmup_epochs: 0}
data:
  class_path: VTAB1k
  init_args: {task: dsprites_ori, batch_size: 32, test_samples: 40}
trainer: {max_epochs: 3, limit_train_batches: 3, accelerator: cpu, logger: false}
"""
RECIPE = """
source: two rates
grid: {model.optimisation.lr: [1.0e-3, 1.0e-2]}
paper: {model.optimisation.warmup_epochs: 1}
seeds: [7]
report: best_test
differs: it has no authors
"""


def write_config(
    folder: Path, name: str = "small", method: str = "BitFit", recipe: str = RECIPE, depth: int = 6
) -> str:
    """A configuration and its recipe; with two blocks, rates and members hardly differ in what they reach."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / f"vtab_{name}.yaml").write_text(CONFIG.replace("METHOD", method).replace("DEPTH", str(depth)))
    (folder / "recipes" / f"vtab_{name}.yaml").write_text(recipe)
    return str(folder / f"vtab_{name}.yaml")


def read_rows(folder: Path) -> list[dict]:
    """Rows of results.csv."""
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measured(rows: list[dict]) -> list[dict]:
    """Rows without what differs between two runs of the same training."""
    return [{key: row[key] for key in row if key not in ("training_seconds", "run_directory")} for row in rows]


class Piece:
    """Work that writes which process did it and where, or fails.

    It is here because another process that does it imports its module: those of tests import Lightning.
    """

    def __init__(self, name, error=None):
        self.name, self.text, self.error = name, f"piece {name}", error

    def done(self, folder):
        """Whether it was done."""
        return (folder / "done").is_file()

    def do(self, folder):
        """Do it."""
        if self.error:
            raise ConfigurationError(self.error)
        (folder / "done").write_text(f"{os.getpid()} {Path.cwd()}")
