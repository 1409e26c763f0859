"""Few-shot data: the published draws, base and new classes, every layout, stored draws, wrong input."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from data_layouts import SMALL, write_class_folders, write_image

from visionpeft.data import FewShot
from visionpeft.data.few_shot.definitions import few_shot_class_names, few_shot_datasets
from visionpeft.data.few_shot.draw import class_subset, draw_indices, restrict
from visionpeft.data.few_shot.place import Place
from visionpeft.data.few_shot.splits import read_splits
from visionpeft.data.records import Row
from visionpeft.errors import ConfigurationError, DataError, StorageError

EUROSAT_TRAIN = [1500, 1500, 1500, 1250, 1250, 1000, 1250, 1500, 1250, 1500]
EUROSAT_VAL = [600, 600, 600, 500, 500, 400, 500, 600, 500, 600]


def grouped(sizes):
    return [label for label, size in enumerate(sizes) for _ in range(size)]


def split_zhou(counts, *, order=None, path="{name}/{split}_{number}.jpg"):
    """Content of a split file: `counts` is {class name: (train, val, test)}; labels go by position."""
    names = list(counts)
    content = {}
    for column, split in enumerate(("train", "val", "test")):
        content[split] = [
            [path.format(name=name, split=split, number=number), names.index(name), name]
            for name in order or names
            for number in range(counts[name][column])
        ]
    return content


def write_split(folder, images, content, file):
    for split in ("train", "val", "test"):
        for path, label, _ in content[split]:
            write_image(folder / images / path, label)
    (folder / file).write_text(json.dumps(content))
    return folder


def eurosat(root, folder="eurosat", counts=(6, 5, 3)):
    names = few_shot_class_names("eurosat")
    return write_split(root / folder, "2750", split_zhou(dict.fromkeys(names, counts)), "split_zhou_EuroSAT.json")


def paths(data, split):
    return [path.name for path in data.sources[split].paths]


@pytest.mark.parametrize(
    ("seed", "train", "val"),
    [
        (
            1,
            [275, 2665, 3129, 5022, 5991, 7507, 8920, 10217, 11527, 12429],
            [96, 1099, 1229, 2257, 2727, 2999, 3421, 3702, 4656, 5256],
        ),
        (
            2,
            [115, 1687, 3173, 5239, 6096, 7753, 8631, 9765, 11990, 12434],
            [36, 1195, 1362, 2020, 2626, 3001, 3611, 4221, 4786, 5180],
        ),
        (
            3,
            [487, 2713, 4114, 4767, 6507, 7937, 9236, 10220, 11939, 12134],
            [13, 1080, 1465, 2082, 2419, 2898, 3567, 4181, 4576, 5362],
        ),
    ],
)
def test_published_draws_of_eurosat(seed, train, val):
    splits = {"train": grouped(EUROSAT_TRAIN), "val": grouped(EUROSAT_VAL)}
    assert draw_indices(splits, 1, seed) == {"train": train, "val": val}


def test_published_draw_with_two_shots():
    drawn = draw_indices({"train": grouped(EUROSAT_TRAIN), "val": grouped(EUROSAT_VAL)}, 2, 1)["train"]
    expected = [275, 1165, 1629, 2022, 3241, 4014, 5420, 5467, 6527, 6179]
    expected += [7096, 7499, 8058, 8798, 10136, 10494, 10754, 11662, 12545, 13477]
    assert drawn == expected


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ([60] * 47, [24] * 47, ([8, 96, 174, 231, 288, 304], [13, 47, 48, 88, 103, 134])),  # DTD
        ([80] * 37, [20] * 37, ([17, 152, 168, 272, 335, 463], [7, 31, 47, 67, 94, 109])),  # Pets, nearly
        ([500] * 101, [200] * 101, ([68, 791, 1433, 1910, 2391, 2532], [150, 327, 529, 700, 950, 1008])),  # Food101
        ([40] * 397, [10] * 397, ([8, 76, 84, 136, 167, 231], [3, 15, 21, 38, 49, 59])),  # SUN397
        (
            [34, 33, 33] * 33 + [34],
            [33, 34, 33] * 33 + [33],
            ([8, 38, 83, 107, 165, 195], [31, 55, 93, 122, 133, 188]),
        ),  # Aircraft
    ],
)
def test_published_draws_of_other_sets(train, val, expected):
    drawn = draw_indices({"train": grouped(train), "val": grouped(val)}, 1, 1)
    assert (drawn["train"][:6], drawn["val"][:6]) == expected


def test_draw_of_clip_lora():
    """Its authors' loop: the images for selection first, and with replacement where a class has too few."""
    sizes = {"train": [5, 2, 9], "val": [6, 3, 1]}
    splits = {split: grouped(counts) for split, counts in sizes.items()}
    random.seed(11)
    expected = {}
    for split, count in (("val", 4), ("train", 4)):
        expected[split] = []
        for label, size in enumerate(sizes[split]):
            first = sum(sizes[split][:label])
            members = list(range(first, first + size))
            expected[split] += random.sample(members, count) if size >= count else random.choices(members, k=count)
    found = draw_indices(splits, 4, 11, "clip_lora")
    assert found == expected
    assert [len(found[split]) for split in ("train", "val")] == [12, 12]
    assert len(set(found["train"])) < 12  # some of the class of two are there twice
    other = draw_indices(splits, 4, 11)
    assert [len(other[split]) for split in ("train", "val")] == [4 + 2 + 4, 4 + 3 + 1]
    assert other["train"][:4] != found["train"][:4]


