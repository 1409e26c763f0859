"""VTAB-1k: the table of tasks and the reader of the community archive."""

import pytest
from data_layouts import SMALL, write_image, write_vtab_task

from visionpeft.data import VTAB1k
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import ConfigurationError, DataError

SIZES = {"train800": 16, "val200": 8, "train800val200": 24, "test": 20}


@pytest.fixture
def eurosat(tmp_path):
    write_vtab_task(tmp_path, "eurosat", 8, SIZES)
    return tmp_path


def test_table_of_tasks():
    tasks = vtab1k_tasks()
    groups = [entry["group"] for entry in tasks.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    published = {  # classes and test images: Zhai et al. 2019, Table 2, and the TFDS versions of the archive
        "cifar": (100, 10_000),
        "caltech101": (102, 6_084),
        "dtd": (47, 1_880),
        "oxford_flowers102": (102, 6_149),
        "oxford_iiit_pet": (37, 3_669),
        "svhn": (10, 26_032),
        "sun397": (397, 21_750),
        "patch_camelyon": (2, 32_768),
        "eurosat": (10, 5_400),
        "resisc45": (45, 6_300),
        "diabetic_retinopathy": (5, 42_670),
        "clevr_count": (8, 15_000),
        "clevr_dist": (6, 15_000),
        "dmlab": (6, 22_735),
        "kitti": (4, 711),
        "dsprites_loc": (16, 73_728),
        "dsprites_ori": (16, 73_728),
        "smallnorb_azi": (18, 12_150),
        "smallnorb_ele": (9, 12_150),
    }
    assert {name: (entry["classes"], entry["test"]) for name, entry in tasks.items()} == published
    for entry in tasks.values():
        if "names" in entry:
            assert len(entry["names"]) == len(set(entry["names"])) == entry["classes"]


def test_final_training_uses_all_1000_and_has_no_validation(eurosat):
    data = VTAB1k("eurosat", eurosat)
    data.preprocessing = SMALL
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 24, "test": 20}
    assert data.val_dataloader() == []
    assert data.class_names[9] == "SeaLake"
    record = data.description()
    assert (record["trained_on"], record["selected_on"], record["rendered"]) == ("train800val200", None, False)
    assert "train: 24 images found, 1,000 published" in record["notes"]
    assert "2 of 10 classes have no training image" in record["notes"]


def test_tuning_selects_on_val200(eurosat):
    data = VTAB1k("eurosat", eurosat, train_on="train800", batch_size=4)
    data.preprocessing = SMALL
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 16, "val": 8, "test": 20}
    assert data.description()["selected_on"] == "val200"
    labels = [label for _, batch in data.val_dataloader() for label in batch.tolist()]
    assert labels == list(range(8))
    assert {source.name(0).split("images/")[1] for source in data.sources.values()} == {
        "train800/000000.jpg",
        "val200/000000.jpg",
        "test/000000.jpg",
    }


def test_missing_train800val200_is_put_together(eurosat):
    (eurosat / "eurosat/train800val200.txt").unlink()
    data = VTAB1k("eurosat", eurosat)
    assert [name.split("images/")[1] for name in map(data.sources["train"].name, (0, 15, 16, 23))] == [
        "train800/000000.jpg",
        "train800/000015.jpg",
        "val200/000000.jpg",
        "val200/000007.jpg",
    ]
    assert any("train800val200.txt is absent" in note for note in data.description()["notes"])


@pytest.mark.parametrize(("task", "folder"), [("cifar", "cifar100"), ("cifar100", "cifar"), ("pets", "oxford_pet")])
def test_other_names_of_tasks_and_folders(tmp_path, task, folder):
    write_vtab_task(tmp_path, folder, 4, SIZES)
    data = VTAB1k(task, tmp_path)
    assert data.description()["task"] == {"pets": "oxford_iiit_pet"}.get(task, "cifar")


def test_blank_and_repeated_lines(eurosat):
    file = eurosat / "eurosat/test.txt"
    file.write_text("\n" + file.read_text() + "\n  \nimages/test/000003.jpg\t3\n")
    assert len(VTAB1k("eurosat", eurosat).sources["test"]) == 20


def test_path_with_a_space(eurosat):
    write_image(eurosat / "eurosat/images/test/one more.jpg")
    with (eurosat / "eurosat/test.txt").open("a") as file:
        file.write("images/test/one more.jpg 3\n")
    source = VTAB1k("eurosat", eurosat).sources["test"]
    assert source.labels[-1] == 3
    assert source.image(20).size == (20, 16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000000.jpg 10", r"test\.txt line 21: label 10 is out of range; the 10 classes are 0 to 9"),
        ("images/test/000000.jpg -1", r"test\.txt line 21: expected an image path and an integer label"),
        ("images/test/000000.jpg", r"test\.txt line 21: expected an image path and an integer label"),
        ("images/test/000000.jpg 5", r"line 21: image .*000000\.jpg' has label '5' here and '0' in .*line 1$"),
        ("../test/000000.jpg 5", r"line 21: the path '\.\./test/000000\.jpg' leaves the image folder"),
        ("/test/000000.jpg 5", r"line 21: the path '/test/000000\.jpg' leaves the image folder"),
    ],
)
def test_bad_lines_are_named(eurosat, line, message):
    with (eurosat / "eurosat/test.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        VTAB1k("eurosat", eurosat)


def test_missing_files_say_what_was_wanted(eurosat):
    with pytest.raises(DataError, match=r"'cifar' needs root, the folder that holds cifar/train800val200\.txt"):
        VTAB1k("cifar")
    with pytest.raises(DataError, match=r"folder .*/dtd does not exist; .*archive .*TFDS data set dtd:3\.0\.1"):
        VTAB1k("dtd", eurosat)
    (eurosat / "eurosat/val200.txt").unlink()
    with pytest.raises(DataError, match=r"split file .*eurosat/val200\.txt does not exist"):
        VTAB1k("eurosat", eurosat, train_on="train800")


def test_listed_image_that_does_not_exist(eurosat):
    (eurosat / "eurosat/images/test/000007.jpg").unlink()
    with pytest.raises(DataError, match=r"test/000007\.jpg does not exist"):
        VTAB1k("eurosat", eurosat).setup()


def test_empty_split_file(eurosat):
    (eurosat / "eurosat/test.txt").write_text("\n\n")
    with pytest.raises(DataError, match="the test split holds no images"):
        VTAB1k("eurosat", eurosat)


@pytest.mark.parametrize(
    ("task", "advice"),
    [
        ("dsprite_ori", "did you mean dsprites_ori"),
        ("clever_count", "did you mean clevr_count"),
        ("mnist", "choose one of cifar, caltech101, "),
    ],
)
def test_unknown_task_gets_advice(task, advice):
    with pytest.raises(ConfigurationError, match=f"unknown VTAB-1k task '{task}': {advice}"):
        VTAB1k(task)


def test_unknown_split():
    with pytest.raises(ConfigurationError, match="unknown train_on 'test': choose train800 or train800val200"):
        VTAB1k("dsprites_ori", train_on="test")
