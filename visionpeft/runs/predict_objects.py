"""What `python -m visionpeft.predict` does with a run of detection: COCO's results, and an overlay for each image."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from visionpeft.data.detection.outlines import encoded
from visionpeft.data.detection.overlays import drawn
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.errors import DataError
from visionpeft.files import write_json
from visionpeft.runs.predicted_files import named_after, readable, save_png
from visionpeft.sharing.trained_model import TrainedModel

SHOWN = 30
THRESHOLD = 0.5  # of the score of what is drawn and counted
RESULTS, IMAGES = "detections.json", "images.json"


def write_objects(
    trained: TrainedModel, files: list[Path], folder: Path | None, skip_corrupt: bool, threshold: float | None
) -> None:
    """Predict, print what each image shows, and write results and overlays into the folder, if any.

    `detections.json` is a list of COCO's results with all that was found, as its evaluations take it: "image_id",
    "category_id", "bbox" (x, y, width, height), "score", and with masks "segmentation". Before masks are measured by
    size, "bbox" must be dropped: evaluations take its area for that of the mask. `images.json` says which image and
    category the numbers are. The number of an image is the one that its name consists of where all names are
    numbers, as in COCO, else its place from 1 on. `<stem>.png` shows what has at least the threshold as score.
    """
    overlays = None if folder is None else named_after(files, folder, (".png",), "overlays")
    numbers = _numbers(files)
    least = THRESHOLD if threshold is None else threshold
    table, results, images = Table("image", f"objects with a score from {least:g}"), [], []
    for index, image, found in _predicted(trained, files, skip_corrupt):
        kept = found["scores"] >= least
        shown = {name: values[kept] for name, values in found.items()}
        results += _results(found, numbers[index], trained.category_ids)
        images.append(
            {"id": numbers[index], "file_name": files[index].name, "width": image.width, "height": image.height}
        )
        if overlays is not None:
            folder.mkdir(parents=True, exist_ok=True)
            texts = [
                f"{trained.class_names[label]} {score:.2f}"
                for label, score in zip(shown["labels"], shown["scores"], strict=True)
            ]
            picture = drawn(image, shown["boxes"], shown["labels"], texts, trained.palette, shown.get("masks"))
            save_png(picture, *overlays[index])
        if len(images) <= SHOWN:
            counts = Counter(trained.class_names[label] for label in shown["labels"])
            table.add_row(
                str(files[index]), ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "-"
            )
    if not images:
        raise DataError(f"none of the {len(files)} image files can be read")
    console = Console()
    console.print(table, highlight=False)
    if len(images) > SHOWN:
        console.print(f"and {len(images) - SHOWN:,} more images", highlight=False)
    if folder is None:
        console.print("--output FOLDER writes them as COCO's results, and an overlay of each image", highlight=False)
        return
    names = [
        {"id": number, "name": name} for number, name in zip(trained.category_ids, trained.class_names, strict=True)
    ]
    write_json(folder / IMAGES, {"images": images, "categories": names})
    write_json(folder / RESULTS, results)
    console.print(
        f"{len(results):,} detections, and overlays of {len(images):,} images, written to {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _predicted(
    trained: TrainedModel, files: list[Path], skip_corrupt: bool
) -> Iterator[tuple[int, Image.Image, dict[str, np.ndarray]]]:
    """Place of each image that can be read, the image, and what was found in its pixels."""
    transform = ObjectTransform(trained.preprocessing, trained.size or min(trained.preprocessing.input_size))
    device = next(trained.model.parameters()).device
    for index, image in readable(files, skip_corrupt):
        pixels = transform.normalise(transform.measure(image)[None]).to(device)
        with torch.inference_mode():
            (found,) = trained.model(pixels, [(image.height, image.width)])
        yield index, image, {name: value.cpu().numpy() for name, value in found.items()}


def _results(found: dict[str, np.ndarray], image: int, categories: list[int]) -> list[dict]:
    results = []
    for index, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
        result = {
            "image_id": image,
            "category_id": categories[found["labels"][index]],
            "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(found["scores"][index]), 6),
        }
        if "masks" in found:
            result["segmentation"] = encoded(found["masks"][index])
        results.append(result)
    return results


def _numbers(files: list[Path]) -> list[int]:
    """The number of each image."""
    stems = [file.stem for file in files]
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 15 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(files) + 1))