def test_draw_of_clip_lora_in_a_run(tmp_path):
    eurosat(tmp_path, counts=(3, 5, 3))
    store = tmp_path / "draw.json"
    data = FewShot("eurosat", tmp_path, shots=4, draw_rule="clip_lora", store=store)
    drawn = Counter(zip(data.sources["train"].paths, data.sources["train"].labels, strict=True))
    assert Counter(label for _, label in drawn.elements()) == dict.fromkeys(range(10), 4)
    assert max(drawn.values()) > 1
    assert data.description()["draw_rule"] == json.loads(store.read_text())["rule"] == "clip_lora"
    again = FewShot("eurosat", tmp_path, shots=4, draw_rule="clip_lora", store=store)
    assert paths(again, "train") == paths(data, "train")
    with pytest.raises(DataError, match="with rule 'clip_lora', but 'coop' is asked for"):
        FewShot("eurosat", tmp_path, shots=4, store=store)
    with pytest.raises(ConfigurationError, match="unknown draw_rule 'tip': choose coop or clip_lora"):
        FewShot("eurosat", tmp_path, draw_rule="tip")
    # What an older version stored has no rule, and is CoOp's.
    coop = FewShot("eurosat", tmp_path, shots=2)
    content = {key: value for key, value in vars(coop.draw).items() if key != "rule"}
    store.write_text(json.dumps(content))
    assert paths(FewShot("eurosat", tmp_path, shots=2, store=store), "train") == paths(coop, "train")


def test_drawing_leaves_the_global_generator_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    draw_indices({"train": grouped([30, 30])}, 4, 1)
    assert random.random() == expected


def test_classes_are_drawn_in_the_order_of_their_first_image():
    # Sorting the labels would give class 0 the first numbers of the stream.
    labels = [1] * 10 + [0] * 10
    drawn = draw_indices({"train": labels}, 3, 1)["train"]
    generator = random.Random(1)
    assert drawn == generator.sample(range(10), 3) + generator.sample(range(10, 20), 3)


def test_small_classes_give_all_they_have():
    drawn = draw_indices({"train": grouped([2, 20]), "val": grouped([1, 9])}, 8, 1)
    assert drawn["train"][:2] == [0, 1]
    assert len(drawn["train"]) == 10
    assert len(drawn["val"]) == 1 + 4


@pytest.mark.parametrize(
    ("classes", "base", "new"), [(37, 19, 18), (47, 24, 23), (101, 51, 50), (397, 199, 198), (10, 5, 5)]
)
def test_base_and_new(classes, base, new):
    assert list(class_subset(classes, "base")) == list(range(base))
    assert list(class_subset(classes, "new")) == list(range(base, base + new))
    assert len(class_subset(classes, "all")) == classes


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [(100, (1600, 400)), (102, (1632, 408)), (196, (3136, 784)), (101, (1616, 404)), (397, (6352, 1588))],
)
def test_sizes_of_16_shots(classes, sizes):
    drawn = draw_indices({"train": grouped([20] * classes), "val": grouped([5] * classes)}, 16, 1)
    assert (len(drawn["train"]), len(drawn["val"])) == sizes


