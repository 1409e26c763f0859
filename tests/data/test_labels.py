"""What a label is, said by an option and never guessed: one class, several labels, a number; and balanced sampling."""

import csv
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from data_layouts import SMALL, write_class_folders, write_image

from visionpeft.data import ImageFolder, ImageList, VideoList
from visionpeft.data.ordering import BalancedSampler
from visionpeft.errors import ConfigurationError, DataError


def listed(folder, labels, name="train.csv", first=0):
    """A list of images of these labels: CSV with them as text, or JSON with them as they are."""
    paths = [f"images/{first + number}.png" for number in range(len(labels))]
    for number, path in enumerate(paths):
        write_image(folder / path, number)
    file = folder / name
    if file.suffix == ".json":
        file.write_text(json.dumps([{"path": p, "label": label} for p, label in zip(paths, labels, strict=True)]))
    else:
        with file.open("w", newline="") as target:
            csv.writer(target).writerows([("path", "label"), *zip(paths, labels, strict=True)])
    return file


def batch_of(data, split="train"):
    data.preprocessing = SMALL
    dataset = data.dataset(split)
    return dataset.__getitems__(list(range(len(dataset))))[1]


class TestSeveral:
    @pytest.mark.parametrize(
        ("name", "labels"),
        [
            ("a.csv", ["cat;dog", "", "dog", " dog ; ant;", "cat;cat"]),
            ("a.json", [["cat", "dog"], [], ["dog"], ["ant", "dog"], "cat"]),
            ("a.json", ["cat;dog", "", "dog", "dog;ant", ["cat"]]),
        ],
    )
    def test_rows_of_zeros_and_ones(self, name, labels, tmp_path):
        data = ImageList(listed(tmp_path, labels, name), labels="several")
        assert data.class_names == ["ant", "cat", "dog"]
        assert data.sources["train"].labels == [(1, 2), (), (2,), (0, 2), (1,)]
        found = batch_of(data)
        assert found.dtype == torch.float32
        assert found.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]]
        assert data.dataset("train")[3][1].tolist() == [1, 0, 1]
        assert (data.description()["labels"], data.description()["classes"]) == ("several", 3)

    def test_integers_are_in_numerical_order(self, tmp_path):
        data = ImageList(listed(tmp_path, ["10;2", "2", "7"]), labels="several")
        assert data.class_names == ["2", "7", "10"]
        assert data.sources["train"].labels == [(0, 2), (0,), (1,)]

    def test_another_separator(self, tmp_path):
        data = ImageList(listed(tmp_path, ["a,b", "b", "c;d"]), labels="several", separator=",")
        assert data.class_names == ["a", "b", "c;d"]

    @pytest.mark.parametrize(
        ("labels", "options", "said"),
        [
            (["cat;bird", "dog"], {"class_names": ["cat", "dog"]}, "label 'bird' is out of range"),
            (
                ["1;0", "1"],
                {"class_names": ["1", "dog"]},
                "label 1 is the name of class 0 and the index of class 'dog'",
            ),
            (["0;2", "1"], {"class_names": ["cat", "dog"]}, "label '2' is out of range; class_names allows 0 to 1"),
            (["cat;0", "1"], {}, "label 0 is an integer while other labels are names"),
            (["cat", "cat", ""], {}, "at least two classes"),
            (["0;1;1", "1;0;1"], {}, "needs the names or indices of the labels that apply, not a 0 or 1 for each"),
            (["", ""], {}, "at least two classes"),
            (["cat", "dog"], {"class_names": ["cat", "dog", "ant"]}, "class 'ant' has no image in the train split"),
            (["cat", "dog"], {"separator": " "}, "must be a visible character"),
        ],
    )
    def test_refused(self, labels, options, said, tmp_path):
        with pytest.raises((DataError, ConfigurationError), match=said):
            ImageList(listed(tmp_path, labels), labels="several", **options)

    @pytest.mark.parametrize("label", [None, 0.5, True, ["cat", None], {"cat": 1}, ["cat", 0.5], [0, 0]])
    def test_json_that_is_no_label(self, label, tmp_path):
        with pytest.raises(DataError, match=r"entry 2: image 'images/1.png' needs"):
            ImageList(listed(tmp_path, ["cat;dog", label], "a.json"), labels="several")

    def test_two_labels_of_one_image(self, tmp_path):
        """The same ones in another order are the same label."""
        file = listed(tmp_path, ["cat;dog", "dog"])
        file.write_text(file.read_text() + "images/0.png,dog;cat\n")
        assert len(ImageList(file, labels="several").sources["train"]) == 2
        file.write_text(file.read_text() + "images/0.png,dog\n")
        with pytest.raises(DataError, match="has label 'dog' here and 'cat;dog' in"):
            ImageList(file, labels="several")

    def test_a_split_without_any_label(self, tmp_path):
        train = listed(tmp_path, ["cat;dog", "cat"])
        test = listed(tmp_path, ["", ""], "test.csv", first=5)
        with pytest.raises(DataError, match="no image of the test split has a label"):
            ImageList(train, test=test, labels="several")

    def test_unquoted_commas_would_lose_labels(self, tmp_path):
        """Also where a label is one class; commas at the end of a line hold nothing."""
        file = listed(tmp_path, ["cat", "dog"])
        file.write_text("path,label\nimages/0.png,cat,dog\nimages/1.png,dog\n")
        for labels in ("several", "classes"):
            with pytest.raises(DataError, match="line 2 has more entries than the header"):
                ImageList(file, labels=labels)
        file.write_text("path,label\nimages/0.png,cat,,\nimages/1.png,dog, \n")
        assert ImageList(file).class_names == ["cat", "dog"]

    def test_folders(self, tmp_path):
        write_class_folders(tmp_path, {"cat;dog": 4, "dog": 4, ";": 4})
        data = ImageFolder(tmp_path, labels="several", val_fraction=0.25, test_fraction=0.25)
        assert data.class_names == ["cat", "dog"]
        for source in data.sources.values():
            named = {"cat;dog": (0, 1), "dog": (1,), ";": ()}
            assert source.labels == [named[path.parent.name] for path in source.paths]
        assert {split: len(source) for split, source in data.sources.items()} == {"train": 6, "val": 3, "test": 3}


