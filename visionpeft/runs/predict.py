"""`python -m visionpeft.predict RUN FILES...`: the classes of files, their labels, a number each, masks or objects."""

import argparse
import csv
import json
import os
from io import StringIO
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from visionpeft.data import files_dataloader, find_images, find_videos, videos_dataloader
from visionpeft.data.dataset import ImageLoader
from visionpeft.data.images import EXTENSIONS as IMAGE_EXTENSIONS
from visionpeft.data.video.reading import EXTENSIONS as VIDEO_EXTENSIONS
from visionpeft.errors import ConfigurationError
from visionpeft.files import write_whole
from visionpeft.models.video_views import over_views
from visionpeft.runs.command import Options
from visionpeft.runs.predict_masks import write_masks
from visionpeft.runs.predict_objects import write_objects
from visionpeft.runs.predictions import CSV_BEGINS, PredictedClasses, PredictedLabels, PredictedNumbers, Predictions
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import TrainedModel, open_run

SHOWN = 30
FILES = (".csv", ".json")
IN_FOLDERS = ("masks", "objects")  # labels whose predictions are several files


def predict(arguments: list[str]) -> None:
    """Predict, print a table and write the file that was asked for."""
    options = _parse(arguments)
    trained = open_run(RunDirectory.existing(options.run), options.class_names, options.task)
    _check_options(trained, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    if trained.labels == "masks":
        write_masks(trained, _images(options), options.output, options.skip_corrupt)
        return
    if trained.labels == "objects":
        write_objects(trained, _images(options), options.output, options.skip_corrupt, options.threshold)
        return
    loader, files = _loader(trained, options)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return model(batch) if trained.sampling is None else over_views(model, batch)

    with torch.inference_mode():
        answers = torch.cat([trained.answers(logits(batch.to(device))).cpu() for batch, _ in loader])
    predictions = _predictions(trained, files, answers, options)
    kind = "image" if trained.sampling is None else "video"
    _print(predictions, kind)
    if options.output is not None:
        _write(predictions, options.output, kind)


def _predictions(
    trained: TrainedModel, files: list[Path], answers: torch.Tensor, options: argparse.Namespace
) -> Predictions:
    if trained.labels == "number":
        return PredictedNumbers(files, answers)
    if trained.labels == "several":
        threshold = 0.5 if options.threshold is None else options.threshold
        return PredictedLabels(files, answers, trained.class_names, threshold)
    return PredictedClasses(files, answers, trained.class_names, 5 if options.top_k is None else options.top_k)


def _check_options(trained: TrainedModel, options: argparse.Namespace) -> None:
    """Refuse an option of other labels than the run has learnt, and one class where classes are told apart."""
    if options.class_names is not None and len(options.class_names) < 2 and not trained.judges_each:
        raise ConfigurationError(
            f"--class-names {options.class_names[0]!r} names 1; give at least two classes, which the run in "
            f"{options.run} tells apart"
        )
    for option, value, labels in (
        ("--top-k", options.top_k, ("classes",)),
        ("--threshold", options.threshold, ("several", "objects")),
    ):
        if value is not None and trained.labels not in labels:
            raise ConfigurationError(
                f"{option} belongs to runs of labels {' or '.join(map(repr, labels))}, but the run in {options.run} "
                f"has learnt labels '{trained.labels}'; leave it out"
            )
    if options.output is not None and (options.output.suffix in FILES) == (trained.labels in IN_FOLDERS):
        wanted = f"be a folder, for {trained.labels}" if trained.labels in IN_FOLDERS else "end in .csv or .json"
        raise ConfigurationError(f"--output must {wanted}, not {options.output.name!r}")


def _loader(trained: TrainedModel, options: argparse.Namespace) -> tuple[ImageLoader, list[Path]]:
    """Batches of the files and folders named, and the files that are in them."""
    if trained.sampling is None:
        return files_dataloader(
            _images(options), trained.preprocessing, resize=trained.resize, skip_corrupt=options.skip_corrupt
        )
    files = find_videos(options.files)
    if wrong := [file for file in files if file.suffix.lower() in IMAGE_EXTENSIONS - VIDEO_EXTENSIONS]:
        raise ConfigurationError(
            f"{wrong[0]} is an image, but the run in {options.run} classifies videos; name video files, or folders "
            "whose images are the frames"
        )
    return videos_dataloader(
        files,
        trained.preprocessing,
        trained.sampling,
        crops=trained.crops,
        skip_corrupt=options.skip_corrupt,
        resizing=trained.resizing,
    )


def _images(options: argparse.Namespace) -> list[Path]:
    """The images of the files and folders named."""
    files = find_images(options.files)
    if wrong := [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS - IMAGE_EXTENSIONS]:
        raise ConfigurationError(
            f"{wrong[0]} is a video, but the run in {options.run} is one of images; name images, or a run of videos, "
            "such as one of video_st_adapter.yaml"
        )
    return files


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Options("python -m visionpeft.predict", description="Predict what files show, as a run has learnt.")
    parser.add_argument("run", help="directory of a finished run")
    parser.add_argument("files", nargs="+", help="image files, for a run of videos video files, or folders of them")
    parser.add_argument("--top-k", type=int, help="classes for each file (5)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="for runs of several labels: the probability above which one applies (0.5); for runs of objects: the "
        "score from which they are drawn (0.5)",
    )
    parser.add_argument(
        "--class-names",
        help="classes to tell apart in place of the trained ones, separated by commas, or a text file with one a line; "
        "for runs of a learner on a CLIP, of whole images or of pixels",
    )
    parser.add_argument("--task", help="for runs of several tasks: that of the images")
    parser.add_argument("--output", type=Path, help="a .csv or .json file to write; of masks and objects, a folder")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave damaged files out instead of stopping")
    options = parser.parse_args(arguments)
    if options.top_k is not None and options.top_k < 1:
        raise ConfigurationError(f"--top-k must be at least 1, not {options.top_k}")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ConfigurationError(f"--threshold must be a probability from 0 to 1, not {options.threshold}")
    if options.output is not None and not options.output.parent.is_dir():
        raise ConfigurationError(f"--output: folder {options.output.parent} does not exist; make it first")
    is_file = options.output is not None and (options.output.suffix in FILES or options.output.is_file())
    if is_file and options.output.exists() and not _is_predictions(options.output):
        raise ConfigurationError(f"--output: {options.output} exists and holds something else than predictions")
    if options.class_names is not None:
        options.class_names = _class_names(options.class_names)
    return options


def _class_names(text: str) -> list[str]:
    """Class names out of a file, if there is one of that name, or a list with commas."""
    is_file = os.path.isfile(text)  # pathlib raises for a text too long to be a path
    if text.endswith(".txt") and not is_file:
        raise ConfigurationError(f"--class-names: file {text} does not exist")
    try:
        parts = Path(text).read_text(encoding="utf-8-sig").splitlines() if is_file else text.split(",")
    except UnicodeDecodeError:
        raise ConfigurationError(f"--class-names: {text} is no text file in UTF-8") from None
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise ConfigurationError(f"--class-names {text!r} names no class")
    return names


def _print(predictions: Predictions, kind: str) -> None:
    table = Table(kind, *predictions.columns)
    for row in islice(predictions.cells(), SHOWN):
        table.add_row(*row)
    console = Console()
    console.print(table, highlight=False)
    if len(predictions.files) > SHOWN:
        more = len(predictions.files) - SHOWN
        console.print(f"and {more:,} more {kind}s; --output predictions.csv writes them all")


def _is_predictions(path: Path) -> bool:
    """Whether a file begins as `_write` begins one."""
    begins = (b'[\n  {\n    "path": ',) if path.suffix == ".json" else CSV_BEGINS
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(max(map(len, begins))).startswith(begins)


def _write(predictions: Predictions, path: Path, kind: str) -> None:
    if path.suffix == ".json":
        text = json.dumps(list(predictions.objects()), indent=2) + "\n"
    else:
        file = StringIO(newline="")
        csv.writer(file).writerows([predictions.header, *predictions.lines()])
        text = file.getvalue()
    write_whole(path, text.encode("utf-8", errors="surrogateescape"))  # names of files need not be UTF-8
    print(f"predictions of {len(predictions.files):,} {kind}s written to {path}")
