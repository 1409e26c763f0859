"""Images and objects as COCO and many programs of annotation write them."""

from pathlib import Path

from visionpeft.data.detection.annotations import Annotated, annotated, categories_of, read_file, without_parent
from visionpeft.data.detection.module import DetectionDataModule
from visionpeft.data.detection.objects import ObjectFiles, ObjectSet, check_apart
from visionpeft.data.ordering import permutation
from visionpeft.errors import DataError

HELD_OUT = 0.05  # of the training images, for selection, where no split is for it
COCO = {"train": "annotations/instances_train2017.json", "test": "annotations/instances_val2017.json"}
ROBOFLOW = {
    "train": "train/_annotations.coco.json",
    "val": "valid/_annotations.coco.json",
    "test": "test/_annotations.coco.json",
}


class CocoDetection(DetectionDataModule):
    """Boxes, and masks, of files of annotations in COCO's format: COCO 2017 as distributed, or your own.

    Lin et al. 2014, "Microsoft COCO: Common Objects in Context" (arXiv 1405.0312). Of COCO itself the published
    validation split is the test, and a part of the training split is held out for selection; of Roboflow's folders
    train/, valid/ and test/ each is what it says.

    Numbers of categories, which may have gaps, become class indices in their order, and go back into results; both are
    in the record of a run. Crowds are not learnt, and count nowhere when measured. Annotations without extent, or
    wholly outside their image, are left out and counted; boxes and outlines that reach beyond it are cut to learn and
    kept to measure. Images without objects stay.

    The category that Roboflow puts first, of which all others are kinds and no object is one, is no class. Files in the
    form of LVIS, which say of some categories alone whether an image has them, are refused.

    Args:
        root: the folder.
        train: file of annotations to train on, below the root; COCO's or Roboflow's own when absent.
        val: that for selection; a part of the training images when absent.
        test: that of the test.
        images: folder of the images, below the root. When absent, that of the split's name for
            annotations/instances_<name>.json, else the folder of the file.
        masks: read masks as well, which every annotation must have then.
        val_fraction: share of the training images held out for selection, where no file is for it; 0 for none.
        split_seed: seed of that.

    Raises:
        DataError: a file is missing, or is none of COCO's; see `annotated`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
        masks: bool = False,
        val_fraction: float = HELD_OUT,
        split_seed: int = 0,
        **kwargs,
    ):
        root = Path(root)
        files = {split: root / name for split, name in _files(root, train, val, test).items()}
        contents = {split: read_file(path) for split, path in files.items()}
        parent = without_parent(list(contents.values()))
        categories = categories_of(contents["train"], files["train"])
        names = list(categories.values())
        found = {}
        for split, path in files.items():
            folder = _images(root, path, images)
            found[split] = annotated(contents.pop(split), path, folder, names, masks)
        for split, each in found.items():
            if each.crowds and not any(each.numbers):
                raise DataError(
                    f"all {each.crowds} objects of {files[split]} are crowds (iscrowd 1), which are not learnt and "
                    "count nowhere; give those that are single objects the iscrowd 0"
                )
        sources = {split: _source(each, masks) for split, each in found.items()}
        check_apart(sources)
        if not 0 <= val_fraction < 1:
            raise DataError(f"val_fraction {val_fraction} must be from 0 to below 1")
        held_out = "val" not in sources and val_fraction > 0
        if held_out:
            sources = _held_out(sources, val_fraction, split_seed)
        about = {
            "dataset": "CocoDetection",
            "task": "coco2017" if files["train"].name == "instances_train2017.json" else root.resolve().name,
            "trained_on": files["train"].name,
            "selected_on": None if "val" not in sources else "held out" if held_out else files["val"].name,
            "tested_on": files["test"].name if "test" in files else None,
            "split": "files" if "val" in files else "held out",
        }
        notes = [note for split, each in found.items() for note in _notes(split, each, names)]
        if parent is not None:
            notes.append(
                f"the category {parent!r}, of which all others are kinds and no object is one, is no class here"
            )
        super().__init__(ObjectSet(sources, names, about, notes), category_ids=list(categories), **kwargs)


def _files(root: Path, train: str | None, val: str | None, test: str | None) -> dict[str, str]:
    """The file of each split, as given, or as COCO and Roboflow have them."""
    if not root.is_dir():
        raise DataError(f"folder {root} of images and annotations does not exist")
    if train is None:
        known = next((layout for layout in (COCO, ROBOFLOW) if (root / layout["train"]).is_file()), None)
        if known is None:
            raise DataError(
                f"{root} has neither {COCO['train']} nor {ROBOFLOW['train']}; name the files with --data.train and "
                "--data.test"
            )
        given = {split: name for split, name in known.items() if (root / name).is_file()}
    else:
        given = {"train": train}
    chosen = {"val": val, "test": test}
    return given | {split: name for split, name in chosen.items() if name is not None}


def _images(root: Path, path: Path, images: str | None) -> Path:
    if images is not None:
        return root / images
    named = root / path.stem.removeprefix("instances_")
    return named if named.is_dir() else path.parent


def _source(found: Annotated, masks: bool) -> ObjectFiles:
    return ObjectFiles(found.paths, found.readers, masks, found.numbers)


def _held_out(sources: dict[str, ObjectFiles], share: float, seed: int) -> dict[str, ObjectFiles]:
    train = sources["train"]
    order = permutation(len(train), seed)
    count = round(len(train) * share)
    if not count:
        return sources
    return {**sources, "train": train.subset(sorted(order[count:])), "val": train.subset(sorted(order[:count]))}


def _notes(split: str, found: Annotated, names: list[str]) -> list[str]:
    """Remarks on what is left out, on crowds, and on classes without objects to learn."""
    notes = []
    if found.left_out:
        notes.append(f"{split}: {found.left_out} annotations without extent or outside their image are left out")
    if found.crowds:
        notes.append(f"{split}: {found.crowds} crowds, which are not learnt and count nowhere when measured")
    empty = [name for name, count in zip(names, found.by_class, strict=True) if not count]
    if split == "train" and empty:
        more = ", ..." if len(empty) > 5 else ""
        notes.append(f"train: {len(empty)} of {len(names)} classes have no object: {', '.join(empty[:5])}{more}")
    return notes
