"""Streams: every image in one share, epochs of a known length, exact resuming, and nothing that is run or unpickled."""

import contextlib
import pickle
from pathlib import Path

import lightning
import pytest
import torch
import webdataset
from shards_of_images import CLASSES, SHARDS, png, write_parquet, write_shards, write_tar

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import ImageFolder, StreamedImages
from visionpeft.data.streaming.sources import is_installed
from visionpeft.data.streaming.stream import Encoded
from visionpeft.errors import ConfigurationError, DataError

IMAGES = sum(SHARDS)
GREY = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1 / 255,) * 3)  # pixels as they are


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("table") / "squares")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Process:
    """What a data module asks of a trainer."""

    def __init__(self, world_size, global_rank):
        self.world_size, self.global_rank = world_size, global_rank


def module(place, **options):
    """22 images to train on and the same ones to test, of a folder of shards or of Parquet files."""
    given = {"augmentation": "none", "resize": "squash", "batch_size": 4, "shuffle_buffer": 6} | options
    if list(place.glob("*.parquet")):
        given = {"source": f"hfids/{place}", "root": place.parent / "cache", "test": "train"} | given
    else:
        splits = {"train": f"train-{{0..3}}.tar|{IMAGES}", "test": "train-{0..3}.tar"}
        given = {"source": "wds", "root": place, "class_names": CLASSES} | splits | given
    made = StreamedImages(**given)
    made.preprocessing = GREY
    made.setup()
    return made


def seen(batches):
    """The images of batches, by their grey."""
    return [int(value) for images, _ in batches for value in images[:, 0, 0, 0].round()]


def of_processes(data, processes):
    """The test images of each of several processes."""
    shares = []
    for rank in range(processes):
        data.trainer = Process(processes, rank)
        shares.append(seen(data.test_dataloader()))
    data.trainer = None
    return shares


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_every_image_is_measured_once(request, kind):
    """Of one, two and four processes each has shards of its own; of three each has every third image of all."""
    data = module(request.getfixturevalue(kind))
    for processes in (1, 2, 3, 4):
        shares = of_processes(data, processes)
        assert sorted(image for share in shares for image in share) == list(range(IMAGES))
        assert all(shares)
    assert data.description()["sizes"] == {"train": IMAGES, "test": IMAGES}  # found out by the pass of one process


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "table"])
def test_every_image_is_measured_once_by_workers(request, kind):
    data = module(request.getfixturevalue(kind), num_workers=2)
    for processes in (2, 3):
        shares = of_processes(data, processes)
        assert sorted(image for share in shares for image in share) == list(range(IMAGES))
    (images, labels), *_ = data.test_dataloader()
    assert labels.tolist() == [image % 3 for image in seen([(images, labels)])]


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_an_epoch(request, kind):
    """One device sees each image once, in another order in each epoch and for each seed, the same one again."""
    data = module(request.getfixturevalue(kind), seed=0)
    loader = data.train_loader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 4, 4, 4, 2]
        orders.append(seen(batches))
    assert len(loader) == 6
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert orders[0] != list(range(IMAGES))
    assert seen(module(request.getfixturevalue(kind), seed=1).train_loader()) not in orders
    whole = module(request.getfixturevalue(kind), drop_last=True).train_loader()
    assert [len(labels) for _, labels in whole] == [4] * len(whole) == [4] * 5


def test_devices_take_equally_many_steps(shards):
    """With shards of 7, 5 and 6 images each of three devices takes 6; the one with 5 goes on with the next share."""
    data = module(shards, train="train-{0..2}.tar|18", seed=0)  # with others the next share may be the same one
    epochs = [list(data.train_loader(3, rank)) for rank in range(3)]
    assert [len(batches) for batches in epochs] == [2, 2, 2]
    orders = [seen(batches) for batches in epochs]
    assert [len(order) for order in orders] == [6, 6, 6]
    assert len({image for order in orders for image in order}) in (17, 18)  # of the seven, one was not reached
    assert all(len(set(order)) == 6 for order in orders)


