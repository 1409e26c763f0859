"""Annotations in COCO's format, with what files of people and of COCO itself have in them, by numbers made by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import visionpeft as vp
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import CocoDetection
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.tasks.average_precision import AveragePrecision

WIDTH, HEIGHT = 12, 8
SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]  # columns 2 to 5, rows 1 to 4
# Columns from the top: 4 of 8 x 3 pixels outside, 2 inside, 6 outside, 2 inside, the rest outside.
OUTSIDE = [20, 1, 25, 1, 25, 9]
RUNS = {"size": [8, 12], "counts": [28, 2, 6, 2, 58]}  # rows 4 and 5 of columns 3 and 4

CONTENT = {
    "images": [
        {"id": 40, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 7, "file_name": "b.png"},  # whose size is that of the file
        {"id": 1, "file_name": "empty.png", "width": WIDTH, "height": HEIGHT},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        # a number of 0, no iscrowd, no area
        {"id": 0, "image_id": 40, "category_id": 7, "bbox": [2, 1, 4, 4], "segmentation": SQUARE},
        # two polygons, one of them outside; no bbox
        {"id": 5, "image_id": 40, "category_id": 3, "segmentation": [[-4, -4, 2, -4, 2, 3, -4, 3], OUTSIDE]},
        # runs, and a crowd of runs
        {"id": 6, "image_id": 7, "category_id": 3, "bbox": [3, 4, 2, 2], "area": 9.5, "segmentation": RUNS},
        {"id": 8, "image_id": 7, "category_id": 7, "bbox": [0, 0, 12, 8], "iscrowd": 1, "area": 96,
         "segmentation": {"size": [8, 12], "counts": [0, 96]}},
        # nothing inside the image
        {"id": 9, "image_id": 7, "category_id": 7, "bbox": [3, 3, 0, 4], "segmentation": SQUARE},
        {"id": 10, "image_id": 7, "category_id": 7, "bbox": [12, 3, 5, 5], "segmentation": SQUARE},
        {"id": 11, "image_id": 7, "category_id": 7, "bbox": [1, 1, 2, 2], "segmentation": [OUTSIDE]},
    ],
}  # fmt: skip


def written(folder, content=CONTENT, **files):
    folder.mkdir(exist_ok=True)
    for entry in CONTENT["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / entry["file_name"])
    (folder / "train.json").write_text(json.dumps(content))
    for name, more in files.items():
        (folder / f"{name}.json").write_text(json.dumps(more))
    return folder


def read(folder, **options):
    return CocoDetection(folder, train="train.json", **{"val_fraction": 0, **options})


def test_objects_are_those_of_the_file(tmp_path):
    data = read(written(tmp_path), masks=True)
    assert data.class_names == ["dog", "cat"]  # in the order of their numbers
    assert data.description()["category_ids"] == [3, 7]
    assert data.images.notes == [
        "train: 3 annotations without extent or outside their image are left out",
        "train: 1 crowds, which are not learnt and count nowhere when measured",
    ]
    source = data.sources["train"]
    first, second, third = (source.objects(index) for index in range(3))
    assert first.boxes.tolist() == [[2, 1, 6, 5], [-4, -4, 2, 3]]
    assert first.labels.tolist() == [1, 0]
    assert first.areas.tolist() == [16, 6]  # of the pixels inside
    expected = np.zeros((2, HEIGHT, WIDTH), bool)
    expected[0, 1:5, 2:6] = expected[1, :3, :2] = True
    assert np.array_equal(first.masks, expected)
    assert second.areas.tolist() == [9.5, 96]
    assert second.crowd.tolist() == [False, True]
    assert np.argwhere(second.masks[0]).tolist() == [[4, 3], [4, 4], [5, 3], [5, 4]]
    assert second.masks[1].all()
    assert third.boxes.shape == (0, 4)
    assert third.masks.shape == (0, HEIGHT, WIDTH)
    assert not any(first.crowd)
    boxes = read(tmp_path).sources["train"].objects(0)
    assert boxes.masks is None
    assert boxes.areas.tolist() == [16, 42]  # of the box, where no masks are read


def perfect(data, masks=True):
    """Average precision of the truth itself, crowds left out."""
    measured = AveragePrecision(data.class_names, masks)
    for index in range(3):
        truth = data.sources["train"].objects(index)
        own = {"boxes": truth.boxes, "labels": truth.labels, "scores": np.ones(len(truth.labels))}
        own |= {"masks": truth.masks} if masks else {}
        found = {name: torch.from_numpy(values[~truth.crowd]) for name, values in own.items()}
        measured.add(truth, (HEIGHT, WIDTH), found)
    return measured.detail()


def test_what_is_right_is_found_right(tmp_path):
    """Also with a number of 0, which evaluations take for no match, and without iscrowd and area."""
    found = perfect(read(written(tmp_path), masks=True))
    assert {name: found[name] for name in ("ap", "ap50", "ap75", "mask_ap", "mask_ap50")} == dict.fromkeys(
        ("ap", "ap50", "ap75", "mask_ap", "mask_ap50"), pytest.approx(1)
    )
    assert found["ap_by_class"] == {"dog": pytest.approx(1), "cat": pytest.approx(1)}
    assert found["ap_large"] is None


def test_targets_are_what_is_left_of_objects(tmp_path):
    """No crowds; boxes inside the image, and those of masks where there are masks."""
    preprocessing = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    transform = ObjectTransform(preprocessing, 16)
    for masks in (False, True):
        source = read(written(tmp_path), masks=masks).sources["train"]
        pixels, target = transform.measured(source.image(0), source.objects(0))
        assert pixels.shape == (3, 16, 24)
        assert target["boxes"].tolist() == [[4, 2, 12, 10], [0, 0, 4, 6]]
        assert ("masks" in target) == masks
        _, target = transform.measured(source.image(1), source.objects(1))
        assert target["labels"].tolist() == ([0] if masks else [0, 1])  # without masks a box is enough
        _, target = transform.measured(source.image(2), source.objects(2))
        assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 16, 24)


def test_an_object_moves_with_its_pixels(tmp_path):
    """The box of what is red, through scaling, cutting beyond the border and mirroring."""
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "nearest", 1.0)
    transform = ObjectTransform(preprocessing, 32, (0.5, 2.0))
    pixels = np.full((24, 40, 3), 127, np.uint8)
    pixels[6:14, 10:26] = (255, 0, 0)
    mask = (pixels == (255, 0, 0)).all(-1)[None]
    objects = vp.data.detection.objects.objects_of([[10, 6, 26, 14]], [0], masks=mask)
    gone = mirrored = 0
    for with_masks in (True, False):
        for seed in range(30):
            image, target = transform.train(
                Image.fromarray(pixels), objects if with_masks else objects._replace(masks=None), seed
            )
            red = (image[0] > 200) & (image[1] < 60)
            if not len(target["boxes"]):
                gone += 1
                assert min(red.any(0).sum(), red.any(1).sum()) <= 1
                continue
            rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (target["boxes"][0] - torch.tensor(seen)).abs().max() <= 1
            mirrored += bool(columns.min() == 0)
            if with_masks:
                assert (target["masks"][0].bool() ^ red).sum() <= 2 * (len(rows) + len(columns))
    assert gone < 30
    assert mirrored


def changed(**changes):
    """The content with other lists, or other values in the first annotation."""
    content = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        if key in content:
            content[key] = value
        else:
            content["annotations"][0][key] = value
    return content


def used(folder):
    """Read all that a file says."""
    data = read(folder, masks=True)
    data.setup()
    for index in range(len(data.sources["train"])):
        data.sources["train"].objects(index)


@pytest.mark.parametrize("size", [(0, 0), (None, None), (12.0, 8.0), (-1, -1), (12, None)])
def test_a_size_that_the_file_does_not_say_is_that_of_the_image(tmp_path, size):
    """Programs write 0 for what they did not look at; every box would be outside."""
    entry = {"id": 40, "file_name": "a.png", "width": size[0], "height": size[1]}
    data = read(written(tmp_path, changed(images=[entry, *CONTENT["images"][1:]])))
    assert data.sources["train"].objects(0).boxes[0].tolist() == [2, 1, 6, 5]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "is no file of COCO's annotations, but a list"),
        ({"images": [], "categories": []}, "has no list of annotations"),
        (changed(image_id=99), "train.json: annotation 0 is of image 99, which the file does not list"),
        (changed(category_id=8), "annotation 0 is of category 8, and there are 3, 7"),
        (changed(bbox=[1, 2, 3]), "annotation 0 has the bbox"),
        (changed(bbox=[1, 2, float("nan"), 4]), "annotation 0 has the bbox"),
        (changed(bbox=None, segmentation=[]), "annotation 0 has no segmentation, which masks need"),
        (changed(segmentation=[[1, 2, 3]]), "annotation 0 has a polygon of 3 values"),
        (changed(segmentation={"size": [12, 8], "counts": [96]}), "annotation 0 .* cannot be decoded"),
        (changed(segmentation={"size": [8, 12], "counts": [95]}), "annotation 0 .* cannot be decoded"),
        (changed(image_id=[40]), r"annotation 0 is of image \[40\], which the file does not list"),
        (changed(category_id="3"), "annotation 0 is of category '3', and there are 3, 7"),
        (changed(category_id=[3]), r"annotation 0 is of category \[3\], and there are 3, 7"),
        (changed(iscrowd="0"), "annotation 0 has the iscrowd '0', which is neither 0 nor 1"),
        (changed(area="12"), "annotation 0 has the area '12', which is no number"),
        (changed(segmentation={"size": [8, 12], "counts": [90, -3, 9]}), "annotation 0 has .* runs of -3 pixels"),
        (changed(segmentation={"size": [8, 12], "counts": [90.0, 6.0]}), "annotation 0 has .* runs of 90.0 pixels"),
        (changed(segmentation={"size": [8, 12], "counts": [10**12, 6]}), "annotation 0 .* cannot be decoded"),
        (changed(categories=[{"id": 3, "name": "dog"}, {"id": 7, "name": "dog"}]), "category 7 'dog' comes twice"),
        (changed(images=[*CONTENT["images"], {"id": 41, "file_name": "a.png"}]), "images 40 and 41 are both a.png"),
        (changed(images=[*CONTENT["images"], {"id": 40, "file_name": "c.png"}]), "two images have the id 40"),
        (changed(images=[*CONTENT["images"], {"id": 2, "file_name": "../c.png"}]), "leaves the image folder"),
        (changed(images=[*CONTENT["images"], {"id": 2, "file_name": "c.png", "width": 1, "height": 1}]),
         "c.png does not exist"),
        (changed(images=[{**CONTENT["images"][0], "width": 8, "height": 12}, *CONTENT["images"][1:]]),
         "a.png has 12 x 8 pixels .*train.json says 8 x 12"),
        (changed(annotations=CONTENT["annotations"][3:4]), "all 1 objects of .*train.json are crowds .iscrowd 1."),
        (changed(annotations=[]), "none of the 3 images of the train split has an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tmp_path, content, told):
    with pytest.raises(vp.DataError, match=told):
        used(written(tmp_path, content))


@pytest.mark.parametrize("crowd", [None, False, 0.0])
def test_what_is_no_crowd(tmp_path, crowd):
    """And runs whose size a program has written as fractions."""
    content = changed(iscrowd=crowd, segmentation={"size": [8.0, 12.0], "counts": [80, 6, 10]})
    objects = read(written(tmp_path, content), masks=True).sources["train"].objects(0)
    assert not objects.crowd[0]
    assert objects.masks[0].sum() == 6


def test_splits(tmp_path):
    other = changed(
        images=[{**CONTENT["images"][0], "id": 3}], annotations=[{**CONTENT["annotations"][0], "image_id": 3}]
    )
    folder = written(tmp_path, other=other, more=changed(categories=[{"id": 1, "name": "cow"}]))
    with pytest.raises(vp.DataError, match=r"a\.png is in the train and in the test split"):
        read(folder, test="other.json")
    with pytest.raises(vp.DataError, match="the category 'cow', which the annotations to train on do not have"):
        read(folder, test="more.json")
    with pytest.raises(vp.DataError, match=r"neither annotations/instances_train2017\.json nor train/_annotations"):
        CocoDetection(folder)
    held = read(folder, val_fraction=0.4)
    assert {split: len(source) for split, source in held.sources.items()} == {"train": 2, "val": 1}
    with pytest.raises(vp.DataError, match=r"val_fraction -0\.1 must be from 0"):
        read(folder, val_fraction=-0.1)
    for split in ("train2017", "val2017", "annotations"):
        (folder / "coco" / split).mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(CONTENT))
        for entry in CONTENT["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "coco" / f"{split}2017" / entry["file_name"])
    coco = CocoDetection(folder / "coco", val_fraction=0)
    assert coco.sources["test"].paths[0] == folder / "coco" / "val2017" / "a.png"
    assert coco.description()["task"] == "coco2017"


def roboflow(root, first="animals", used=(1, 2)):
    """As Roboflow exports it: a category of the whole project first, of which every other one is a kind."""
    categories = [{"id": 0, "name": first, "supercategory": "none"}]
    categories += [{"id": n, "name": name, "supercategory": first} for n, name in enumerate(["cat", "dog"], 1)]
    for split in ("train", "valid", "test"):
        (root / split).mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT), (len(split), 0, 0)).save(root / split / f"{split}.jpg")
        images = [{"id": 0, "file_name": f"{split}.jpg", "width": WIDTH, "height": HEIGHT}]
        own = [{"id": n, "image_id": 0, "category_id": each, "bbox": [1, 1, 4, 4]} for n, each in enumerate(used)]
        content = {"images": images, "categories": categories, "annotations": own}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return CocoDetection(root)


@pytest.mark.parametrize("first", ["animals", "cat"])
def test_the_category_of_the_whole_project_is_no_class(first, tmp_path):
    """It was a class without objects, or, with the name of one, refused as coming twice."""
    data = roboflow(tmp_path, first)
    assert data.class_names == ["cat", "dog"]
    assert data.category_ids == [1, 2]
    assert any(f"the category {first!r}, of which all others are kinds" in note for note in data.images.notes)


def test_a_category_that_is_used_stays(tmp_path):
    assert roboflow(tmp_path, used=(0, 1, 2)).class_names == ["animals", "cat", "dog"]


def test_lvis_is_refused(tmp_path):
    content = copy.deepcopy(CONTENT)
    for entry in content["images"]:
        entry |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
    with pytest.raises(vp.DataError, match="in the form of LVIS"):
        read(written(tmp_path / "set", content))
