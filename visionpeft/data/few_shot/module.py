"""The data of few-shot learning with CLIP: the published benchmark, its shifted test sets, and people's own images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from visionpeft.backbones.preprocessing import Resize
from visionpeft.clip.templates import PHOTO, check_templates
from visionpeft.data.few_shot.definitions import few_shot_datasets, find_few_shot
from visionpeft.data.few_shot.draw import Classes, Draw, Rule, class_subset, draw, read_draw, restrict
from visionpeft.data.few_shot.splits import Place, Splits, read_image_folder, read_image_lists, read_splits
from visionpeft.data.few_shot.templates import dataset_template
from visionpeft.data.module import ImageDataModule
from visionpeft.data.records import ImageFiles, ImageSet, Row, path_inside
from visionpeft.data.transforms import Augmentation
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.methods.parts.field_types import as_python

OWN = {"folder": [], "list": ["csv"]}


class FewShot(ImageDataModule):
    """A few images of each class to train on, the full test split to score.

    Draws are those of CoOp (Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", arXiv 2109.01134) where
    its split file is read: `shots` of each class, and min(shots, 4) for selection. "base" and "new" keep one half of
    the classes in every split, after drawing. ImageNetV2, -Sketch, -A and -R only have a test split; ImageNet-A and -R
    have 200 classes.

    Args:
        dataset: of the benchmark: imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, food101,
            fgvc_aircraft, sun397, dtd, eurosat, ucf101, imagenetv2, imagenet_sketch, imagenet_a, imagenet_r; embedded:
            clipart, drawings; your own: "folder" (root/<class>/, or root/{train,val,test}/<class>/), "list"
            (root/train.csv and where there are any val.csv and test.csv, or .json, as `ImageList` reads them).
        root: folder in which the data sets lie, or the data set's own; not needed for embedded ones.
        shots: training images of each class; all when absent, none with 0.
        seed: of the draw.
        classes: "all", "base" (the first half, rounded up) or "new" (the others).
        split: "published", or "own": the one built by `python -m visionpeft.prepare few_shot`.
        folder: name of the data set's folder in the root, in place of the usual ones.
        image_folder: folder of its images in that, in place of the usual ones.
        split_file: split file, in place of the one in the data set's folder.
        store: JSON file that keeps the draw: read if it exists, and refused if it is of another split, else written.
        template: prompt template, or name of a set of them, recorded with the data and used for zero-shot; the data
            set's own when absent.
        class_names: names in the order of the labels, in place of those of the data set.
        val_fraction: of dataset "folder" without splits: share of each class held out for selection.
        test_fraction: of dataset "folder" without splits: share of each class held out for the test.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".
        batch_size: images in a batch.
        drop_last: leave out the last incomplete training batch; when absent, where there is a whole one, as all
            learners do that were published on CoOp's trainer. Tip-Adapter-F and CLIP-LoRA keep it.
        draw_rule: by whose rule images are drawn: "coop", or "clip_lora", which draws the images for selection before
            those to train on and repeats images of a class that has too few.

    Raises:
        ConfigurationError: an unknown data set, or an option out of range.
        DataError: no root, a file that is missing or malformed, or a stored draw of another split.
    """

    def __init__(
        self,
        dataset: str = "clipart",
        root: str | Path | None = None,
        shots: int | None = 16,
        seed: int = 1,
        classes: Classes = "all",
        split: Literal["published", "own"] = "published",
        folder: str | Path | None = None,
        image_folder: str | Path | None = None,
        split_file: str | Path | None = None,
        store: str | Path | None = None,
        template: str | None = None,
        class_names: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        resize: Resize = "crop",
        augmentation: Augmentation = "random_resized_crop",
        batch_size: int = 32,
        drop_last: bool | None = None,
        draw_rule: Rule = "coop",
        **kwargs,
    ):
        shots, seed = as_python(shots), as_python(seed)  # of an array of seeds, too
        definitions = few_shot_datasets()
        key = find_few_shot(dataset, OWN)
        _check(shots, classes, split, draw_rule)
        self.own_template = template is not None
        template = template or definitions.get(key, {}).get("templates", {}).get("zero_shot", PHOTO)
        check_templates(template)
        places = {"folder": folder, "image_folder": image_folder, "split_file": split_file}
        _check_places(key, definitions, [name for name, place in places.items() if place is not None])
        if key in OWN:
            splits = _own(key, root, class_names, val_fraction, test_fraction)
        else:
            definition = definitions[key]
            if root is None and not definition.get("embedded"):
                raise DataError(
                    f"data set '{key}' needs root, the folder that holds {definition['folders'][0]}/; it comes from "
                    f"{definition['source']}; clipart needs none"
                )
            place = Place(Path(root or "."), folder, image_folder, split_file)
            splits = read_splits(key, definition, place, own=split == "own", train=shots != 0)
        labels = _named(splits.class_names, class_names)
        rows, self.draw = _drawn(key, splits, shots, seed, store, draw_rule)
        kept = class_subset(len(labels), classes)
        sources = {name: _files(splits.folder, restrict(members, kept)) for name, members in rows.items()}
        trained = len(sources.get("train", ()))
        about = {
            "dataset": "FewShot",
            "task": key,
            "trained_on": "train" if trained else None,
            "selected_on": "val" if "val" in sources else None,
            "shots": shots if trained else 0,
            "draw_seed": self.draw.seed if self.draw else None,
            **({"draw_rule": draw_rule} if self.draw and draw_rule != "coop" else {}),
            "class_subset": classes,
            "split": splits.origin,
            "split_sha256": splits.sha256,
            "draw_sha256": self.draw.sha256 if self.draw else None,
            "template": template,
        }
        notes = [*splits.notes, *_short(rows, kept, shots)]
        super().__init__(
            ImageSet(sources, [labels[label] for label in kept], about, notes),
            resize=resize,
            augmentation=augmentation,
            batch_size=batch_size,
            drop_last=trained >= batch_size > 0 if drop_last is None else drop_last,
            **kwargs,
        )
        if store is not None and not Path(store).is_file():
            self.draw.write(store)

    @property
    def template(self) -> str:
        """The prompt template of this data, `{}` standing for the class name, or the name of a set of them."""
        return str(self.images.about["template"])

    def template_for(self, style: str) -> str:
        """The template that a learner of this style takes for this data set: the one given, if one was.

        Args:
            style: such as "zero_shot" or "kgcoop"; see `dataset_template`.
        """
        key = str(self.images.about["task"])
        return self.template if self.own_template or key in OWN else dataset_template(key, style)

    @property
    def published(self) -> dict[str, dict[str, float | str]]:
        """What learners' authors chose for this data set, by the learner: of "tip_adapter" its alpha and search range.

        Of "tcp" the words after its context.

        Empty for data sets on which they did not measure.
        """
        return few_shot_datasets().get(str(self.images.about["task"]), {}).get("published", {})


def _check(shots: int | None, classes: str, split: str, draw_rule: str) -> None:
    if shots is not None and shots < 0:
        raise ConfigurationError(f"shots {shots} must be 1 or more, absent for all images, or 0 for none")
    if classes not in ("all", "base", "new"):
        raise ConfigurationError(f"unknown classes '{classes}': choose all, base or new")
    if split not in ("published", "own"):
        raise ConfigurationError(f"unknown split '{split}': choose published or own")
    if draw_rule not in ("coop", "clip_lora"):
        raise ConfigurationError(f"unknown draw_rule '{draw_rule}': choose coop or clip_lora")


def _check_places(key: str, definitions: Mapping[str, dict], given: Sequence[str]) -> None:
    """Refuse places where a data set of this name is not looked for."""
    if given and (key in OWN or definitions[key].get("embedded")):
        read = "is read as it lies in root" if key in OWN else "is in the package"
        it = "it" if len(given) == 1 else "them"
        raise ConfigurationError(
            f"dataset '{key}' {read}, and {' and '.join(given)} would not be read; leave {it} out, or name a published "
            "data set, which may lie elsewhere"
        )


def _own(
    key: str, root: str | Path | None, class_names: Sequence[str] | None, val_fraction: float, test_fraction: float
) -> Splits:
    if root is None:
        what = "with a folder for each class" if key == "folder" else "that holds train.csv"
        raise DataError(f"dataset '{key}' needs root, the folder {what}")
    if key == "folder":
        return read_image_folder(Path(root), val_fraction, test_fraction)
    return read_image_lists(Path(root), None if class_names is None else list(class_names))


def _named(found: list[str], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return found
    if len(given) != len(found):
        raise DataError(f"class_names lists {len(given)} names, but the data set has {len(found)} classes")
    return list(given)


def _drawn(
    key: str, splits: Splits, shots: int | None, seed: int, store: str | Path | None, rule: Rule
) -> tuple[dict[str, list[Row]], Draw | None]:
    """Rows by split, and the draw if one was made."""
    if "train" not in splits.rows or not shots:
        if store is not None:
            raise ConfigurationError("store keeps a draw, but nothing is drawn: set shots, or leave store out")
        kept = splits.rows if shots is None else {name: rows for name, rows in splits.rows.items() if name == "test"}
        if not kept:
            raise DataError(f"there is no test split in {splits.folder}, and with shots 0 nothing else is used")
        return kept, None
    if store is not None and Path(store).is_file():
        drawn = read_draw(Path(store), key, splits, shots, seed, rule)
    else:
        drawn = draw(key, splits, shots, seed, rule)
    return splits.rows | drawn.rows(splits), drawn


def _files(folder: Path, rows: list[Row]) -> ImageFiles:
    return ImageFiles([path_inside(folder, row.path, row.where) for row in rows], [row.label for row in rows])


def _short(rows: dict[str, list[Row]], kept: range, shots: int | None) -> list[str]:
    """Classes that have fewer images than asked for."""
    if not shots or "train" not in rows:
        return []
    counts = dict.fromkeys(kept, 0)
    for row in rows["train"]:
        if row.label in counts:
            counts[row.label] += 1
    short = sum(count < shots for count in counts.values())
    return [f"{short} of {len(counts)} classes have fewer than {shots} training images"] if short else []