def test_split_zhou(tmp_path):
    eurosat(tmp_path)
    data = FewShot("EuroSAT", tmp_path, shots=2, seed=3)
    data.setup()
    record = data.description()
    assert record["sizes"] == {"train": 20, "val": 20, "test": 30}
    assert data.class_names == few_shot_class_names("eurosat")
    assert Counter(data.sources["train"].labels) == dict.fromkeys(range(10), 2)
    assert (record["dataset"], record["task"]) == ("FewShot", "eurosat")
    assert (record["shots"], record["draw_seed"], record["class_subset"]) == (2, 3, "all")
    assert (record["trained_on"], record["selected_on"]) == ("train", "val")
    assert record["split"] == "published split_zhou"
    assert record["template"] == data.template == "a centered satellite photo of {}."
    assert (record["resize"], record["augmentation"]) == ("crop", "random_resized_crop")
    assert record["notes"] == [
        "train: 60 found, 13,500 published",
        "val: 50 found, 5,400 published",
        "test: 30 found, 8,100 published",
    ]
    assert json.loads(json.dumps(record)) == record


def test_order_of_labels_is_that_of_the_file(tmp_path):
    """Flowers starts with label 76: the draw goes by first appearance, the names by label."""
    counts = {"zebra": (5, 2, 1), "a_cat": (5, 2, 1), "mouse": (5, 2, 1)}
    content = split_zhou(counts, order=["mouse", "zebra", "a_cat"])
    write_split(tmp_path / "dtd", "images", content, "split_zhou_DescribableTextures.json")
    data = FewShot("dtd", tmp_path, shots=2, seed=1)
    assert data.class_names == ["zebra", "a cat", "mouse"]
    generator = random.Random(1)
    expected = [
        path
        for name in ("mouse", "zebra", "a_cat")
        for path in generator.sample([f"{name}/train_{i}.jpg" for i in range(5)], 2)
    ]
    assert data.draw.train == expected
    assert data.sources["train"].labels == [2, 2, 0, 0, 1, 1]


@pytest.mark.parametrize("classes", ["base", "new"])
def test_classes_are_left_out_after_drawing(tmp_path, classes):
    eurosat(tmp_path)
    whole = FewShot("eurosat", tmp_path, shots=2)
    half = FewShot("eurosat", tmp_path, shots=2, classes=classes)
    kept = range(5) if classes == "base" else range(5, 10)
    assert half.class_names == whole.class_names[kept.start : kept.stop]
    for split in ("train", "val", "test"):
        expected = [
            (path, label - kept.start)
            for path, label in zip(whole.sources[split].paths, whole.sources[split].labels, strict=True)
            if label in kept
        ]
        assert list(zip(half.sources[split].paths, half.sources[split].labels, strict=True)) == expected
    assert half.draw == whole.draw
    assert half.description()["sizes"] == {"train": 10, "val": 10, "test": 15}
    assert half.description()["class_subset"] == classes


@pytest.mark.parametrize(
    ("sizes", "base", "new"),
    [([36] * 47, 864, 828), ([900, 900, 900, 750, 750, 600, 750, 900, 750, 900], 4200, 3900)],
    ids=["dtd", "eurosat"],
)
def test_published_test_sizes_of_the_halves(sizes, base, new):
    rows = [Row("", label, "") for label in grouped(sizes)]
    assert len(restrict(rows, class_subset(len(sizes), "base"))) == base
    assert len(restrict(rows, class_subset(len(sizes), "new"))) == new


def test_all_images_and_none(tmp_path):
    eurosat(tmp_path)
    everything = FewShot("eurosat", tmp_path, shots=None)
    assert everything.description()["sizes"] == {"train": 60, "val": 50, "test": 30}
    assert everything.draw is None
    assert everything.description()["shots"] is None
    nothing = FewShot("eurosat", tmp_path, shots=0, classes="new")
    assert nothing.description()["sizes"] == {"test": 15}
    assert (nothing.description()["trained_on"], nothing.description()["selected_on"]) == (None, None)
    assert nothing.description()["split_sha256"] == everything.description()["split_sha256"]
    with pytest.raises(DataError, match="FewShot has no train split here; it has test"):
        nothing.dataset("train")


