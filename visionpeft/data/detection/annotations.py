"""One file of annotations as COCO has them, checked: which objects are where in which image."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from visionpeft.data.detection.objects import Objects, box_of, objects_of
from visionpeft.data.detection.outlines import decoded
from visionpeft.data.records import path_inside
from visionpeft.data.segmentation.masks import size_of_image
from visionpeft.errors import DataError, one_line


@dataclass
class Annotated:
    """The images of a file, and what reads the objects of each.

    Args:
        paths: the images, (n,).
        readers: of each image, called with whether masks are asked for.
        numbers: how many objects each image has, crowds not among them.
        by_class: how many objects each class has.
        left_out: how many annotations are of nothing inside their image.
        crowds: how many annotations are of crowds.
    """

    paths: list[Path] = field(default_factory=list)
    readers: list = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    by_class: list[int] = field(default_factory=list)
    left_out: int = 0
    crowds: int = 0


@dataclass(frozen=True)
class Annotation:
    """One annotation: box x0, y0, x1, y1, class index, whether a crowd, area or None, and outline or None."""

    name: str
    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float | None
    outline: list | dict | None


def read_file(path: Path) -> dict:
    """The content of a file of annotations.

    Raises:
        DataError: it is missing, is no JSON, or has no images, annotations or categories.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"there is no file of annotations {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no file of COCO's annotations, but a {type(content).__name__}, as results are")
    if isinstance(content.get("images"), list) and any("neg_category_ids" in each for each in content["images"][:1]):
        raise DataError(
            f"{path} is in the form of LVIS, in which an image says of some categories alone whether it has them "
            "(neg_category_ids); here every object of every category counts, so that both training and numbers would "
            "be wrong: LVIS is not read"
        )
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise DataError(f"{path} has no list of {key}, which COCO's annotations have")
    return content


def without_parent(contents: Sequence[dict]) -> str | None:
    """Take the category out of which all others are the kinds, as Roboflow writes it first, where no object is of it.

    It is no class: its supercategory is none, and it is the supercategory of each other. It may have the name of one.

    Args:
        contents: what `read_file` gave of each file of a data set; the category goes from the lists of all.

    Returns:
        Its name; None where there is no such category.
    """
    found = [_parent(content) for content in contents]
    if any(each is None for each in found) or len({each["name"] for each in found}) != 1:
        return None
    for content, parent in zip(contents, found, strict=True):
        content["categories"] = [each for each in content["categories"] if each is not parent]
    return found[0]["name"]


def _parent(content: dict) -> dict | None:
    """The category that is the supercategory of all others and that no annotation is of."""
    used = {str(each.get("category_id")) for each in content["annotations"]}
    for entry in content["categories"]:
        others = [each for each in content["categories"] if each is not entry]
        kinds = others and all(each.get("supercategory") == entry.get("name") for each in others)
        if kinds and entry.get("supercategory") == "none" and str(entry.get("id")) not in used:
            return entry
    return None


def categories_of(content: dict, path: Path) -> dict[int, str]:
    """Name of each category by its number, in the order of the numbers.

    Raises:
        DataError: one without a number or a name, or two with the same.
    """
    names: dict[int, str] = {}
    for entry in content["categories"]:
        number, name = entry.get("id"), entry.get("name")
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: category {entry!r} has no number as id or no name")
        if number in names or name in names.values():
            raise DataError(f"{path}: category {number} {name!r} comes twice")
        names[number] = name
    return dict(sorted(names.items()))


def annotated(content: dict, path: Path, images: Path, class_names: Sequence[str], masks: bool) -> Annotated:
    """The images and objects of a file.

    Numbers of annotations mean nothing here. Without "iscrowd" an annotation is of one object, without "area" it has
    that of its mask or box, without "bbox" the box of its outline. Boxes and outlines with nothing inside their image
    are left out and counted.

    Args:
        content: what `read_file` gave.
        path: of the file, for errors.
        images: folder of the images.
        class_names: names of the classes, of which a category is the one of its name.
        masks: whether every object has to have an outline.

    Raises:
        DataError: an image or a number that comes twice, an annotation of an image or a category that there is not,
            without a box or, with masks, without an outline, or with one that is none.
    """
    labels = {}
    for number, name in categories_of(content, path).items():
        if name not in class_names:
            raise DataError(f"{path} has the category {name!r}, which the annotations to train on do not have")
        labels[number] = class_names.index(name)
    found = Annotated(by_class=[0] * len(class_names))
    places, sizes, own = {}, [], []
    names: dict[str, int] = {}
    for entry in content["images"]:
        number, name = entry.get("id"), entry.get("file_name")
        if not isinstance(number, int) or not isinstance(name, str):
            raise DataError(f"{path}: image {entry!r} has no number as id or no file_name")
        if number in places:
            raise DataError(f"{path}: two images have the id {number}, one of them {name}")
        if names.setdefault(name, number) != number:
            raise DataError(
                f"{path}: images {names[name]} and {number} are both {name}; each image must be listed once"
            )
        places[number] = len(sizes)
        found.paths.append(path_inside(images, name, str(path)))
        sizes.append(_size(entry, found.paths[-1]))
        own.append([])
    for place, entry in enumerate(content["annotations"]):
        name = f"{path}: annotation {entry.get('id', f'at place {place}')}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if not _is_finite(image) or image not in places:
            raise DataError(f"{name} is of image {image!r}, which the file does not list")
        if not _is_finite(category) or category not in labels:
            raise DataError(f"{name} is of category {category!r}, and there are {_listed(list(labels))}")
        read = _annotation(entry, name, labels[category], sizes[places[image]], masks)
        if read is None:
            found.left_out += 1
            continue
        own[places[image]].append(read)
        found.crowds += read.crowd
        found.by_class[read.label] += not read.crowd
    found.numbers = [sum(not each.crowd for each in of_image) for of_image in own]
    found.readers = [
        partial(_objects, of_image, image, size, path)
        for of_image, image, size in zip(own, found.paths, sizes, strict=True)
    ]
    return found


