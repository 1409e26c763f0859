"""Images that readers of timm, datasets and torchvision find, and that can be looked up."""

import struct

import numpy as np
import pytest
import torch
from shards_of_images import CLASSES, png, write_parquet, write_tar

import datasets
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import StreamedImages
from visionpeft.errors import ConfigurationError, DataError


def files_of(split, classes, number=2):
    return {f"{name}/{split}{each}.png": png(10 * each) for name in classes for each in range(number)}


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def by_class(data, split):
    """The class of each image of a split by the folder that it lies in."""
    source = data.sources[split]
    return {(source.name(index).split("/")[-2], data.class_names[label]) for index, label in enumerate(source.labels)}


def test_a_split_without_some_class(tmp_path):
    """timm numbers the classes of each split for itself; here a name is the same class in all."""
    from timm.data.readers import create_reader

    for split, classes in (("train", CLASSES), ("val", CLASSES[1:])):
        write_files(tmp_path / "photos" / split, files_of(split, classes))
        write_tar(tmp_path / "tars" / f"{split}.tar", files_of(split, classes))
    for source, folder in (("folder", "photos"), ("tar", "tars")):
        data = StreamedImages(source, root=tmp_path / folder, val="val")
        assert data.class_names == CLASSES
        assert by_class(data, "val") == {("green", "green"), ("red", "red")}
        assert by_class(data, "train") == {(name, name) for name in CLASSES}
    numbered = create_reader("", root=str(tmp_path / "photos" / "val")).class_to_idx  # the negative control
    assert numbered == {"green": 0, "red": 1}


def test_tar_files_in_a_tar_file(tmp_path):
    for name in CLASSES[:2]:
        write_tar(tmp_path / "inner" / f"{name}.tar", {f"{each}.png": png(10 * each + 1) for each in range(3)})
    inner = {path.name: path.read_bytes() for path in sorted((tmp_path / "inner").iterdir())}
    write_tar(tmp_path / "train.tar", inner)
    source = StreamedImages("tar", root=tmp_path).sources["train"]
    assert sorted(source.labels) == [0, 0, 0, 1, 1, 1]
    assert sorted(source.image(index).getpixel((0, 0))[0] for index in range(6)) == [1, 1, 11, 11, 21, 21]


def test_splits_and_files_that_are_not_there(tmp_path):
    write_files(tmp_path / "photos" / "train", files_of("train", CLASSES))
    with pytest.raises(DataError, match="has no split 'training'; did you mean train"):
        StreamedImages("folder", root=tmp_path / "photos", train="training")
    with pytest.raises(DataError, match="nowhere does not exist"):
        StreamedImages("folder", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"set --data.root"):
        StreamedImages("folder")
    with pytest.raises(DataError, match="neither a tar file nor a folder of tar files"):
        StreamedImages("tar", root=tmp_path / "photos")
    with pytest.raises(ConfigurationError, match="knows how many images it has"):
        StreamedImages("folder", root=tmp_path / "photos", num_samples={"train": 6})
    tar = write_tar(tmp_path / "tars" / "train.tar", files_of("train", CLASSES))
    tar.write_bytes(tar.read_bytes()[:2500])
    with pytest.raises(DataError, match="is cut or no tar file"):
        StreamedImages("tar", root=tmp_path / "tars")
    write_tar(tar, {"readme": b""})
    with pytest.raises(DataError, match="holds no tar files of images"):
        StreamedImages("tar", root=tmp_path / "tars")


def test_a_damaged_image_is_refused_or_left_out(tmp_path):
    """timm's data set would take the next image, and its label, in the place of it."""
    files = files_of("train", CLASSES)
    files["red/train0.png"] = files["red/train0.png"][:45]
    write_tar(tmp_path / "train.tar", files)
    data = StreamedImages("tar", root=tmp_path, skip_corrupt=True, batch_size=8)
    data.setup()
    assert data.description()["sizes"] == {"train": 5}
    assert data.description()["skipped_images"] == {"train": 1}
    data = StreamedImages("tar", root=tmp_path, batch_size=8)
    data.preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=r"image .*train.tar/red/train0.png cannot be read .*skip_corrupt"):
        list(data.train_dataloader())


def write_table(folder, feature, labels):
    features = datasets.Features({"picture": datasets.Image(), "target": feature})
    rows = [{"picture": {"bytes": png(value), "path": None}, "target": label} for value, label in enumerate(labels)]
    folder.mkdir()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    keys = {"image_key": "picture", "label_key": "target"}
    return {"source": f"hfds/{folder}", "root": folder.parent / "cache", **keys}


