"""Labels of Ultralytics' YOLO by numbers made by hand, and what is refused."""

import numpy as np
import pytest
import yaml
from PIL import Image

import visionpeft as vp
from visionpeft.data import YoloFolder

SIZE = WIDTH, HEIGHT = 20, 10
BOX = "4 0.5 0.5 0.2 0.4\n"  # columns 8 to 11, rows 3 to 6
TRIANGLE = "2 0 0 0.5 0 0 1\n"


def written(folder, labels, **content):
    """Two images to train on, the first with these labels; another for selection."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for name in ("a.png", "b.png") if split == "train" else ("c.png",):
            Image.new("RGB", SIZE).save(folder / "images" / split / name)
    if labels is not None:
        (folder / "labels" / "train" / "a.txt").write_text(labels)
    (folder / "labels" / "val" / "c.txt").write_text(TRIANGLE)
    about = {"train": "images/train", "val": "images/val", "names": {2: "dog", 4: "cat"}, "nc": 2} | content
    (folder / "data.yaml").write_text(yaml.safe_dump(about))
    return folder


def test_boxes_and_polygons(tmp_path):
    """A line of 5 numbers is a box also beside polygons; Ultralytics would take it for a polygon of two points."""
    labels = BOX + TRIANGLE + BOX + "2 0.1 0.1 0 0.3\n\n" + "2 1.005 0.5 0.2 0.2\n"
    data = YoloFolder(written(tmp_path, labels))
    assert data.class_names == ["dog", "cat"]
    assert data.description()["category_ids"] == [2, 4]
    assert data.images.notes == [
        "train: 1 images have no file of labels, and so no objects",
        "train: 1 lines that come twice count once",
        "train: 1 boxes and polygons without extent are left out",
    ]
    assert data.sources["train"].numbers == [3, 0]
    first, second = (data.sources["train"].objects(index) for index in (0, 1))
    assert first.labels.tolist() == [1, 0, 0]
    assert np.allclose(first.boxes, [[8, 3, 12, 7], [0, 0, 10, 10], [18.1, 4, 20, 6]])
    assert np.allclose(first.areas, [16, 100, 3.8])
    assert second.boxes.shape == (0, 4)
    assert not data.with_masks


@pytest.mark.parametrize("number", [1, 3, "two"])
def test_another_number_of_classes_than_names_is_refused(tmp_path, number):
    with pytest.raises(vp.DataError, match=rf"says nc: {number}, but names 2 classes \(dog, cat\)"):
        YoloFolder(written(tmp_path, BOX, nc=number))


def test_boxes_in_a_photograph_that_lies_on_its_side(tmp_path):
    """Shares are of the image as it is shown; the size of a TIFF is said so by Pillow already."""
    folder = written(tmp_path, BOX)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "images" / "train" / "a.png").unlink()
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images" / "train" / "a.tif", exif=exif)
    source = YoloFolder(folder).sources["train"]
    assert source.image(0).size == SIZE
    assert np.allclose(source.objects(0).boxes, [[8, 3, 12, 7]])


def test_keypoints_are_no_polygon(tmp_path):
    """12 keypoints of x, y make 28 values, an even number: with the box they would be 14 points."""
    points = " ".join(["0.9", "0.1"] * 12)
    data = YoloFolder(
        written(tmp_path, f"4 0.5 0.5 0.2 0.4 {points}\n" + BOX.replace("4 ", "2 ", 1), kpt_shape=[12, 2])
    )
    assert np.allclose(data.sources["train"].objects(0).boxes, [[8, 3, 12, 7]] * 2)
    assert "train: 1 boxes have keypoints, which are not read" in data.images.notes
    with pytest.raises(vp.DataError, match="is a box, and masks need polygons"):
        YoloFolder(tmp_path, masks=True)
    with pytest.raises(vp.DataError, match=r"kpt_shape 12, which is not \[number of keypoints, 2 or 3\]"):
        YoloFolder(written(tmp_path / "other", BOX, kpt_shape=12))


def test_masks_are_those_of_polygons(tmp_path):
    data = YoloFolder(written(tmp_path, "4 0.2 0.3 0.5 0.3 0.5 0.8 0.2 0.8\n" + TRIANGLE), masks=True)
    objects = data.sources["train"].objects(0)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[3:8, 4:10] = True
    assert np.array_equal(objects.masks[0], expected)
    assert objects.areas.tolist() == [30, objects.masks[1].sum()]
    below = np.add.outer(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5) < 10  # of the line from (10, 0) to (0, 10)
    assert (objects.masks[1] ^ below).sum() <= 10  # pixels that the line goes through
    assert data.sources["train"].objects(1).masks.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("labels", "masks", "told"),
    [
        ("5 0.5 0.5 0.2 0.2", False, r"a\.txt, line 1 is of class 5, and the classes are 2 to 4"),
        (BOX + "3 0.5 0.5 0.2 0.2", False, r"a\.txt, line 2 is of class 3"),
        ("4 0.5 0.5 0.2 0.2 0.9", False, "has 5 values after the class"),
        ("4 120 40 30 30", False, "has the value 120; places are shares"),
        ("4 0.5 0.5 -0.2 0.2", False, "has the value -0.2"),
        ("4 0.5 0.5 nan 0.2", False, "has the value nan"),
        ("cat 0.5 0.5 0.2 0.2", False, "which are not all numbers"),
        (BOX, True, r"a\.txt, line 1 is a box, and masks need polygons"),
        (None, False, "none of the 2 images of the train split has an object in .*labels"),
    ],
)
def test_lines_that_are_none(tmp_path, labels, masks, told):
    with pytest.raises(vp.DataError, match=told):
        YoloFolder(written(tmp_path, labels), masks=masks)


def test_places(tmp_path):
    folder = written(tmp_path / "set", BOX, train="../images/train", val=None)  # as Roboflow writes it
    assert len(YoloFolder(folder / "data.yaml").sources["train"]) == 2
    (folder / "list.txt").write_text("images/train/a.png\n")
    about = {"path": "set", "train": "list.txt", "names": ["x", "y", "z", "u", "v"]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(about))
    data = YoloFolder(tmp_path)
    assert [path.name for path in data.sources["train"].paths] == ["a.png"]
    assert data.sources["train"].objects(0).labels.tolist() == [4]
    for change, told in (
        ({"train": "nowhere"}, "names the images nowhere"),
        ({"names": None}, "no names of classes"),
        ({"names": ["a"] * 5}, "class 'a' is named twice"),
        ({"train": None}, "names no train images"),
        ({"train": 5}, "names the images 5 in the path 'set'; these must be names of folders"),
        ({"train": [["set"]]}, "these must be names of folders or of text files"),
        ({"path": 5}, "in the path 5; these must be names of folders"),
        ({"train": "images/train/a.png"}, r"names the images .*a\.png, which cannot be read as text in UTF-8"),
        ({"val": "list.txt"}, r"a\.png is in the train and in the val split"),
        ({"train": ["list.txt", "list.txt"]}, r"names image .*a\.png twice"),
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(about | change))
        with pytest.raises(vp.DataError, match=told):
            YoloFolder(tmp_path)
    Image.new("RGB", SIZE).save(folder / "images" / "train" / "a.jpg")
    with pytest.raises(vp.DataError, match="would both have the labels"):
        YoloFolder(folder)