@pytest.mark.parametrize(("kind", "of"), [("shards", (1, 0)), ("shards", (2, 1)), ("table", (2, 1))])
def test_resuming_in_the_middle_of_an_epoch(request, kind, of, monkeypatch):
    """The rest is that of the uninterrupted epoch, augmentation and all, and what was seen is not decoded again."""
    data = module(request.getfixturevalue(kind), augmentation="crop_flip", seed=3)
    whole = data.train_loader(*of)
    whole.sampler.set_epoch(5)
    batches = list(whole)
    begun = data.train_loader(*of)
    begun.sampler.set_epoch(5)
    reading = iter(begun)
    next(reading), next(reading)
    state = begun.state_dict()
    share = IMAGES // of[0]
    assert state == {"epoch": 5, "images": 8, "of": share, "processes": of[0], "workers": 0, "batch_size": 4}

    decoded = []
    decode = Encoded.decode
    monkeypatch.setattr(Encoded, "decode", lambda sample: decoded.append(sample) or decode(sample))
    resumed = data.train_loader(*of)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(5)
    rest = list(resumed)
    assert of[0] > 1 or len(decoded) == share - 8
    for (images, labels), (others, other_labels) in zip(rest, batches[2:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    resumed.sampler.set_epoch(6)
    assert sum(len(labels) for _, labels in resumed) == share  # the next epoch is a whole one
    again = data.train_loader(*of)  # the negative control
    again.sampler.set_epoch(5)
    assert not torch.equal(next(iter(again))[0][:3], rest[0][0][:3])


class Recorder(lightning.LightningModule):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, seen([batch])))
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(place, folder, steps=-1, resume=None):
    """Two epochs of six steps, or as many as are asked for, with a checkpoint after each."""
    recorder = Recorder()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, max_steps=steps, callbacks=[checkpoint], **quiet)
    trainer.fit(recorder, module(place), ckpt_path=resume)
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "steps"), [("shards", 6), ("shards", 8), ("table", 8)])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(request, tmp_path, kind, steps):
    """At the end of an epoch, and in the middle of one."""
    place = request.getfixturevalue(kind)
    whole = train(place, tmp_path / "whole")
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6
    begun = train(place, tmp_path / "begun", steps)
    assert begun == whole[:steps]
    (saved,) = (tmp_path / "begun").glob(f"*step={steps}.ckpt")
    assert train(place, tmp_path / "rest", resume=saved) == whole[steps:]


def test_resuming_with_another_number_of_devices(shards):
    """Not in the middle of an epoch; at its end any number goes on."""
    data = module(shards)
    begun = data.train_loader(2, 1)
    next(iter(begun))
    state = begun.state_dict()
    with pytest.raises(ConfigurationError, match=r"middle of epoch 1 of a stream .* --trainer.devices 2; resume with"):
        data.train_loader(1, 0).load_state_dict(state)
    finished = data.train_loader(1, 0)
    finished.load_state_dict(state | {"images": state["of"]})
    assert list(finished) == []
    finished.sampler.set_epoch(1)
    assert sorted(seen(finished)) == list(range(IMAGES))


@pytest.mark.slow
def test_resuming_with_workers(shards):
    data = module(shards, num_workers=2)
    batches = seen(data.train_loader())
    begun = data.train_loader()
    reading = iter(begun)
    first = [next(reading) for _ in range(3)]
    resumed = data.train_loader()
    resumed.load_state_dict(begun.state_dict())
    assert seen(first) + seen(resumed) == batches


def test_images_are_those_of_a_folder(tmp_path):
    """Streams, tables and tar files give the very tensors that `ImageFolder` gives of the same files."""
    write_shards(tmp_path / "shards", (9,))
    write_parquet(tmp_path / "table", (9,))
    files = {f"{CLASSES[index % 3]}/{index}.png": png(index) for index in range(9)}
    for name, content in files.items():
        path = tmp_path / "photos" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_tar(tmp_path / "tars" / "train.tar", files)
    for name in CLASSES:
        one = {Path(path).name: content for path, content in files.items() if path.startswith(name)}
        write_tar(tmp_path / "by_class" / "train" / f"{name}.tar", one)

    options = {"resize": "crop", "batch_size": 9, "augmentation": "none"}
    wanted = Preprocessing((6, 6), (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), crop_pct=0.8)
    folder = ImageFolder(tmp_path / "photos", **options)
    folder.preprocessing = wanted
    ((expected, labels),) = folder.train_dataloader()
    order = expected.flatten(1)[:, 0].argsort()
    sources = {
        "wds": {"root": tmp_path / "shards", "train": "train-0.tar|9", "class_names": CLASSES},
        f"hfids/{tmp_path / 'table'}": {"root": tmp_path / "cache"},
        f"hfds/{tmp_path / 'table'}": {"root": tmp_path / "cache"},
        "folder": {"root": tmp_path / "photos"},
        "tar": {"root": tmp_path / "tars"},
        "tar ": {"root": tmp_path / "by_class"},
    }
    for source, given in sources.items():
        data = StreamedImages(source.strip(), **given, **options)
        data.preprocessing = wanted
        data.setup()
        assert data.class_names == CLASSES
        ((images, found),) = data.train_dataloader()
        own = images.flatten(1)[:, 0].argsort()
        assert torch.equal(images[own], expected[order]), source
        assert found[own].tolist() == labels[order].tolist() == [0, 1, 2] * 3


