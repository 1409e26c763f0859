"""FGVC: published sizes, and label ids numbered over all splits."""

import json

import pytest
from data_layouts import write_fgvc

from visionpeft.data import FGVC
from visionpeft.data.fgvc import fgvc_datasets
from visionpeft.errors import ConfigurationError, DataError

# The val split lacks class 7; numbering each file by itself would call class 30 "1" there and "2" in train.
SPLITS = {
    "train": {"a/0.jpg": 5, "a/1.jpg": 7, "b/2.jpg": 30, "b/3.jpg": 5},
    "val": {"a/4.jpg": 30, "a/5.jpg": 5},
    "test": {"a/6.jpg": 7, "a/7.jpg": 30, "b/8.jpg": 5},
}


def test_published_sizes():
    table = {
        name: tuple(entry[key] for key in ("classes", "train", "val", "test", "images"))
        for name, entry in fgvc_datasets().items()
    }
    assert table == {
        "cub": (200, 5_394, 600, 5_794, "images"),
        "nabirds": (555, 21_536, 2_393, 24_633, "images"),
        "oxford_flowers": (102, 1_020, 1_020, 6_149, "."),
        "stanford_dogs": (120, 10_800, 1_200, 8_580, "Images"),
        "stanford_cars": (196, 7_329, 815, 8_041, "."),
    }


@pytest.mark.parametrize("name", list(fgvc_datasets()))
def test_labels_are_numbered_over_all_splits(tmp_path, name):
    write_fgvc(tmp_path, fgvc_datasets()[name]["images"], SPLITS)
    data = FGVC(name, tmp_path)
    data.setup()
    assert data.class_names == ["5", "7", "30"]
    assert {split: source.labels for split, source in data.sources.items()} == {
        "train": [0, 1, 2, 0],
        "val": [2, 0],
        "test": [1, 2, 0],
    }
    assert data.sources["test"].image(0).size == (20, 16)


def test_text_ids_and_folder_of_the_vpt_configs(tmp_path):
    write_fgvc(
        tmp_path / "CUB",
        "images",
        {split: {path: f"bird {label}" for path, label in rows.items()} for split, rows in SPLITS.items()},
    )
    assert FGVC("CUB", tmp_path).class_names == ["bird 30", "bird 5", "bird 7"]


def test_training_on_both_selects_on_nothing(tmp_path):
    write_fgvc(tmp_path, "images", SPLITS)
    data = FGVC("cub", tmp_path, train_on="train+val")
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 6, "test": 3}
    assert data.val_dataloader() == []
    record = data.description()
    assert (record["trained_on"], record["selected_on"]) == ("train+val", None)
    assert (record["resize"], record["augmentation"]) == ("crop", "crop_flip")


def test_other_sizes_are_noted_and_no_error(tmp_path):
    write_fgvc(tmp_path, "images", SPLITS)
    assert FGVC("cub", tmp_path).description()["notes"] == [
        "classes: 3 found, 200 published",
        "train: 4 found, 5,394 published",
        "val: 2 found, 600 published",
        "test: 3 found, 5,794 published",
    ]


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("test", {"a/6.jpg": 7, "a/7.jpg": 31}, "class '31' is in the test split and has no image in the train split"),
        ("val", {"a/6.jpg": 7}, r"test\.json: image 'a/6\.jpg' is also in the val split"),
        ("val", {"a/9.jpg": "7"}, "mix integers and strings"),
        ("val", {"a/9.jpg": 7.5}, r"val\.json: image 'a/9\.jpg' needs an integer or string class id, found 7\.5"),
        ("val", {"../9.jpg": 7}, r"val\.json: the path '\.\./9\.jpg' leaves the image folder"),
        ("val", ["a/9.jpg"], r"val\.json must be a JSON object"),
        ("val", {}, r"val\.json must be a JSON object .* not empty"),
    ],
)
def test_bad_split_files(tmp_path, split, content, message):
    write_fgvc(tmp_path, "images", SPLITS)
    (tmp_path / f"{split}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        FGVC("cub", tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match=r"'cub' needs .*train\.json .*vision\.caltech\.edu.*KMnP/vpt"):
        FGVC("cub", tmp_path)
    write_fgvc(tmp_path, "images", SPLITS)
    (tmp_path / "val.json").write_text('{"a/4.jpg": 30,')
    with pytest.raises(DataError, match=r"val\.json is not valid JSON"):
        FGVC("cub", tmp_path)
    (tmp_path / "val.json").unlink()
    with pytest.raises(DataError, match=r"cannot read the list .*val\.json: No such file"):
        FGVC("cub", tmp_path)


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigurationError, match="unknown FGVC data set 'stanford_dog': did you mean stanford_dogs"):
        FGVC("stanford_dog", tmp_path)
    with pytest.raises(ConfigurationError, match=r"unknown train_on 'val': choose train or train\+val"):
        FGVC("cub", tmp_path, train_on="val")