def test_no_incomplete_batch_where_there_is_a_whole_one(tmp_path):
    eurosat(tmp_path)
    for shots, batches in ((1, [10]), (4, [32])):
        data = FewShot("eurosat", tmp_path, shots=shots)
        data.preprocessing = SMALL
        assert [len(labels) for _, labels in data.train_dataloader()] == batches
    data = FewShot("eurosat", tmp_path, shots=4, drop_last=False)
    data.preprocessing = SMALL
    assert [len(labels) for _, labels in data.train_dataloader()] == [32, 8]


@pytest.mark.parametrize(
    ("name", "folder", "images", "file"),
    [
        ("caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
        ("oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json"),
        ("oxford_pets", "OxfordPets", "images", "split_zhou_OxfordPets.json"),
        ("stanford_cars", "stanford_cars", ".", "split_zhou_StanfordCars.json"),
        ("oxford_flowers", "Flower102", "jpg", "split_zhou_OxfordFlowers.json"),
        ("food101", "food-101", "images", "split_zhou_Food101.json"),
        ("sun397", "sun397", "SUN397", "split_zhou_SUN397.json"),
        ("dtd", "DTD", "images", "split_zhou_DescribableTextures.json"),
        ("ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    ],
)
def test_folders(tmp_path, name, folder, images, file):
    content = split_zhou({"a_b": (2, 1, 1), "c": (2, 1, 1)})
    write_split(tmp_path / folder, images, content, file)
    for root in (tmp_path, tmp_path / folder):  # the folder of all data sets, or of this one
        data = FewShot(name, root, shots=1)
        data.setup()
        assert data.class_names == ["a b", "c"]


def test_other_places(tmp_path):
    folder = eurosat(tmp_path, "satellites")
    data = FewShot("eurosat", tmp_path, folder="satellites", shots=1)
    (folder / "2750").rename(folder / "rgb")
    with pytest.raises(DataError, match=r"image folder .*2750 of EuroSAT does not exist; the images come from"):
        FewShot("eurosat", tmp_path, folder="satellites")
    moved = FewShot("eurosat", tmp_path, folder="satellites", image_folder="rgb", shots=1)
    moved.setup()
    assert moved.draw == data.draw
    (tmp_path / "code").mkdir()
    (folder / "split_zhou_EuroSAT.json").rename(tmp_path / "code/split.json")
    elsewhere = FewShot(
        "eurosat",
        tmp_path,
        folder="satellites",
        image_folder="rgb",
        split_file=tmp_path / "code/split.json",
        shots=1,
    )
    assert elsewhere.draw == data.draw
    with pytest.raises(DataError, match=r"split file nope\.json does not exist, neither here nor in .*satellites"):
        FewShot("eurosat", tmp_path, folder="satellites", image_folder="rgb", split_file="nope.json")


def test_missing_split_file(tmp_path):
    write_class_folders(tmp_path / "eurosat/2750", {"River": 1, "Forest": 1})
    with pytest.raises(DataError) as caught:
        FewShot("eurosat", tmp_path)
    message = str(caught.value)
    assert f"split file {tmp_path}/eurosat/split_zhou_EuroSAT.json of EuroSAT does not exist" in message
    assert "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md" in message
    assert f"python -m visionpeft.prepare few_shot --dataset eurosat --root {tmp_path}" in message
    assert "\n" not in message
    with pytest.raises(DataError, match=r"split_visionpeft_EuroSAT\.json, does not exist; build it with python -m"):
        FewShot("eurosat", tmp_path, split="own")
    with pytest.raises(DataError, match="has an official split"):
        FewShot("fgvc_aircraft", tmp_path, split="own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("val"), "must be a JSON object with the lists train, val and test"),
        (lambda c: c["train"].append(["x.jpg", 1]), r"train entry 60: expected \[path, label, class name\]"),
        (lambda c: c["train"].append(["x.jpg", True, "y"]), r"expected \[path, label, class name\]"),
        (lambda c: c["test"].append(["x.jpg", -1, "y"]), r"expected \[path, label, class name\]"),
        (
            lambda c: c["test"].append(["x.jpg", 3, "Motorway"]),
            "class 3 is called 'Motorway' here and 'Highway or Road'",
        ),
        (lambda c: c["test"].append(["x.jpg", 12, "Ocean"]), "must number its classes from 0 without gaps; class 10"),
        (
            lambda c: c["test"].append(c["train"][0]),
            r"test entry 30: image '.*/train_0\.jpg' is also in the train split",
        ),
        (lambda c: c["val"].append(c["test"][0]), r"is also in the val split"),
        (lambda c: c["test"].append(["../x.jpg", 3, "Highway or Road"]), r"the path '\.\./x\.jpg' leaves the image"),
    ],
)
def test_bad_split_files(tmp_path, change, message):
    folder = eurosat(tmp_path)
    content = json.loads((folder / "split_zhou_EuroSAT.json").read_text())
    change(content)
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        FewShot("eurosat", tmp_path)


def test_missing_image(tmp_path):
    folder = eurosat(tmp_path)
    (folder / "2750/River/test_1.jpg").unlink()
    with pytest.raises(DataError, match=r"image file .*River/test_1\.jpg does not exist"):
        FewShot("eurosat", tmp_path).setup()


def test_other_names_are_noted_and_own_names_taken(tmp_path):
    names = few_shot_class_names("eurosat")
    content = split_zhou(dict.fromkeys([*names[:8], "Stream", names[9]], (1, 1, 1)))
    write_split(tmp_path / "eurosat", "2750", content, "split_zhou_EuroSAT.json")
    data = FewShot("eurosat", tmp_path, shots=1)
    assert data.class_names[8] == "Stream"
    assert data.description()["notes"][-1] == "class names that differ from those shipped: 'Stream' for 'River'"
    data = FewShot("eurosat", tmp_path, shots=1, classes="new", class_names=list("abcdefghij"), template="{}!")
    assert data.class_names == list("fghij")
    assert data.template == "{}!"
    with pytest.raises(DataError, match="class_names lists 1 names, but the data set has 10 classes"):
        FewShot("eurosat", tmp_path, class_names=["a"])


def test_stored_draw(tmp_path):
    folder = eurosat(tmp_path)
    file = tmp_path / "draw.json"
    first = FewShot("eurosat", tmp_path, shots=2, store=file)
    content = json.loads(file.read_text())
    assert set(content) == {"dataset", "shots", "seed", "split_sha256", "train", "val", "rule"}
    assert (content["shots"], content["seed"]) == (2, 1)
    assert all(not path.startswith("/") and (folder / "2750" / path).is_file() for path in content["train"])
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or path.name.startswith(".")] == []
    # what is stored is what is used
    content["train"] = content["train"][::-1]
    file.write_text(json.dumps(content))
    again = FewShot("eurosat", tmp_path, shots=2, store=file)
    assert again.sources["train"].paths == first.sources["train"].paths[::-1]
    assert again.description()["draw_sha256"] != first.description()["draw_sha256"]


def test_draws_are_found_again_elsewhere(tmp_path):
    eurosat(tmp_path / "here")
    FewShot("eurosat", tmp_path / "here", shots=2, store=tmp_path / "draw.json")
    shutil.move(tmp_path / "here", tmp_path / "there")
    data = FewShot("eurosat", tmp_path / "there", shots=2, store=tmp_path / "draw.json")
    data.setup()


def test_stored_draw_of_something_else(tmp_path):
    folder = eurosat(tmp_path)
    file = tmp_path / "draw.json"
    FewShot("eurosat", tmp_path, shots=2, store=file)
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"draw\.json is a draw with shots 2, but 4 is asked for"):
        FewShot("eurosat", tmp_path, shots=4, store=file)
    with pytest.raises(DataError, match="is a draw with seed 1, but 2 is asked for"):
        FewShot("eurosat", tmp_path, shots=2, seed=2, store=file)
    content = json.loads((folder / "split_zhou_EuroSAT.json").read_text())
    content["train"].reverse()
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is a draw with split_sha256 '.*', but '.*' is asked for"):
        FewShot("eurosat", tmp_path, shots=2, store=file)
    assert file.read_bytes() == before
    file.write_text("[1]")
    with pytest.raises(DataError, match="is not a stored draw"):
        FewShot("eurosat", tmp_path, shots=2, store=file)