def test_several_labels_and_numbers(tmp_path):
    several = datasets.List(datasets.ClassLabel(names=CLASSES))
    data = StreamedImages(**write_table(tmp_path / "several", several, [[0, 2], [], [1]]), labels="several")
    assert data.class_names == CLASSES
    assert data.sources["train"].labels == [(0, 2), (), (1,)]
    data = StreamedImages(**write_table(tmp_path / "numbers", datasets.Value("float32"), [0.5, 1.0]), labels="number")
    assert data.sources["train"].labels == [0.5, 1.0]
    with pytest.raises(DataError, match=r"needs a class name or an integer as label .*--data.labels number"):
        StreamedImages(**write_table(tmp_path / "as_classes", datasets.Value("float32"), [0.5, 1.0]))
    data = StreamedImages(**write_table(tmp_path / "names", datasets.Value("string"), ["cat", "ant", "cat"]))
    assert data.class_names == ["ant", "cat"]
    assert data.sources["train"].labels == [1, 0, 1]
    with pytest.raises(DataError, match=r"row 1 of .* needs a class name or an integer as label"):
        StreamedImages(**write_table(tmp_path / "gap", datasets.Value("string"), ["cat", None, "dog"]))


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
@pytest.mark.parametrize(
    ("feature", "told"),
    [(datasets.List(datasets.Image()), "has a list of images"), ({"front": datasets.Image()}, "is a group of front")],
    ids=["list", "group"],
)
def test_a_column_of_several_images_is_refused(kind, feature, told, tmp_path):
    """It was "data type '|O2' not understood", or that a file is cut or damaged."""
    features = datasets.Features({"picture": feature, "target": datasets.ClassLabel(names=CLASSES)})
    images = [{"bytes": png(value), "path": None} for value in range(3)]
    rows = [
        {"picture": {"front": image} if isinstance(feature, dict) else [image], "target": label}
        for label, image in enumerate(images)
    ]
    (tmp_path / "set").mkdir()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=told):
        StreamedImages(f"{kind}/{tmp_path / 'set'}", root=tmp_path / "cache", image_key="picture", label_key="target")


def test_a_part_of_a_table(tmp_path):
    table = write_parquet(tmp_path / "squares")
    data = StreamedImages(f"hfds/{table}", root=tmp_path / "cache", train="train[:12]", test="train[12:]")
    assert data.description()["sizes"] == {"train": 12, "test": 10}
    assert data.sources["test"].image(0).getpixel((0, 0)) == (12, 12, 12)
    subset = StreamedImages(f"hfds/{table}", root=tmp_path / "cache", train="train[:12]", test="train", test_samples=5)
    test = subset.sources["test"]
    assert [test.image(index).getpixel((0, 0))[0] % 3 for index in range(5)] == test.labels


def write_mnist(root, split, number):
    """Files as torchvision reads them: image n is grey n and the digit n modulo 10."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.repeat(np.arange(number, dtype=np.uint8), 28 * 28)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, number, 28, 28) + pixels.tobytes())
    labels = (np.arange(number) % 10).astype(np.uint8)
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, number) + labels.tobytes())


def test_digits(tmp_path):
    write_mnist(tmp_path, "train", 20)
    write_mnist(tmp_path, "t10k", 10)
    data = StreamedImages("torch/mnist", root=tmp_path, test="test", augmentation="none", batch_size=10)
    data.preprocessing = Preprocessing((28, 28), (0.0,) * 3, (1 / 255,) * 3)
    data.setup()
    assert data.class_names[:2] == ["0 - zero", "1 - one"]
    ((images, labels),) = data.test_dataloader()
    assert torch.equal(images[:, 0, 0, 0].round().long(), labels)
    assert images.shape == (10, 3, 28, 28)
    with pytest.raises(DataError, match="torch/mnist has no split 'validate'"):
        StreamedImages("torch/mnist", root=tmp_path, test="validate")
    with pytest.raises(DataError, match=r"does not find mnist in .*let it download"):
        StreamedImages("torch/mnist", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="its files are pickles, which are not read; use hfds/uoft-cs/cifar10"):
        StreamedImages("torch/cifar10", root=tmp_path)
    with pytest.raises(DataError, match="one of files is read by ImageFolder"):
        StreamedImages("torch/imagenet", root=tmp_path)
