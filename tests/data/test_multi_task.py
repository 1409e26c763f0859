"""Several data sets as one: whose images and labels they are, how they are drawn, and what is refused."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import ImageFolder, Motion, MultiTask
from visionpeft.errors import ConfigurationError, DataError

SIZES = {"a": {"dark": 3, "bright": 3}, "b": {"dark": 7, "grey": 6, "bright": 5}}
LEVEL = {"dark": 0, "grey": 100, "bright": 200}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """For each task, grey images that differ in every split, class and number."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, classes in SIZES.items():
        for offset, split in enumerate(SPLITS):
            for name, count in classes.items():
                for number in range(count if split == "train" else 1):
                    place = folder / task / split / name
                    place.mkdir(parents=True, exist_ok=True)
                    value = LEVEL[name] + 10 * offset + number + (30 if task == "b" else 0)
                    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(place / f"{number}.png")
    return folder


def part(root, name, **options):
    return ImageFolder(root / name, augmentation="none", **options)


def joined(root, **options):
    data = MultiTask({"a": part(root, "a", normalisation="none"), "b": part(root, "b")}, **options)
    data.preprocessing = Preprocessing(input_size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    data.setup()
    return data


def grey(images, mean, std):
    return (255 * (images[:, 0, 0, 0] * std + mean)).round().int().tolist()


def test_labels_count_on_and_images_are_treated_as_their_own_data_says(root):
    data = joined(root, batch_size=4)
    assert data.class_names == ["a/bright", "a/dark", "b/bright", "b/dark", "b/grey"]
    assert data.tasks == {"a": 2, "b": 3}
    images, labels = next(iter(data.test_dataloader()))
    assert labels.tolist() == [0, 1, 2, 3]
    assert grey(images[:2], 0, 1) == [220, 20]  # as they are
    assert grey(images[2:], 0.5, 0.25) == [250, 50]  # as the backbone wants them
    assert [data.sources["test"].name(index).split("/")[-3:-1] for index in (1, 4)] == [
        ["test", "dark"],
        ["test", "grey"],
    ]


def drawn(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [index for index, _ in loader.sampler]


def test_tasks_are_drawn_equally_often(root):
    """24 images, 6 of one task: in an epoch 12 of each, every image of the small one twice; or each image once."""
    data = joined(root, seed=3)
    first = drawn(data, 0)
    tasks = Counter(data.sources["train"].locate(index)[0] for index in first)
    assert tasks == {0: 12, 1: 12}
    assert Counter(index for index in first if index < 6) == dict.fromkeys(range(6), 2)
    assert first != drawn(data, 1)
    assert first == drawn(joined(root, seed=3), 0)
    assert sorted(drawn(joined(root, sampling="proportional"), 0)) == list(range(24))


def test_a_loader_goes_on_where_it_stopped(root):
    whole = [labels.tolist() for _, labels in joined(root, batch_size=8, seed=1).train_dataloader()]
    loader = joined(root, batch_size=8, seed=1).train_dataloader()
    batches = iter(loader)
    assert [next(batches)[1].tolist()] == whole[:1]
    again = joined(root, batch_size=8, seed=1).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [labels.tolist() for _, labels in again] == whole[1:]


def test_the_record_says_what_each_task_is(root):
    record = joined(root).description()
    assert record["sizes"] == {"train": 24, "val": 5, "test": 5}
    assert record["tasks"]["b"]["sizes"] == {"train": 18, "val": 3, "test": 3}
    assert record["tasks"]["a"]["normalisation"]["mean"] == [0, 0, 0]
    assert "normalisation" not in record


def test_selection_on_the_test_is_that_of_every_task(root):
    data = joined(root)
    data.select_on_test()
    assert len(data.sources["val"]) == len(data.sources["test"]) == 5
    assert data.description()["selected_on"] == "test"


def without(root, split):
    data = part(root, "b")
    del data.images.sources[split]
    return data


def test_damaged_images_are_left_out_of_their_task(root, tmp_path):
    for split in SPLITS:
        (tmp_path / split / "dark").mkdir(parents=True)
        (tmp_path / split / "bright").mkdir()
        for name in ("dark", "bright"):
            for number in range(2):
                value = np.full((8, 8, 3), LEVEL[name] + number, np.uint8)
                Image.fromarray(value).save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "train/dark/0.png").write_bytes(b"no image")
    data = MultiTask({"a": ImageFolder(tmp_path, augmentation="none", skip_corrupt=True), "b": part(root, "b")})
    data.setup()
    assert (len(data.sources["train"]), data.skipped["train"]) == (3 + 18, 1)
    assert data.sources["train"].labels.count(1) == 1


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (lambda root: {}, ConfigurationError, "needs at least one data set"),
        (lambda root: {"a b": part(root, "a")}, ConfigurationError, "letters, digits, _ and - alone, unlike 'a b'"),
        (lambda root: {"x": joined(root)}, ConfigurationError, "is a MultiTask itself"),
        (lambda root: {"x": Motion()}, ConfigurationError, "task 'x' holds videos"),
        (lambda root: {"x": object()}, ConfigurationError, "task 'x' is a object, which is no data module of images"),
        (lambda root: {"x": part(root, "a", balanced=True)}, ConfigurationError, "task 'x' sets balanced"),
        (lambda root: {"x": part(root, "a", test_views=3)}, ConfigurationError, "task 'x' sets test_views"),
        (lambda root: {"x": part(root, "a"), "y": without(root, "val")}, DataError, "'y' has no val split, and x has"),
        (lambda root: {"y": without(root, "train")}, DataError, "task 'y' has no train split; give one to all tasks$"),
    ],
)
def test_what_is_no_task_is_refused(root, tasks, error, message):
    with pytest.raises(error, match=message):
        MultiTask(tasks(root))


def test_another_way_of_drawing_is_refused(root):
    with pytest.raises(ConfigurationError, match="unknown sampling 'temperature'"):
        MultiTask({"a": part(root, "a")}, sampling="temperature")


def test_labels_of_another_kind_are_refused(root):
    data = part(root, "a")
    data.images.labels = "number"
    with pytest.raises(ConfigurationError, match="task 'x' has labels 'number'"):
        MultiTask({"x": data})


def test_without_all_validation_splits_there_is_none(root):
    assert [*MultiTask({"x": without(root, "val")}).sources] == ["train", "test"]