def test_stored_draw_with_strange_images(tmp_path):
    eurosat(tmp_path)
    file = tmp_path / "draw.json"
    FewShot("eurosat", tmp_path, shots=2, store=file)
    content = json.loads(file.read_text())
    content["train"][0] = "River/test_1.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"image 'River/test_1\.jpg' is not in the train split"):
        FewShot("eurosat", tmp_path, shots=2, store=file)


def test_nothing_is_stored_when_refused(tmp_path):
    eurosat(tmp_path)
    with pytest.raises(ConfigurationError, match="batch_size 0"):
        FewShot("eurosat", tmp_path, shots=2, batch_size=0, store=tmp_path / "draw.json")
    assert not (tmp_path / "draw.json").exists()
    with pytest.raises(StorageError, match=r"nowhere/draw\.json could not be written \(No such file"):
        FewShot("eurosat", tmp_path, shots=2, store=tmp_path / "nowhere/draw.json")
    with pytest.raises(ConfigurationError, match="store keeps a draw, but nothing is drawn"):
        FewShot("eurosat", tmp_path, shots=None, store=tmp_path / "draw.json")


def aircraft(root):
    folder = root / "fgvc_aircraft"
    variants = ["707-320", "BAE 146-200", "F-16A/B"]
    write_image(folder / "images/0000000.jpg")
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    number = 0
    for split, count in {"train": 3, "val": 2, "test": 1}.items():
        lines = []
        for variant in reversed(variants):
            for _ in range(count):
                number += 1
                write_image(folder / f"images/{number:07d}.jpg", number)
                lines.append(f"{number:07d} {variant}")
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_aircraft(tmp_path):
    folder = aircraft(tmp_path)
    data = FewShot("FGVCAircraft", tmp_path, shots=2)
    data.setup()
    assert data.class_names == ["707-320", "BAE 146-200", "F-16A/B"]
    assert data.sources["train"].labels == [2, 2, 1, 1, 0, 0]
    assert data.sources["test"].labels == [2, 1, 0]
    assert data.description()["split"] == "official"
    assert data.template == "a photo of a {}, a type of aircraft."
    (folder / "images_variant_val.txt").write_text("0000010 Concorde\n")
    with pytest.raises(
        DataError, match=r"images_variant_val\.txt line 1: variant 'Concorde' is not in .*variants\.txt"
    ):
        FewShot("fgvc_aircraft", tmp_path)
    (folder / "variants.txt").unlink()
    with pytest.raises(DataError, match=r"FGVCAircraft is not under .*: expected .*fgvc_aircraft with variants\.txt"):
        FewShot("fgvc_aircraft", tmp_path)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_image(tmp_path_factory.mktemp("one") / "image.JPEG")


