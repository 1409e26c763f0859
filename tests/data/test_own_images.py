"""People's own images, in folders and in lists, the embedded set, and images to predict."""

import csv
import json
import warnings

import numpy as np
import pytest
from data_layouts import SMALL, truncate, write_class_folders, write_image
from PIL import Image

from visionpeft.data import ClipArt, ImageFolder, ImageList, files_dataloader, find_images
from visionpeft.data.images import list_images, open_image
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import shipped


def write_csv(file, rows, header=("path", "label")):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([header, *rows])
    return file


@pytest.fixture
def folders(tmp_path):
    return write_class_folders(tmp_path / "pets", {"cat": 10, "ant eater": 20, "dog": 4})


@pytest.fixture
def lists(tmp_path):
    """Two lists of images of three classes."""
    for number in range(9):
        write_image(tmp_path / f"images/{number}.png", number)
    names = ["bird", "cat", "dog"]
    write_csv(tmp_path / "train.csv", [(f"images/{n}.png", names[n % 3]) for n in range(6)])
    write_csv(tmp_path / "test.csv", [(f"images/{n}.png", names[n % 3]) for n in range(6, 9)])
    return tmp_path


class TestImageFolder:
    def test_flat_folder_is_split_within_each_class(self, folders):
        data = ImageFolder(folders)
        data.setup()
        assert data.class_names == ["ant eater", "cat", "dog"]
        counts = {split: [source.labels.count(k) for k in range(3)] for split, source in data.sources.items()}
        assert counts == {"train": [14, 7, 3], "val": [2, 1, 0], "test": [4, 2, 1]}
        paths = [path for source in data.sources.values() for path in source.paths]
        assert len(set(paths)) == len(paths) == 34
        for source in data.sources.values():
            assert [path.parent.name for path in source.paths] == [data.class_names[k] for k in source.labels]

    def test_flat_split_depends_on_its_seed_only(self, folders):
        first, again, other = (ImageFolder(folders, split_seed=s).sources["test"].paths for s in (0, 0, 1))
        assert first == again != other

    def test_share_of_zero_leaves_a_split_out(self, folders):
        data = ImageFolder(folders, val_fraction=0, test_fraction=0.5)
        assert set(data.sources) == {"train", "test"}
        assert data.val_dataloader() == []
        assert data.description()["selected_on"] is None

    @pytest.mark.parametrize("val", ["val", "validation", None])
    def test_split_folders(self, tmp_path, val):
        for split in filter(None, ("train", val, "test")):
            write_class_folders(tmp_path / split, {"b": 3, "a": 2})
        data = ImageFolder(tmp_path)
        assert set(data.sources) == ({"train", "val", "test"} if val else {"train", "test"})
        assert data.sources["train"].labels == [0, 0, 1, 1, 1]
        assert data.description()["split"] == "folders"

    @pytest.mark.parametrize(
        "names",
        [("Train", "Val", "Test"), ("training", "validation", "testing"), ("TRAINING", "dev", "TEST"), ("trn", "tst")],
    )
    def test_split_folders_of_other_spellings(self, names, tmp_path):
        for name in names:
            write_class_folders(tmp_path / name, {"b": 3, "a": 2})
        data = ImageFolder(tmp_path)
        assert data.class_names == ["a", "b"]
        assert {split: len(source) for split, source in data.sources.items()} == dict.fromkeys(
            ("train", "val", "test") if len(names) == 3 else ("train", "test"), 5
        )
        assert data.sources["train"].paths[0].parent.parent.name == names[0]

    def test_a_class_called_train_beside_others(self, tmp_path):
        """Files in it: three classes. Folders in it: either, so that it is refused, in any order of names."""
        write_class_folders(tmp_path / "flat", {"airplane": 10, "bus": 10, "train": 10})
        assert ImageFolder(tmp_path / "flat").class_names == ["airplane", "bus", "train"]
        for other in ("airplane", "zebra"):
            root = tmp_path / other
            write_class_folders(root, {other: 5, "bus": 5})
            write_class_folders(root / "train", {"steam": 5, "diesel": 5})
            with pytest.raises(DataError, match="is ambiguous: train would be a split") as raised:
                ImageFolder(root)
            assert "\n" not in str(raised.value)

    def test_folders_without_images_beside_the_splits(self, tmp_path):
        for name in ("train", "test"):
            write_class_folders(tmp_path / name, {"b": 3, "a": 2})
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "boxes.xml").write_text("")
        data = ImageFolder(tmp_path)
        assert set(data.sources) == {"train", "test"}
        assert "annotations/boxes.xml" in data.description()["notes"][0]

    def test_a_test_alone(self, tmp_path):
        """All of it is scored, by a run that is finished; beside a val folder a train folder is missed."""
        write_class_folders(tmp_path / "Test", {"b": 3, "a": 2})
        data = ImageFolder(tmp_path)
        assert {split: len(source) for split, source in data.sources.items()} == {"test": 5}
        assert data.class_names == ["a", "b"]
        assert data.description()["trained_on"] is None
        assert list(data.sources["test"].labels) == [0, 0, 1, 1, 1]

    @pytest.mark.parametrize(
        ("names", "said"),
        [(("val", "test"), "no train folder"), (("train", "val", "valid"), "val and valid both"),
         (("train", "Training"), "both name the train split")],
    )  # fmt: skip
    def test_splits_that_cannot_be_told(self, names, said, tmp_path):
        for name in names:
            write_class_folders(tmp_path / name, {"b": 3, "a": 2})
        with pytest.raises(DataError, match=said):
            ImageFolder(tmp_path)

    def test_what_is_left_out_is_counted_and_named(self, folders):
        """A mix as cameras and converters leave it: HEIC is not read, AVIF, JPEG 2000 and TGA are."""
        assert ImageFolder(folders).description()["notes"] == []
        picture = Image.fromarray(np.full((24, 32, 3), (200, 30, 90), np.uint8))
        for suffix in ("avif", "jp2", "tga"):
            picture.save(folders / "dog" / f"own.{suffix}")
        (folders / "dog" / "phone.HEIC").write_bytes(b"0")
        (folders / "cat" / "phone.heic").write_bytes(b"0")
        (folders / "cat" / "notes.txt").write_text("")
        (folders / "cat" / ".hidden").write_text("")
        data = ImageFolder(folders, skip_corrupt=True)
        data.setup()
        assert sum(source.labels.count(2) for source in data.sources.values()) == 4 + 3
        assert data.skipped == {"train": 0, "val": 0, "test": 0}
        (note,) = data.description()["notes"]
        assert note.startswith("3 files in")
        for part in ("2 .heic", "1 .txt", "cat/phone.heic", "dog/phone.HEIC", "cat/notes.txt"):
            assert part in note
        assert "hidden" not in note

    @pytest.mark.parametrize("suffix", ["avif", "jp2", "tga"])
    def test_further_formats_have_their_colours(self, suffix, tmp_path):
        """The uniform colour comes back; a codec may round it by a few levels."""
        picture = np.full((24, 32, 3), (200, 30, 90), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"own.{suffix}")
        assert list_images(tmp_path) == [tmp_path / f"own.{suffix}"]
        found = np.asarray(open_image(tmp_path / f"own.{suffix}")).astype(int)
        assert found.shape == picture.shape
        assert abs(found - picture).max() <= 3

    def test_a_class_of_unreadable_files_says_so(self, folders):
        (folders / "phone").mkdir()
        (folders / "phone" / "a.heic").write_bytes(b"0")
        with pytest.raises(DataError, match=r"phone holds no images; 1 files in .*1 \.heic"):
            ImageFolder(folders)

    def test_class_in_test_that_is_not_in_train(self, tmp_path):
        write_class_folders(tmp_path / "train", {"a": 2, "b": 2})
        write_class_folders(tmp_path / "test", {"a": 2, "c": 2})
        with pytest.raises(DataError, match="class 'c' is in the test split and has no image in the train split"):
            ImageFolder(tmp_path)

    def test_bad_folders(self, tmp_path, folders):
        with pytest.raises(DataError, match="nowhere does not exist"):
            ImageFolder(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"cat holds no class folders; images must lie in .*<class>/"):
            ImageFolder(folders / "cat")
        (folders / "empty").mkdir()
        with pytest.raises(DataError, match=r"class folder .*empty holds no images"):
            ImageFolder(folders)

    def test_one_class(self, tmp_path):
        write_class_folders(tmp_path, {"only": 8})
        with pytest.raises(DataError, match="at least two classes, found 1: only"):
            ImageFolder(tmp_path)

    def test_fractions_that_cannot_be(self, folders, tmp_path):
        with pytest.raises(ConfigurationError, match=r"val_fraction 0\.5 and test_fraction 0\.5"):
            ImageFolder(folders, val_fraction=0.5, test_fraction=0.5)
        few = write_class_folders(tmp_path / "few", {"a": 2, "b": 2})
        with pytest.raises(DataError, match=r"too few images for a val split of 0\.1 of each class"):
            ImageFolder(few)