class TestNumber:
    @pytest.mark.parametrize(
        ("name", "labels"), [("a.csv", ["0.5", "-1", "1e2", " 3 "]), ("a.json", [0.5, -1, 100.0, "3"])]
    )
    def test_numbers_as_written(self, name, labels, tmp_path):
        data = ImageList(listed(tmp_path, labels, name), labels="number")
        assert data.sources["train"].labels == [0.5, -1.0, 100.0, 3.0]
        assert data.class_names == []
        found = batch_of(data)
        assert found.dtype == torch.float32
        assert found.tolist() == [0.5, -1.0, 100.0, 3.0]
        assert data.dataset("train")[1][1] == -1.0

    @pytest.mark.parametrize("label", ["nan", "inf", "-inf", "1e39", "", "cat", "1,5", "1_000", "0.5;1"])
    def test_text_that_is_no_number(self, label, tmp_path):
        with pytest.raises(DataError, match=r"line 3: image 'images/1.png' needs a (finite )?number as label, found"):
            ImageList(listed(tmp_path, ["1.5", label]), labels="number")

    @pytest.mark.parametrize("label", [None, True, float("nan"), [1.0], 10**400])
    def test_json_that_is_no_number(self, label, tmp_path):
        with pytest.raises(DataError, match=r"entry 2: image 'images/1.png' needs a"):
            ImageList(listed(tmp_path, [1.5, label], "a.json"), labels="number")

    def test_numbers_that_are_all_the_same(self, tmp_path):
        with pytest.raises(DataError, match=r"all 3 images of the train split are 2.5, and nothing can be learnt"):
            ImageList(listed(tmp_path, ["2.5", "2.5", "2.50"]), labels="number")
        train = listed(tmp_path, ["1", "2"])
        test = listed(tmp_path, ["3", "3"], "test.csv", first=5)
        with pytest.raises(DataError, match=r"all 2 images of the test split are 3, and R2 is not defined"):
            ImageList(train, test=test, labels="number")

    def test_one_number_to_select_on_is_enough(self, tmp_path):
        train = listed(tmp_path, ["1", "2"])
        assert "val" in ImageList(train, val=listed(tmp_path, ["3"], "val.csv", first=5), labels="number").sources

    def test_a_test_subset_that_says_nothing(self, tmp_path):
        train = listed(tmp_path, ["1", "2"])
        test = listed(tmp_path, ["3", "4"], "test.csv", first=5)
        assert len(ImageList(train, test=test, labels="number", test_samples=2).sources["test"]) == 2
        with pytest.raises(DataError, match="R2 is not defined"):
            ImageList(train, test=test, labels="number", test_samples=1)

    def test_differences_that_single_precision_loses(self, tmp_path):
        with pytest.raises(DataError, match="subtract 1e"):
            ImageList(listed(tmp_path, ["100000000", "100000001"]), labels="number")
        years = ImageList(listed(tmp_path, ["1990", "2010"]), labels="number")
        assert years.sources["train"].labels == [1990.0, 2010.0]

    def test_no_class_names(self, tmp_path):
        with pytest.raises(ConfigurationError, match="class_names name classes"):
            ImageList(listed(tmp_path, ["1", "2"]), labels="number", class_names=["a", "b"])

    def test_folders(self, tmp_path):
        """The images of all folders together are split, which may hold one each."""
        write_class_folders(tmp_path, {f"{number / 2}": 1 for number in range(20)})
        data = ImageFolder(tmp_path, labels="number", val_fraction=0.25, test_fraction=0.25)
        for source in data.sources.values():
            assert source.labels == [float(path.parent.name) for path in source.paths]
        assert {split: len(source) for split, source in data.sources.items()} == {"train": 10, "val": 5, "test": 5}
        assert sorted(label for source in data.sources.values() for label in source.labels) == [
            n / 2 for n in range(20)
        ]
        write_class_folders(tmp_path, {"two": 4})
        with pytest.raises(DataError, match=r"folder 'two' in .* needs a number as label"):
            ImageFolder(tmp_path, labels="number")