def link(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(picture, path)


def imagenet(root, picture, train=2):
    names = few_shot_class_names("imagenet")
    for identifier in names:
        for number in range(train):
            link(picture, root / f"imagenet/images/train/{identifier}/{identifier}_{number}.JPEG")
        link(picture, root / f"imagenet/images/val/{identifier}/ILSVRC2012_val_{identifier}.JPEG")
    return names


def test_imagenet(tmp_path, picture):
    names = imagenet(tmp_path, picture)
    data = FewShot("ImageNet", tmp_path, shots=1)
    assert data.class_names == list(names.values())
    assert data.description()["sizes"] == {"train": 1000, "test": 1000}
    assert data.sources["train"].labels == list(range(1000))
    identifiers = list(names)
    assert [path.parent.name for path in data.sources["test"].paths] == identifiers
    assert [path.parent.name for path in data.sources["train"].paths] == identifiers
    assert data.description()["selected_on"] is None
    assert "the images of a class are in the order of their names" in data.description()["notes"][0]
    base, new = (FewShot("imagenet", tmp_path, shots=1, classes=part) for part in ("base", "new"))
    assert base.class_names + new.class_names == data.class_names
    assert len(base.class_names) == 500
    # for zero-shot the training images need not be there
    shutil.rmtree(tmp_path / "imagenet/images/train")
    with pytest.raises(DataError, match=r"ImageNet is not under .*expected .*imagenet/images with train/val"):
        FewShot("imagenet", tmp_path)
    assert FewShot("imagenet", tmp_path, shots=0).description()["sizes"] == {"test": 1000}


def test_imagenet_of_another_layout(tmp_path, picture):
    link(picture, tmp_path / "imagenet/train/n01440764/a.JPEG")
    link(picture, tmp_path / "imagenet/val/n01440764/a.JPEG")
    with pytest.raises(DataError, match=r"999 of the 1,000 class folders are missing in .*imagenet/train"):
        FewShot("imagenet", tmp_path)
    data = FewShot("imagenet", tmp_path, shots=0)
    assert data.description()["notes"][0] == "test: 999 of 1,000 classes have no image"
    link(picture, tmp_path / "imagenet/val/n99999999/a.JPEG")
    with pytest.raises(DataError, match="n99999999 is none of the 1000 classes of this data set"):
        FewShot("imagenet", tmp_path, shots=0)
    shutil.rmtree(tmp_path / "imagenet/val")
    link(picture, tmp_path / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="must hold a folder for each class, named by its WordNet id"):
        FewShot("imagenet", tmp_path, shots=0)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("imagenet_a", "imagenet-adversarial/imagenet-a"),
        ("ImageNet-A", "imagenet-a"),
        ("imagenet_r", "imagenet-rendition/imagenet-r"),
        ("imagenet-r", "imagenet-r"),
    ],
)
def test_label_spaces_of_200_classes(tmp_path, picture, name, folder):
    key = name.lower().replace("-", "_")
    names = few_shot_class_names(key)
    for identifier in list(names)[::-1]:
        link(picture, tmp_path / folder / identifier / "x.jpg")
    (tmp_path / folder / "README.txt").write_text("read me")
    data = FewShot(name, tmp_path)
    data.setup()
    assert data.class_names == list(names.values())
    assert len(data.class_names) == 200
    assert [path.parent.name for path in data.sources["test"].paths] == sorted(names)
    assert data.sources["test"].labels == list(range(200))
    record = data.description()
    assert record["sizes"] == {"test": 200}
    assert (record["shots"], record["draw_seed"], record["trained_on"]) == (0, None, None)
    # a class of ImageNet that is not among the 200
    stranger = next(identifier for identifier in few_shot_class_names("imagenet") if identifier not in names)
    link(picture, tmp_path / folder / stranger / "x.jpg")
    with pytest.raises(DataError, match=f"{stranger} is none of the 200 classes"):
        FewShot(name, tmp_path)


