"""Images and objects in the folders and text files of Ultralytics' YOLO."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from visionpeft.data.detection.module import DetectionDataModule
from visionpeft.data.detection.objects import ObjectFiles, Objects, ObjectSet, check_apart, objects_of
from visionpeft.data.detection.outlines import decoded
from visionpeft.data.images import list_images
from visionpeft.data.segmentation.folder import class_list
from visionpeft.data.segmentation.masks import size_of_image
from visionpeft.errors import DataError

BEYOND = 0.01  # of the image: by so much rounding may carry a coordinate over the border

Line = tuple[int, tuple[float, ...]]  # class index, and x, y, x, y, ... of a box's corners or of a polygon


class YoloFolder(DetectionDataModule):
    """Boxes, and masks of polygons, of a data.yaml with images and text files, as Ultralytics' YOLO and Roboflow write.

    The yaml has "names", a list or numbers with names, and "train", "val" and "test": a folder of images, a list of
    them, or a text file with a path a line; relative to its "path", or to its own folder. The labels of
    .../images/a.jpg are lines in .../labels/a.txt: class, then the centre x, y, width and height of a box, or x, y, x,
    y, ... of a polygon of three points or more, as shares of the image's width and height. A file may have lines of
    both. Where the yaml has a "kpt_shape", lines are a box and keypoints, of which the box is read. An image without
    such a file, or with an empty one, has no objects; how many have none is in the record.

    Boxes are cut where they reach beyond the image. Lines that come twice count once, boxes without extent not at all;
    both are counted. Without "test" there is no test split: train with --test false, or name one.

    Args:
        root: the data.yaml, or a folder that holds it.
        masks: read masks as well; every line must be a polygon then.

    Raises:
        DataError: the yaml or a folder is missing, a line that is neither box nor polygon, a class that has no name, or
            a value more than a hundredth below 0 or above 1.
    """

    def __init__(self, root: str | Path, masks: bool = False, **kwargs):
        path = _yaml_of(Path(root))
        content = _read(path)
        names, numbers = _names(content.get("names"), path)
        if str(content.get("nc", len(names))) != str(len(names)):
            raise DataError(
                f"{path} says nc: {content['nc']}, but names {len(names)} classes ({', '.join(names)}); correct one of "
                "the two"
            )
        keypoints = _keypoints(content.get("kpt_shape"), path)
        sources, notes = {}, []
        for split in ("train", "val", "test"):
            if content.get(split):
                source, of_split = _source(content[split], content.get("path"), path, numbers, masks, split, keypoints)
                sources[split] = source
                notes += of_split
        if "train" not in sources:
            raise DataError(f"{path} names no train images")
        check_apart(sources)
        about = {
            "dataset": "YoloFolder",
            "task": path.resolve().parent.name,
            "trained_on": "train",
            "selected_on": "val" if "val" in sources else None,
        }
        kwargs.setdefault("category_ids", list(numbers))
        super().__init__(ObjectSet(sources, names, about, notes), **kwargs)


def _yaml_of(root: Path) -> Path:
    if root.is_file():
        return root
    found = [path for pattern in ("*.yaml", "*.yml") for path in sorted(root.glob(pattern))] if root.is_dir() else []
    if (root / "data.yaml") in found:
        return root / "data.yaml"
    if len(found) != 1:
        has = f"{len(found)} files of YAML" if found else "no data.yaml"
        raise DataError(f"{root} has {has}; give the one that names classes and images")
    return found[0]


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} names no classes and images")
    return content


def _names(given: object, path: Path) -> tuple[list[str], list[int]]:
    """Names of the classes, and their numbers in the text files."""
    if isinstance(given, dict) and all(isinstance(number, int) for number in given):
        ordered = sorted(given.items())
        numbers, names = [number for number, _ in ordered], [name for _, name in ordered]
    elif isinstance(given, list):
        numbers, names = list(range(len(given))), given
    else:
        raise DataError(f"{path} has no names of classes, as a list or as numbers with names")
    return class_list([str(name) for name in names]), numbers


def _keypoints(shape: object, path: Path) -> int:
    """How many values of keypoints follow each box: number of points times 2 (x, y) or 3 (and whether it is seen)."""
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(each, int) for each in shape):
        raise DataError(f"{path} has the kpt_shape {shape!r}, which is not [number of keypoints, 2 or 3]")
    return shape[0] * shape[1]


def _source(
    given: str | list[str],
    base: str | None,
    path: Path,
    numbers: Sequence[int],
    masks: bool,
    split: str,
    keypoints: int,
) -> tuple[ObjectFiles, list[str]]:
    """The images of a split, and remarks."""
    images = _images(given, base, path)
    readers, counts, found = [], [], Counter()
    for image in images:
        labels = _labels_of(image)
        lines = _lines(labels, numbers, masks, found, keypoints)
        readers.append(partial(_objects, image, lines))
        counts.append(len(lines))
    if not any(counts):
        places = sorted({str(_labels_of(image).parent) for image in images})
        raise DataError(f"none of the {len(images)} images of the {split} split has an object in {', '.join(places)}")
    remarks = {
        "without": "images have no file of labels, and so no objects",
        "twice": "lines that come twice count once",
        "empty": "boxes and polygons without extent are left out",
        "keypoints": "boxes have keypoints, which are not read",
    }
    notes = [f"{split}: {found[key]} {told}" for key, told in remarks.items() if found[key]]
    return ObjectFiles(images, readers, masks, counts), notes


def _images(given: str | list[str], base: str | None, path: Path) -> list[Path]:
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(each, str) for each in [*given, "" if base is None else base]):
        where = "" if base is None else f" in the path {base!r}"
        raise DataError(f"{path} names the images {given!r}{where}; these must be names of folders or of text files")
    places = [_place(each, base, path) for each in given]
    images: list[Path] = []
    for place in places:
        if place.is_dir():
            images += list_images(place)
        else:
            lines = [line.strip() for line in _text_of(place, f"{path} names the images {place}, which").splitlines()]
            images += [place.parent / line for line in lines if line]
    if not images:
        raise DataError(f"{path}: there are no images in {', '.join(map(str, places))}")
    if twice := [image for image, count in Counter(images).items() if count > 1]:
        raise DataError(f"{path} names image {twice[0]} twice")
    by_labels: dict[Path, Path] = {}
    for image in images:
        if (other := by_labels.setdefault(_labels_of(image), image)) != image:
            raise DataError(f"images {other} and {image} would both have the labels {_labels_of(image)}; rename one")
    return images


def _place(name: str, base: str | None, path: Path) -> Path:
    """A folder or a list of images."""
    folder = path.parent if base is None else path.parent / base
    places = [folder / name]
    if name.startswith("../"):  # as Roboflow writes what lies beside the yaml
        places.append(folder / name.removeprefix("../"))
    for place in places:
        if place.exists():
            return place
    raise DataError(f"{path} names the images {name}, but there is no {places[0]}")


def _labels_of(image: Path) -> Path:
    """The text file of an image: in "labels" in the place of the last folder "images", or beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _lines(file: Path, numbers: Sequence[int], masks: bool, found: Counter, keypoints: int = 0) -> list[Line]:
    """The boxes and polygons of a file; what is left out is counted in `found`."""
    if not file.is_file():
        found["without"] += 1
        return []
    text = _text_of(file, str(file))
    lines: dict[Line, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = line.split()
        if keypoints and len(words) == 5 + keypoints:  # otherwise they may look like the points of a polygon
            words = words[:5]
            found["keypoints"] += 1
        read = _line(words, f"{file}, line {number}", numbers, masks)
        xs, ys = read[1][::2], read[1][1::2]
        if max(xs) - min(xs) <= 0 or max(ys) - min(ys) <= 0:
            found["empty"] += 1
        elif read in lines:
            found["twice"] += 1
        else:
            lines[read] = None
    return list(lines)


def _text_of(file: Path, name: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as text in UTF-8 ({error})") from error


def _line(words: Sequence[str], name: str, numbers: Sequence[int], masks: bool) -> Line:
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise DataError(f"{name} holds {' '.join(words)!r}, which are not all numbers") from None
    label, places = values[0], values[1:]
    if label not in numbers:
        known = f"{numbers[0]} to {numbers[-1]}"
        raise DataError(f"{name} is of class {label:g}, and the classes are {known}")
    is_polygon = len(places) >= 6 and len(places) % 2 == 0
    if len(places) != 4 and not is_polygon:
        raise DataError(
            f"{name} has {len(places)} values after the class; a box has 4 (centre x, y, width, height), a polygon an "
            "even number from 6 on"
        )
    if masks and not is_polygon:
        raise DataError(f"{name} is a box, and masks need polygons; set --data.masks false to learn boxes")
    outside = [value for value in places if not -BEYOND <= value <= 1 + BEYOND]  # also what is no number
    if outside:
        raise DataError(f"{name} has the value {outside[0]:g}; places are shares of the image from 0 to 1")
    if not is_polygon:
        x, y, width, height = places
        places = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return numbers.index(label), tuple(min(max(value, 0.0), 1.0) for value in places)


def _objects(image: Path, lines: list[Line], masks: bool) -> Objects:
    """The objects of an image."""
    width, height = size_of_image(image)
    in_pixels = [[value * (height if place % 2 else width) for place, value in enumerate(line)] for _, line in lines]
    labels = [label for label, _ in lines]
    boxes = [[min(line[::2]), min(line[1::2]), max(line[::2]), max(line[1::2])] for line in in_pixels]
    if not masks:
        return objects_of(boxes, labels)
    pixels = np.zeros((len(lines), height, width), bool)
    for index, line in enumerate(in_pixels):
        pixels[index] = decoded([line], (height, width))
    seen = pixels.any((1, 2))  # a polygon may be narrower than a pixel
    pixels = pixels[seen]
    return objects_of(np.array(boxes).reshape(-1, 4)[seen], np.array(labels)[seen], None, pixels.sum((1, 2)), pixels)