class TestLabelsReadAsClasses:
    """What seems to be no class is refused; names that only look unusual are not."""

    @pytest.mark.parametrize(
        ("labels", "option"),
        [
            (["0.5", "1.25", "3"], "number"),
            ([".5", "0.5", "-2.5"], "number"),
            (["x;y", "x", "y"], "several"),
            (["x;y", "y;z", "z;x"], "several"),
            (["x|y", "x", "y"], "several"),
            (["a", "b", "c", "a", "b", "c", "a;b"], "several"),
        ],
    )
    def test_refused_with_the_option(self, labels, option, tmp_path):
        file = listed(tmp_path, labels)
        with pytest.raises(DataError, match=f"would become the name of a class.*--data.labels {option}"):
            ImageList(file)
        # Who lists them as names of classes has said that they are.
        names = sorted(set(labels), key=str)
        if all(not name.isdigit() for name in names):
            assert ImageList(file, class_names=names).class_names == names

    @pytest.mark.parametrize(
        "labels",
        [
            ["tench; Tinca tinca", "goldfish; Carassius auratus"],
            ["tench, Tinca tinca", "goldfish, Carassius auratus"],
            ["v1.5", "v2.0"],
            ["1.5 mm", "2.5 mm"],
            ["cat;", "dog;"],
            ["1", "2"],
            ["1.0", "2.0"],
            ["big;dog", "cat"],
        ],
    )
    def test_names_of_classes(self, labels, tmp_path):
        assert ImageList(listed(tmp_path, labels)).class_names == sorted(labels)

    @pytest.mark.parametrize(("label", "option"), [(0.5, "number"), (["a", "b"], "several"), ("", "several")])
    def test_json_values(self, label, option, tmp_path):
        """Videos, which have no such option, are told nothing of it."""
        file = listed(tmp_path, ["a", label], "a.json")
        with pytest.raises(DataError, match=f"--data.labels {option}"):
            ImageList(file)
        with pytest.raises(DataError, match="needs a class name or an integer as label, found"):
            VideoList(file)

    def test_videos_have_one_class(self, tmp_path):
        with pytest.raises(DataError, match="videos can only be told apart by one class each"):
            VideoList(listed(tmp_path, ["x;y", "x", "y"]))

    def test_folders_are_classes_and_a_note_tells_of_the_option(self, tmp_path):
        write_class_folders(tmp_path, {"0.5": 10, "1": 10})
        data = ImageFolder(tmp_path)
        assert data.class_names == ["0.5", "1"]
        (note,) = data.description()["notes"]
        assert "--data.labels number" in note

    def test_unknown_kind(self, tmp_path):
        with pytest.raises(ConfigurationError, match="there are no labels 'multi'"):
            ImageList(listed(tmp_path, ["a", "b"]), labels="multi")


