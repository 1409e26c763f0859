"""Runs of detection that take seconds: a tiny untrained backbone on composed scenes."""

import json
from pathlib import Path

from small_runs import BACKBONE

from visionpeft import fit
from visionpeft.data import ComposedObjects
from visionpeft.data.detection.outlines import encoded
from visionpeft.data.segmentation.composed_scenes import class_names

FCOS = ("--model.head.width", "64", "--model.head.convs", "1")
MASKS = (
    *("--model.masks", "true", "--model.head", "MaskRCNN", "--model.head.width", "16", "--model.head.finest", "2"),
    *("--model.head.hidden", "32", "--model.head.mask_width", "8"),
)


SIDE = 48
COMPOSED = (
    *("--data.side", str(SIDE), "--data.size", "32", "--data.train", "8", "--data.val", "2", "--data.test", "4"),
    *("--data.test_batch_size", "2"),
)
NUMBERS = [3, 4, 7, 10, 20, 21, 90]  # of categories, with gaps


def as_coco(folder: Path) -> tuple[str, ...]:
    """Write the same scenes as files of COCO's annotations, in runs, and return the options that read them."""
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        scenes = ComposedObjects(train=8, val=2, test=4, side=SIDE).sources[split]
        (folder / split).mkdir(parents=True)
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": n, "name": name} for n, name in zip(NUMBERS, class_names()[1:], strict=True)]
        for index in range(count):
            content["images"].append({"id": 5 * index, "file_name": f"{index}.png"})
            scenes.image(index).save(folder / split / f"{index}.png")
            objects = scenes.objects(index)
            for label, (x0, y0, x1, y1), mask in zip(objects.labels, objects.boxes, objects.masks, strict=True):
                annotation = {"id": len(content["annotations"]), "image_id": 5 * index, "category_id": NUMBERS[label]}
                annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": encoded(mask)}
                content["annotations"].append(annotation)
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    files = [(f"--data.{split}", f"instances_{split}.json") for split in ("train", "val", "test")]
    options = ("--data.masks", "true", "--data.size", "32", "--data.scale", "[1.0, 1.5]", "--data.test_batch_size", "2")
    return "--data", "CocoDetection", "--data.root", str(folder), *(word for pair in files for word in pair), *options


def object_arguments(
    *more: str, head: tuple[str, ...] = FCOS, data: tuple[str, ...] = COMPOSED, epochs: int = 2, figures: bool = False
) -> list[str]:
    """Command line of a run of LoRA on scenes of 48 pixels."""
    return [
        *("--config", "objects_detection.yaml", *BACKBONE, "--model.method.rank", "2", *head),
        *(*data, "--data.batch_size", "4", "--model.optimisation.lr", "1e-2"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--figures", str(figures).lower()),
        *more,
    ]


def run_objects(output: Path, *more: str, **options) -> Path:
    """Train in this process and return the new run directory."""
    before = set(output.glob("*"))
    assert fit.main([*object_arguments(*more, **options), "--output", str(output)]) == 0
    (made,) = set(output.glob("*")) - before
    return made