def test_an_address_that_is_not_local(shards):
    """A file system that fsspec knows; here the one in memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/far/{path.name}", path.read_bytes())
    splits = f'{{"train": {{"filenames": ["train-0.tar", "train-2.tar"], "num_samples": {SHARDS[0] + SHARDS[2]}}}}}'
    memory.pipe("/far/_info.json", f'{{"splits": {splits}}}'.encode())
    data = module(shards, root="memory://far", train="train", test="train-{1..1}.tar")
    assert data.description()["sizes"] == {"train": 13, "test": None}
    assert seen(data.test_dataloader()) == list(range(7, 12))
    assert sorted(seen(data.train_loader())) == [*range(7), *range(12, 18)]
    memory.rm("/far/train-2.tar")
    with pytest.raises(DataError, match=r"shard memory://far/train-2.tar does not exist"):
        list(data.train_loader())
    whole = memory.cat("/far/train-1.tar")
    memory.pipe("/far/train-2.tar", whole[:1700])
    with pytest.raises(DataError, match=r"shard memory://far/train-2.tar cannot be read .*; fetch it again"):
        list(data.train_loader())


class Opened:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled(tmp_path):
    """What lies beside the images of a shard is not looked at; the decoders of webdataset, the control, run it."""
    harm = pickle.dumps(Opened(tmp_path / "harm"))
    files = {}
    for index in range(4):
        files |= {f"{index}.png": png(index), f"{index}.cls": b"1", f"{index}.pyd": harm, f"{index}.pkl": harm}
    shard = write_tar(tmp_path / "train-0.tar", files)
    data = module(tmp_path, train="train-0.tar|4", test="train-0.tar")
    assert seen(data.test_dataloader()) == [0, 1, 2, 3]
    assert sorted(seen(data.train_loader())) == [0, 1, 2, 3]
    assert not (tmp_path / "harm").exists()
    with contextlib.suppress(webdataset.autodecode.DecodingError):  # an open file is no sample
        next(iter(webdataset.WebDataset(str(shard), shardshuffle=False).decode()))
    assert (tmp_path / "harm").exists()


def test_labels_of_shards(tmp_path):
    """A name in place of a number, a field of the `.json` file, and a text file of class names."""
    files = {f"{index}.png": png(index) for index in range(3)}
    by_name = {f"{index}.cls": CLASSES[index].encode() + b"\n" for index in range(3)}
    fields = {f"{index}.json": f'{{"kind": {2 - index}}}'.encode() for index in range(3)}
    files = dict(sorted((files | by_name | fields).items()))
    write_tar(tmp_path / "train-0.tar", files)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    given = {"train": "train-0.tar|3", "test": "train-*.tar", "class_names": str(tmp_path / "classes.txt")}
    for options, expected in (({}, [0, 1, 2]), ({"label_key": "kind"}, [2, 1, 0])):
        data = module(tmp_path, **given, **options)
        assert data.class_names == CLASSES
        ((_, labels),) = data.test_dataloader()
        assert labels.tolist() == expected


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def damage(folder, case):
    """Make a folder of shards as they should not be, and say what is asked of it."""
    write_shards(folder)
    two = {"train": "train-{0..1}.tar|12", "test": None}
    if case == "missing":
        return {"train": "train-{0..4}.tar|30"}
    if case == "cut":
        cut(folder / "train-1.tar", 3000)
    elif case == "cut between two images":  # tarfile takes that to be the end
        cut(folder / "train-1.tar", 4 * 1024)
    elif case == "no tar file":
        (folder / "train-1.tar").write_bytes(b"\0" * 1023)
    elif case == "without labels":
        write_tar(folder / "train-0.tar", {"0.png": png(1)})
    elif case == "without images":
        write_tar(folder / "train-0.tar", {"0.cls": b"1", "1.cls": b"2"})
    elif case == "empty":
        write_tar(folder / "train-0.tar", {"readme": b"nothing"})
        return {"train": "train-0.tar|7", "test": None}
    elif case == "beyond the classes":
        return two | {"class_names": ["blue"]} | {"class_names": ["blue", "green"], "train": "train-*.tar|22"}
    elif case == "damaged image":
        write_tar(folder / "train-0.tar", {"0.png": png(1)[:45], "0.cls": b"1"})
    elif case == "label that is none":
        write_tar(folder / "train-0.tar", {"0.png": png(1), "0.cls": b""})
    elif case == "no field":
        write_tar(folder / "train-0.tar", {"0.png": png(1), "0.json": b'{"labels": 1}'})
        return two | {"label_key": "label"}
    elif case == "no json":
        write_tar(folder / "train-0.tar", {"0.png": png(1), "0.json": b"{"})
        return two | {"label_key": "label"}
    return two


BROKEN = {
    "missing": "train-4.tar does not exist",
    "cut": "train-1.tar is cut or no tar file",
    "cut between two images": "train-1.tar is cut or no tar file",
    "no tar file": "train-1.tar is cut or no tar file",
    "without labels": "image '0' in shard .* has no label: there is no .cls file beside it",
    "without images": "'0' in shard .* has no image with one of the endings jpg, jpeg, png, webp",
    "empty": "holds no image with one of the endings",
    "damaged image": "image '0' in shard .* cannot be read",
    "label that is none": "'0' in shard .* needs a class name or an integer as label",
    "no field": "has no field 'label'; did you mean labels",
    "no json": "the .json file of image '0' .* cannot be read",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_shards_are_refused_before_training(tmp_path, case):
    given = damage(tmp_path, case)
    with pytest.raises(DataError, match=BROKEN[case]) as error:
        module(tmp_path, **given)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_further_on_stops_the_run(tmp_path, workers):
    """A label beyond the classes; in a worker, too, it is one sentence."""
    data = module(tmp_path, **damage(tmp_path, "beyond the classes"), num_workers=workers)
    with pytest.raises(DataError, match=r"label '2' is out of range; class_names allows 0 to 1$"):
        list(data.train_loader())


def test_numbers_that_are_wrong(shards):
    with pytest.raises(DataError, match="train split is said to hold 23 images, but there are 22"):
        list(module(shards, train="train-{0..3}.tar|23").train_loader())
    few = module(shards, train="train-{0..3}.tar|9").train_loader()
    assert len(set(seen(few))) == 9  # a part of what there is, another one in each epoch
    data = module(shards, num_samples={"test": 21})
    with pytest.raises(DataError, match="test split is said to hold 21 images, but 22 were read"):
        list(data.test_dataloader())
    data = module(shards, test="train-0.tar", num_workers=0)
    assert len(of_processes(data, 7)[0]) == 1
    with pytest.raises(DataError, match="the test split holds no images for device 8 of 8; use fewer devices"):
        of_processes(data, 8)


REFUSED = {
    "no source": ({"source": "wbs"}, "there is no source 'wbs'; did you mean wds?"),
    "no name": ({"source": "hfds"}, "written hfds/NAME"),
    "too many names": ({"source": "wds/shards"}, "written wds; where it lies is --data.root"),
    "no class names": ({"class_names": None}, "--data.class_names classes.txt"),
    "no number": ({"train": "train-{0..3}.tar"}, "--data.num_samples '{train: 50000}'"),
    "number of no split": ({"num_samples": {"val": 3}}, "num_samples names 'val'; it can be"),
    "number of none": ({"num_samples": {"train": 0}}, "must be 1 or more"),
    "no number after the bar": ({"train": "train-{0..3}.tar|many"}, "after the bar stands the number"),
    "no such split": ({"train": "training"}, "there is no split 'training'"),
    "no such shards": ({"train": "other-*.tar|3"}, "matches other-"),
    "a command": ({"train": "pipe:cat train-0.tar|7"}, "is a command, which is not run"),
    "no split": ({"train": None, "test": None}, "name a split"),
    "subset": ({"test_samples": 3}, "test_samples takes a fixed subset"),
    "skipping": ({"skip_corrupt": True}, "skip_corrupt opens every image"),
    "balanced": ({"balanced": True}, "balanced draws images by their labels"),
    "views": ({"views": 2}, "views shows an image again"),
    "several labels": ({"labels": "several"}, "labels 'several' are not read from streams"),
    "buffer": ({"shuffle_buffer": 0}, "shuffle_buffer 0 must be 1 or more"),
    "one class": ({"class_names": ["blue"]}, "at least two classes"),
    "the same class": ({"class_names": ["blue", "blue"]}, "'blue' more than once"),
    "no file of class names": ({"class_names": "nowhere.txt"}, "cannot read the list nowhere.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stream_cannot_take(shards, case):
    given, words = REFUSED[case]
    with pytest.raises((ConfigurationError, DataError)) as error:
        module(shards, **given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"splits": {"train": {"filenames": ["../train-0.tar"]}}}', "'../train-0.tar' does not lie beside it"),
        ('{"splits": {"train": {"filenames": ["pipe:touch x"]}}}', "does not lie beside it"),
        ('{"splits": {"train": {"filenames": ["/etc/passwd"]}}}', "does not lie beside it"),
        ('{"splits": {"train": {}}}', "does not say which files"),
        ('{"splits": {"train": {"filenames": []}}}', "names no file"),
        ('{"splits": {"test": {"filenames": ["train-0.tar"]}}}', "describes no split 'train'; it can be test"),
        ("[]", "does not describe splits"),
    ],
)
def test_a_description_that_may_come_from_anywhere(tmp_path, content, words):
    write_shards(tmp_path)
    (tmp_path / "_info.json").write_text(content)
    with pytest.raises(DataError, match=words):
        module(tmp_path, train="train", test=None)


def test_a_library_that_is_not_installed(shards, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(ConfigurationError, match=r"the package webdataset, .* pip install 'visionpeft\[streaming\]'"):
        module(shards)


def test_a_folder_is_no_library(tmp_path, monkeypatch):
    """Python takes it for a package without content: `datasets/` in the working directory, where the library is not."""
    (tmp_path / "folder_of_images").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert __import__("folder_of_images")
    assert not is_installed("folder_of_images")
    assert is_installed("datasets")


def test_several_views_of_test_images(shards):
    data = module(shards, test_views=3)
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 3, 8, 8)


def test_what_needs_all_images_before_training(shards):
    data = module(shards)
    assert data.deterministic_views is None
    assert data.sources["train"].labels is not None  # nobody has asked for one yet
    with pytest.raises(ConfigurationError, match="nothing can be balanced by them"):
        list(data.sources["train"].labels)
    with pytest.raises(ConfigurationError, match="needs images that can be looked up"):
        data.dataset("train")


TABLES = {
    "no such split": ({"train": "training"}, "has no split 'training'; did you mean train"),
    "no such column": ({"image_key": "picture"}, "has no column 'picture' of images; it has image, label"),
    "no labels": ({"label_key": "labels"}, "has no column 'labels' of labels"),
    "other class names": ({"class_names": ["a", "b"]}, "class_names has 2 names, but .* has 3 classes"),
    "not there": ({"source": "hfids/nowhere"}, "the data set nowhere cannot be opened"),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("kind", ["hfids", "hfds"])
def test_tables_that_cannot_be_used(table, case, kind):
    given, words = TABLES[case]
    given = {"source": f"{kind}/{table}"} | {
        key: value.replace("hfids", kind) if key == "source" else value for key, value in given.items()
    }
    with pytest.raises((DataError, ConfigurationError), match=words) as error:
        module(table, **given)
    assert "\n" not in str(error.value)


def test_labels_that_are_kept_secret(tmp_path):
    """As in the test splits of many a competition: -1."""
    table = write_parquet(tmp_path / "table", (3,), labels=-1)
    with pytest.raises(DataError, match="label '-1' is out of range; class_names allows 0 to 2"):
        module(table)
    with pytest.raises(DataError, match="has no labels in its split 'train', as where they are kept secret"):
        module(table, source=f"hfds/{table}", test=None)


def test_a_table_that_is_cut(tmp_path):
    table = write_parquet(tmp_path / "table")
    cut(table / "train-00002-of-00004.parquet", 400)
    for kind in ("hfids", "hfds"):
        with pytest.raises(DataError, match=r"split 'train' of the data set .* cannot be") as error:
            module(table, source=f"{kind}/{table}")
        assert "\n" not in str(error.value)


def test_a_table_of_shards_is_not_decoded_by_its_endings(shards, tmp_path):
    with pytest.raises(DataError, match=r"read them by --data.source wds"):
        StreamedImages(f"hfids/{shards}", root=tmp_path)
