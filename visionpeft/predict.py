"""`python -m visionpeft.predict RUN IMAGES...`: the most probable classes of image files."""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from visionpeft.cli import command
from visionpeft.data import files_dataloader, find_images
from visionpeft.errors import ConfigurationError
from visionpeft.run_directory import RunDirectory
from visionpeft.trained_model import open_run

SHOWN = 30


def predict(arguments: list[str]) -> None:
    """Predict, print a table and write the file that was asked for."""
    options = _parse(arguments)
    run = RunDirectory.existing(options.run)
    files = find_images(options.images)
    trained = open_run(run, options.class_names)
    loader, files = files_dataloader(
        files, trained.preprocessing, resize=trained.resize, skip_corrupt=options.skip_corrupt
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    with torch.inference_mode():
        probabilities = torch.cat([model(images.to(device)).float().softmax(dim=-1).cpu() for images, _ in loader])
    rows = _rows(files, probabilities, trained.class_names, options.top_k)
    _print(rows)
    if options.output is not None:
        _write(rows, options.output)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m visionpeft.predict", description="Predict the classes of images.")
    parser.add_argument("run", help="directory of a finished run")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top-k", type=int, default=5, help="classes for each image (5)")
    parser.add_argument(
        "--class-names",
        help="classes to tell apart in place of the trained ones, separated by commas, or a text file with one a line; "
        "for runs of a learner on a CLIP",
    )
    parser.add_argument("--output", type=Path, help="a .csv or .json file to write")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave damaged images out instead of stopping")

    def refuse(message: str):
        raise ConfigurationError(f"{message}; see python -m visionpeft.predict --help")

    parser.error = refuse
    options = parser.parse_args(arguments)
    if options.top_k < 1:
        raise ConfigurationError(f"--top-k must be at least 1, not {options.top_k}")
    if options.output is not None and options.output.suffix not in (".csv", ".json"):
        raise ConfigurationError(f"--output must end in .csv or .json, not {options.output.name!r}")
    if options.class_names is not None:
        options.class_names = _class_names(options.class_names)
    return options


def _class_names(text: str) -> list[str]:
    """Class names out of a file, if there is one of that name, or a list with commas."""
    is_file = os.path.isfile(text)  # pathlib raises for a text too long to be a path
    if text.endswith(".txt") and not is_file:
        raise ConfigurationError(f"--class-names: file {text} does not exist")
    try:
        parts = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    except UnicodeDecodeError:
        raise ConfigurationError(f"--class-names: {text} is no text file in UTF-8") from None
    names = [part.strip() for part in parts if part.strip()]
    if len(names) < 2:
        raise ConfigurationError(f"--class-names {text!r} names {len(names)} classes; give at least two")
    return names


def _rows(files: list[Path], probabilities: torch.Tensor, class_names: list[str], top_k: int) -> list[dict]:
    values, indices = probabilities.topk(min(top_k, len(class_names)), dim=-1)
    return [
        {
            "path": str(file),
            "classes": [class_names[index] for index in row_indices],
            "probabilities": [round(value, 6) for value in row_values],
        }
        for file, row_indices, row_values in zip(files, indices.tolist(), values.tolist(), strict=True)
    ]


def _print(rows: list[dict]) -> None:
    table = Table("image", "class", "probability", "then")
    for row in rows[:SHOWN]:
        (first, *others), (probability, *rest) = row["classes"], row["probabilities"]
        then = ", ".join(f"{name} {100 * value:.1f} %" for name, value in zip(others, rest, strict=True))
        table.add_row(row["path"], first, f"{100 * probability:.1f} %", then)
    console = Console()
    console.print(table, highlight=False)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN:,} more images; --output predictions.csv writes them all")


def _write(rows: list[dict], path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2) + "\n")
    else:
        ranks = range(1, len(rows[0]["classes"]) + 1)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
            for row in rows:
                pairs = zip(row["classes"], row["probabilities"], strict=True)
                writer.writerow([row["path"], *(value for pair in pairs for value in pair)])
    print(f"predictions of {len(rows):,} images written to {path}")


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.predict`; returns the exit code."""
    return command(predict, arguments)


if __name__ == "__main__":
    sys.exit(main())