LABELS = [0] * 50 + [1] * 7 + [2] * 2 + [0] * 4


def sampler(labels=LABELS, seed=3, **options):
    return BalancedSampler(labels, **{"num_replicas": 1, "rank": 0, "seed": seed} | options)


def epoch(sampler, number):
    sampler.set_epoch(number)
    return [index for index, _ in sampler]


class TestBalanced:
    def test_classes_come_equally_often(self):
        """In an epoch to one image, over three epochs of three classes exactly."""
        drawn = sampler()
        assert len(drawn) == len(LABELS) == 63
        epochs = [epoch(drawn, number) for number in range(6)]
        for order in epochs:
            counts = Counter(LABELS[index] for index in order)
            assert len(order) == 63
            assert max(counts.values()) - min(counts.values()) <= 1
        many = Counter(LABELS[index] for order in epochs for index in order)
        assert many == {0: 126, 1: 126, 2: 126}
        # Without balancing the rare class is rare: what is tested here can fail.
        plain = super(BalancedSampler, drawn).order()
        assert Counter(LABELS[index] for index in plain) == {0: 54, 1: 7, 2: 2}

    def test_a_number_of_images_that_classes_do_not_divide(self):
        labels = [0] * 40 + [1] * 9 + [2] * 3 + [3]
        drawn = sampler(labels)
        counts = Counter(labels[index] for number in range(8) for index in epoch(drawn, number))
        assert sum(counts.values()) == 8 * 53
        assert all(abs(Fraction(count) - Fraction(8 * 53, 4)) < 1 for count in counts.values())

    def test_images_of_a_class_come_equally_often(self):
        """Also those of the frequent class, of which an epoch has a part."""
        drawn = sampler()
        counts = Counter(index for number in range(9) for index in epoch(drawn, number))
        for label in range(3):
            of_class = [counts[index] for index in range(63) if LABELS[index] == label]
            assert max(of_class) - min(of_class) <= 1

    def test_the_order_is_a_function_of_seed_and_epoch(self):
        first, again = sampler(), sampler()
        for number in (4, 0, 4):
            assert epoch(first, number) == epoch(again, number)
        assert epoch(first, 4) != epoch(first, 5)
        assert epoch(first, 4) != epoch(sampler(seed=4), 4)
        # The seed chooses which images of the frequent class an epoch has, not their order alone.
        assert set(epoch(first, 4)) != set(epoch(sampler(seed=4), 4))

    def test_an_interrupted_epoch_goes_on_where_it_stopped(self):
        whole, resumed = sampler(), sampler()
        resumed.resume = (2, 20)
        assert epoch(resumed, 2) == epoch(whole, 2)[20:]
        assert epoch(resumed, 3) == epoch(whole, 3)

    def test_several_processes_share_an_epoch(self):
        parts = [sampler(num_replicas=3, rank=rank) for rank in range(3)]
        together = sorted(index for part in parts for index in epoch(part, 1))
        assert together == sorted(epoch(sampler(), 1))

    def test_a_class_of_one_image_among_very_many(self):
        """Linear in the number of images: a second would be far too long."""
        import time

        drawn = sampler([0] * 200_000 + [1])
        drawn.set_epoch(1)
        begin = time.perf_counter()
        order = drawn._drawn()
        assert time.perf_counter() - begin < 5
        assert np.bincount(order == 200_000).tolist() in ([100_000, 100_001], [100_001, 100_000])

    def test_data_module(self, tmp_path):
        write_class_folders(tmp_path / "train", {"a": 12, "b": 3})
        data = ImageFolder(tmp_path, balanced=True, batch_size=5, seed=1)
        data.preprocessing = SMALL
        labels = torch.cat([labels for _, labels in data.train_dataloader()])
        assert sorted(Counter(labels.tolist()).values()) == [7, 8]
        assert data.description()["balanced"] is True
        assert "balanced" not in ImageFolder(tmp_path).description()

    @pytest.mark.parametrize(("kind", "labels"), [("several", ["a;b", "a"]), ("number", ["1", "2"])])
    def test_only_classes_can_be_balanced(self, kind, labels, tmp_path):
        with pytest.raises(ConfigurationError, match="balanced draws images of one class each"):
            ImageList(listed(tmp_path, labels), labels=kind, balanced=True)