class TestImageList:
    def test_csv_with_names(self, lists):
        data = ImageList(lists / "train.csv", test=lists / "test.csv")
        data.setup()
        assert data.class_names == ["bird", "cat", "dog"]
        assert data.sources["train"].labels == [0, 1, 2, 0, 1, 2]
        assert data.sources["test"].paths == [lists / f"images/{n}.png" for n in (6, 7, 8)]
        assert data.description()["sizes"] == {"train": 6, "test": 3}

    @pytest.mark.parametrize("form", ["object", "pairs", "records"])
    def test_json_forms_are_equal(self, lists, form):
        rows = {f"images/{n}.png": n % 3 + 4 for n in range(6)}
        content = {
            "object": rows,
            "pairs": list(rows.items()),
            "records": [{"path": path, "label": label} for path, label in rows.items()],
        }[form]
        (lists / "train.json").write_text(json.dumps(content))
        data = ImageList(lists / "train.json")
        assert data.class_names == ["4", "5", "6"]
        assert data.sources["train"].labels == [0, 1, 2, 0, 1, 2]

    def test_class_names_give_integers_their_meaning(self, lists):
        write_csv(lists / "train.csv", [("images/0.png", 2), ("images/1.png", 0), ("images/2.png", 1)])
        data = ImageList(lists / "train.csv", class_names=["zebra", "yak", "ant"])
        assert data.sources["train"].labels == [2, 0, 1]
        assert data.class_names == ["zebra", "yak", "ant"]

    def test_an_integer_that_names_one_class_and_counts_another_is_refused(self, lists):
        write_csv(lists / "train.csv", [("images/0.png", 1), ("images/1.png", 2), ("images/2.png", 0)])
        with pytest.raises(
            DataError, match=r"line 3: label 2 is the name of class 0 and the index of class '0'; leave"
        ):
            ImageList(lists / "train.csv", class_names=["2", "1", "0"])
        same = ImageList(lists / "train.csv", class_names=["0", "1", "2"])  # either way the same class
        assert same.sources["train"].labels == [1, 2, 0]
        beyond = ImageList(lists / "train.csv", class_names=["7", "8", "9"])  # no label is a name
        assert beyond.sources["train"].labels == [1, 2, 0]
        alone = ImageList(lists / "train.csv")
        assert [alone.class_names[label] for label in alone.sources["train"].labels] == ["1", "2", "0"]

    def test_byte_order_mark_other_columns_and_blank_lines(self, lists):
        text = "\ufefflabel,size,path\r\ndog,3,images/0.png\r\n\r\ncat,4,images/1.png\r\n"
        (lists / "train.csv").write_text(text, encoding="utf-8")
        data = ImageList(lists / "train.csv")
        assert data.sources["train"].labels == [1, 0]

    def test_root_may_be_elsewhere_or_none(self, lists, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("lists")
        (elsewhere / "train.csv").write_text((lists / "train.csv").read_text())
        assert ImageList(elsewhere / "train.csv", root=lists).sources["train"].paths[0] == lists / "images/0.png"
        write_csv(elsewhere / "far.csv", [(lists / "images/0.png", "a"), (lists / "images/1.png", "b")])
        data = ImageList(elsewhere / "far.csv", root=None)
        data.setup()
        assert data.sources["train"].paths[1] == lists / "images/1.png"
        with pytest.raises(DataError, match=r"far\.csv line 2: the path '/.*0\.png' leaves the image folder"):
            ImageList(elsewhere / "far.csv")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (("../0.png", "cat"), r"line 8: the path '\.\./0\.png' leaves the image folder"),
            (("images/8.png", ""), r"line 8: image 'images/8\.png' needs a class name or an integer"),
            (("images/8.png",), r"line 8: image 'images/8\.png' needs a class name or an integer"),
            (("", "cat"), "line 8 has no image path"),
            (("images/9.png", "7"), "line 8: label 7 is an integer while other labels are names"),
            (("images/0.png", "cat"), r"line 8: image 'images/0\.png' has label 'cat' here and 'bird' in .*line 2$"),
            (
                ("./images//0.png", "cat"),
                r"line 8: image '\./images//0\.png' has label 'cat' here and 'bird' in .*line 2$",
            ),
            (("./images/6.png", "bird"), r"test\.csv line 2: image 'images/6\.png' is also in the train split"),
            (("images/6.png", "bird"), r"test\.csv line 2: image 'images/6\.png' is also in the train split"),
        ],
    )
    def test_bad_rows_are_named(self, lists, row, message):
        with (lists / "train.csv").open("a", newline="") as file:
            csv.writer(file).writerow(row)
        with pytest.raises(DataError, match=message):
            ImageList(lists / "train.csv", test=lists / "test.csv")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "", r"a\.csv must start with a header naming path and label, found 'nothing'"),
            ("a.csv", "file,label\nx.png,1\n", "found 'file,label'"),
            ("a.csv", "path,label\n", "holds no images"),
            ("a.csv", "path,label,label\nx.png,1,2\n", r"a\.csv has 2 columns label; leave the one that is meant"),
            ("a.txt", "x.png 1", r"must be a \.csv file .* or a \.json file"),
            ("a.json", "{", "is not valid JSON"),
            ("a.json", "3", "must be an object or a list, found int"),
            ("a.json", '["x.png"]', r"entry 1: expected a path and a label, found \"x\.png\""),
            ("a.json", '{"x.png": null}', r"entry 1: image 'x\.png' needs a class name or an integer"),
        ],
    )
    def test_bad_lists_are_named(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            ImageList(tmp_path / name)

    def test_labels_outside_class_names(self, lists):
        with pytest.raises(DataError, match=r"line 4: label 'dog' is out of range; class_names allows bird, cat"):
            ImageList(lists / "train.csv", class_names=["bird", "cat"])
        write_csv(lists / "train.csv", [("images/0.png", 0), ("images/1.png", 2)])
        with pytest.raises(DataError, match="line 3: label '2' is out of range; class_names allows 0 to 1"):
            ImageList(lists / "train.csv", class_names=["bird", "cat"])

    def test_classes_without_training_images(self, lists):
        write_csv(lists / "test.csv", [("images/8.png", "owl")])
        with pytest.raises(DataError, match="class 'owl' is in the test split and has no image in the train split"):
            ImageList(lists / "train.csv", test=lists / "test.csv")
        with pytest.raises(DataError, match="class 'emu' has no image in the train split"):
            ImageList(lists / "train.csv", class_names=["bird", "cat", "dog", "emu"])

    def test_missing_list_and_missing_split(self, lists):
        with pytest.raises(DataError, match=r"cannot read the list .*gone\.csv: No such file"):
            ImageList(lists / "gone.csv")
        data = ImageList(lists / "train.csv")
        data.preprocessing = SMALL
        with pytest.raises(DataError, match="ImageList has no test split here; it has train"):
            data.test_dataloader()


def test_clip_art_is_whole_and_readable():
    data = ClipArt()
    data.setup()
    assert set(data.sources) == {"train", "val", "test"}
    assert 20 <= len(data.class_names) <= 30
    for source in data.sources.values():
        assert set(source.labels) == set(range(len(data.class_names)))
        width, height = source.image(0).size
        assert width == height
        assert 64 <= width <= 96


def test_shipped_folders():
    assert (shipped("datasets") / "vtab1k.json").is_file()
    with pytest.raises(ConfigurationError, match="the folder 'nonsense' shipped with visionpeft is missing"):
        shipped("nonsense")


class TestUnlabelled:
    def test_order_is_as_named_and_sorted_within_folders(self, folders):
        found = find_images([folders / "dog/3.png", folders / "dog", folders / "cat/1.png"])
        assert [path.relative_to(folders).as_posix() for path in found] == [
            "dog/3.png",
            "dog/0.png",
            "dog/1.png",
            "dog/2.png",
            "cat/1.png",
        ]

    def test_batches_follow_the_files(self, folders):
        files = find_images([folders / "dog"])
        loader, used = files_dataloader(files, SMALL, batch_size=3)
        assert used == files
        assert [tuple(images.shape) for images, _ in loader] == [(3, 3, 16, 16), (1, 3, 16, 16)]

    def test_damaged_file_is_an_error_or_left_out(self, folders):
        truncate(folders / "dog/2.png")
        files = find_images([folders / "dog"])
        loader, _ = files_dataloader(files, SMALL)
        with pytest.raises(DataError, match=r"dog/2\.png cannot be read"):
            list(loader)
        loader, used = files_dataloader(files, SMALL, skip_corrupt=True)
        assert [path.name for path in used] == ["0.png", "1.png", "3.png"]
        assert [len(labels) for _, labels in loader] == [3]
        with pytest.raises(DataError, match="none of the 1 image files can be read"):
            files_dataloader([folders / "dog/2.png"], SMALL, skip_corrupt=True)

    def test_nothing_to_predict(self, tmp_path):
        with pytest.raises(DataError, match="holds no images"):
            find_images([tmp_path])
        with pytest.raises(DataError, match="gone does not exist"):
            find_images([tmp_path / "gone"])
        with pytest.raises(DataError, match="no images to predict"):
            find_images([])


def test_files_left_out_of_a_prediction_are_counted_and_named(tmp_path):
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "phone.heic").write_bytes(b"0")
    with pytest.warns(UserWarning, match=r"1 files in .* are left out.*1 \.heic.*phone\.heic"):
        assert find_images([tmp_path]) == [tmp_path / "a.png"]
    (tmp_path / "phone.heic").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_images([tmp_path]) == [tmp_path / "a.png"]