def _size(entry: dict, image: Path) -> tuple[int, int]:
    """Width and height as the file says, or as the image has them if it does not, or says 0."""
    size = entry.get("width"), entry.get("height")
    return size if all(isinstance(side, int) and side > 0 for side in size) else size_of_image(image)


def _annotation(entry: dict, name: str, label: int, size: tuple[int, int], masks: bool) -> Annotation | None:
    """An annotation, None if nothing of it is inside its image."""
    outline, box, area = entry.get("segmentation") or None, entry.get("bbox"), entry.get("area")
    crowd = entry.get("iscrowd")
    if crowd not in (None, 0, 1):  # the text "0" would be one
        raise DataError(f"{name} has the iscrowd {crowd!r}, which is neither 0 nor 1")
    if not isinstance(area, int | float | None):
        raise DataError(f"{name} has the area {area!r}, which is no number")
    if masks and outline is None:
        raise DataError(f"{name} has no segmentation, which masks need; set --data.masks false to learn boxes")
    if outline is not None and (masks or not box):
        outline = _inside(outline, name, size)
        if not outline:
            return None
    if box:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise DataError(f"{name} has the bbox {box!r}, which is no [x, y, width, height] in pixels")
        x, y, width, height = box
        corners = float(x), float(y), float(x + width), float(y + height)
    elif outline is not None:
        corners = _around(outline, name, size)
    else:
        raise DataError(f"{name} has neither bbox nor segmentation")
    x0, y0, x1, y1 = corners
    if min(x1 - x0, y1 - y0) <= 0 or min(x1, y1) <= 0 or x0 >= size[0] or y0 >= size[1]:
        return None
    area = float(area) if _is_finite(area) and area >= 0 else None
    return Annotation(name, corners, label, bool(crowd), area, outline if masks else None)


def _inside(outline: list | dict, name: str, size: tuple[int, int]) -> list | dict:
    """Runs, or those polygons that reach into the image."""
    if isinstance(outline, dict):
        counts = outline.get("counts")
        if not isinstance(counts, list | str):
            raise DataError(f"{name} has a segmentation of runs without counts")
        numbers = () if isinstance(counts, str) else counts  # compressed
        if wrong := [each for each in numbers if not isinstance(each, int) or each < 0]:
            raise DataError(f"{name} has a segmentation of runs of {wrong[0]!r} pixels; counts must be whole numbers")
        return outline
    if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
        raise DataError(f"{name} has a segmentation that is neither polygons [[x, y, x, y, ...]] nor runs")
    for polygon in outline:
        if len(polygon) % 2 or not all(map(_is_finite, polygon)):
            raise DataError(f"{name} has a polygon of {len(polygon)} values, which are no pairs x, y in pixels")
    return [
        polygon
        for polygon in outline
        if len(polygon) >= 6  # a surface
        and all(max(polygon[axis::2]) > 0 and min(polygon[axis::2]) < length for axis, length in enumerate(size))
    ]


def _around(outline: list | dict, name: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    if isinstance(outline, dict):
        return box_of(_decoded(outline, name, size)) or (0.0, 0.0, 0.0, 0.0)
    xs, ys = ([value for polygon in outline for value in polygon[axis::2]] for axis in (0, 1))
    return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))


def _decoded(outline: list | dict, name: str, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    try:
        return decoded(outline, (height, width))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # RuntimeError: what C++ cannot take
        raise DataError(f"{name} has a segmentation that cannot be decoded ({one_line(error)})") from error


def _objects(own: list[Annotation], image: Path, size: tuple[int, int], path: Path, masks: bool) -> Objects:
    """The objects of an image."""
    if (real := size_of_image(image)) != size:
        raise DataError(
            f"image {image} has {real[0]} x {real[1]} pixels (width x height, upright), but {path} says {size[0]} x "
            f"{size[1]}; its boxes would be elsewhere"
        )
    pixels = None
    if masks:
        width, height = size
        pixels = np.zeros((len(own), height, width), bool)
        for index, each in enumerate(own):
            pixels[index] = _decoded(each.outline, each.name, size)
        seen = pixels.any((1, 2))  # a polygon may be narrower than a pixel
        pixels, own = pixels[seen], [each for each, some in zip(own, seen, strict=True) if some]
    areas = [
        each.area if each.area is not None else _area(each.box) if pixels is None else pixels[index].sum()
        for index, each in enumerate(own)
    ]
    return objects_of(
        [each.box for each in own], [each.label for each in own], [each.crowd for each in own], areas, pixels
    )


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return f"{shown}, ..." if len(numbers) > 10 else shown