def test_sketch(tmp_path, picture):
    names = few_shot_class_names("imagenet")
    for identifier in list(names)[:3]:
        link(picture, tmp_path / "ImageNet-Sketch/sketch" / identifier / "x.JPEG")
    data = FewShot("imagenet_sketch", tmp_path)
    assert len(data.class_names) == 1000
    assert data.sources["test"].labels == [0, 1, 2]
    assert "test: 997 of 1000 classes have no image" in data.description()["notes"]


def test_imagenet_v2_folders_are_numbers(tmp_path, picture):
    """Sorted as text, folder "10" would come third and be called after the third class."""
    for label in range(1000):
        link(picture, tmp_path / f"imagenetv2/imagenetv2-matched-frequency-format-val/{label}/x.jpeg")
    data = FewShot("imagenetv2", tmp_path)
    assert [int(path.parent.name) for path in data.sources["test"].paths] == data.sources["test"].labels
    assert data.class_names == list(few_shot_class_names("imagenet").values())
    shutil.rmtree(tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val/517")
    with pytest.raises(DataError, match=r"class folder .*517 of ImageNetV2 does not exist"):
        FewShot("imagenetv2", tmp_path)
    with pytest.raises(
        DataError, match=r"ImageNet-Sketch is not under .*; it comes from https://github.com/HaohanWang"
    ):
        FewShot("imagenet_sketch", tmp_path / "nowhere")


class Zero(lightning.LightningModule):
    """Counts test images."""

    count = 0

    def test_step(self, batch, index):
        self.count += len(batch[1])


def test_lightning_tests_data_without_a_train_split(tmp_path, picture):
    for identifier in list(few_shot_class_names("imagenet_a"))[:5]:
        link(picture, tmp_path / "imagenet-a" / identifier / "x.jpg")
    data = FewShot("imagenet_a", tmp_path, batch_size=2)
    data.preprocessing = SMALL
    task = Zero()
    lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).test(
        task, data
    )
    assert task.count == 5


def test_clip_art():
    data = FewShot()
    data.preprocessing = SMALL
    data.setup()
    assert data.description()["sizes"] == {"train": 416, "val": 104, "test": 1103}
    assert "stick figures" in data.class_names
    assert data.description()["split"] == "embedded"
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 16, 16)
    assert labels.dtype == torch.int64
    assert FewShot(seed=1).draw == data.draw != FewShot(seed=2).draw
    base, new = FewShot(classes="base"), FewShot(classes="new")
    assert len(base.class_names) == len(new.class_names) == 13
    assert len(base.sources["test"]) + len(new.sources["test"]) == 1103


def test_absent_embedded_set(monkeypatch, tmp_path):
    monkeypatch.setattr("visionpeft.data.few_shot.splits.shipped", lambda kind: tmp_path)
    with pytest.raises(DataError, match=r"the embedded set Drawings is not installed: .*drawings/train\.csv"):
        FewShot("drawings")


def test_what_is_done_to_an_embedded_split_is_done_to_it_alone():
    """Its files are read once in a process."""
    definition, place = few_shot_datasets()["clipart"], Place(Path("."))
    first = read_splits("clipart", definition, place)
    whole = {split: len(rows) for split, rows in first.rows.items()}
    first.rows["train"].clear()
    first.notes.append("mine")
    again = read_splits("clipart", definition, place)
    assert {split: len(rows) for split, rows in again.rows.items()} == whole
    assert "mine" not in again.notes


@pytest.mark.parametrize("dataset", ["folder", "list", "clipart"])
def test_places_that_would_not_be_read(dataset, tmp_path):
    with pytest.raises(ConfigurationError, match=r"folder and split_file would not be read; leave them out"):
        FewShot(dataset, tmp_path, folder="birds", split_file="split.json")
    with pytest.raises(ConfigurationError, match=r"image_folder would not be read; leave it out"):
        FewShot(dataset, tmp_path, image_folder="rgb")


def test_own_folder(tmp_path):
    write_class_folders(tmp_path, {"red_kite": 20, "heron": 20})
    data = FewShot("folder", tmp_path, shots=4)
    assert data.class_names == ["heron", "red kite"]
    assert data.description()["sizes"] == {"train": 8, "val": 4, "test": 8}
    assert data.template == "a photo of a {}."
    assert data.description()["split"] == "image folder; random, val 0.1, test 0.2, seed 0"
    data = FewShot("folder", tmp_path, shots=50, val_fraction=0, test_fraction=0.5)
    assert data.description()["sizes"] == {"train": 20, "test": 20}
    assert data.description()["notes"] == ["2 of 2 classes have fewer than 50 training images"]


def test_own_lists(tmp_path):
    rows = {"train": 6, "test": 2}
    for split, count in rows.items():
        lines = ["path,label"]
        for number in range(2 * count):
            write_image(tmp_path / f"{split}{number}.png", number)
            lines.append(f"{split}{number}.png,{number % 2}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    data = FewShot("csv", tmp_path, shots=3, class_names=["heron", "buzzard"])
    assert data.class_names == ["heron", "buzzard"]
    assert data.description()["sizes"] == {"train": 6, "test": 4}
    assert data.description()["selected_on"] is None
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match=r"dataset 'list' needs .*train\.csv \(or train\.json\)"):
        FewShot("list", tmp_path)


def test_wrong_options(tmp_path):
    with pytest.raises(ConfigurationError, match="unknown few-shot data set 'eurosta': did you mean eurosat"):
        FewShot("eurosta", tmp_path)
    with pytest.raises(ConfigurationError, match="unknown classes 'old': choose all, base or new"):
        FewShot(classes="old")
    with pytest.raises(ConfigurationError, match="shots -1 must be 1 or more"):
        FewShot(shots=-1)
    with pytest.raises(ConfigurationError, match="unknown split 'ours'"):
        FewShot(split="ours")
    with pytest.raises(ConfigurationError, match=r"has no \{\} for the class name"):
        FewShot(template="a photo")
    with pytest.raises(
        DataError, match="data set 'dtd' needs root, the folder that holds dtd/; it comes from https://"
    ):
        FewShot("dtd")
    for own in ("folder", "list"):
        with pytest.raises(DataError, match=f"dataset '{own}' needs root"):
            FewShot(own)
    assert set(few_shot_datasets()).isdisjoint({"folder", "list"})


def test_numbers_of_numpy_draw_what_those_of_python_draw():
    """As of an array of seeds; `random` takes no others, and PyTorch's loaders no other batch size."""
    numbers = np.array([3, 2, 5])
    given = FewShot("clipart", seed=numbers[0], shots=numbers[1], batch_size=numbers[2])
    plain = FewShot("clipart", seed=3, shots=2, batch_size=5)
    assert given.description() == plain.description()
    assert [type(value) for value in (given.batch_size, given.images.about["shots"])] == [int, int]
