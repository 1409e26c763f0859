"""Images are known by where they come from while that says all about them, and by their pixels otherwise."""

import os
import pickle
import time
from dataclasses import replace

import pytest
import torch
from data_layouts import SMALL, write_class_folders
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from reference.hosts import vit
from small_runs import draw_images, results, run

import visionpeft as vp
from visionpeft.caching import content_cache
from visionpeft.caching.content_cache import ContentCache, FolderCache
from visionpeft.caching.named_images import Batch, names_of
from visionpeft.caching.trunk import CachedTrunk
from visionpeft.data import ImageFolder
from visionpeft.data.records import ImageFiles
from visionpeft.data.transforms import ImageTransform

TICK = 0.05  # after which the time of a file tells whether it was written to again


@pytest.fixture
def folder(tmp_path):
    write_class_folders(tmp_path / "images" / "train", {"a": 4, "b": 4})
    time.sleep(TICK)
    return tmp_path / "images"


@pytest.fixture
def hashed(monkeypatch):
    """How many images were read to know them."""
    seen = []
    original = content_cache.contents
    monkeypatch.setattr(content_cache, "contents", lambda images: seen.append(len(images)) or original(images))
    return seen


def module(root, preprocessing=SMALL, **options):
    data = ImageFolder(
        root, **{"batch_size": 8, "seed": 5, "cache_in_memory": False, "augmentation": "none", **options}
    )
    data.preprocessing = preprocessing
    data.setup()
    return data


def named(data, epoch=0, processes=1, rank=0):
    """Name and pixels of each image of an epoch."""
    loader = data.train_loader(processes, rank)
    loader.sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        images, _ = move_data_to_device(batch, torch.device("cpu"))
        found |= dict(zip(names_of(images), images, strict=True))
    return found


def means(images):
    """Rows that tell what they were computed of."""
    return images.double().mean((2, 3))


def batch_of(data, epoch=0):
    loader = data.train_loader()
    loader.sampler.set_epoch(epoch)
    return next(iter(loader))


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_named_images_are_not_read_again(folder, hashed, tmp_path, kind):
    cache = ContentCache() if kind == "memory" else FolderCache(tmp_path / "kept")
    data, computed = module(folder), []

    def compute(images):
        computed.append(len(images))
        return means(images)

    for epoch in range(3):
        images, _ = batch_of(data, epoch)
        assert torch.equal(cache.rows("source", images, compute), means(images))
    assert computed == [8]
    assert hashed == ([] if kind == "memory" else [8])  # rows on disk outlive the process, and names do not
    images = images.clone()  # which nobody has named
    cache.rows("source", images, compute)
    assert computed == ([8, 8] if kind == "memory" else [8])
    assert hashed == ([8] if kind == "memory" else [8, 8])


@pytest.mark.parametrize("kept", [False, True])
def test_a_changed_file_is_another_image(folder, kept):
    """Also if the time of its last writing is as before; one that is kept in memory is still the old."""
    data = module(folder, cache_in_memory=kept)
    dataset, cache = data.dataset("train"), ContentCache()
    keys = [*range(8)]
    before, _ = dataset.__getitems__(keys)
    cache.rows("source", before, means)
    file = dataset.source.paths[3]
    status = file.stat()
    Image.open(file).rotate(180).save(rotated := file.with_name("rotated.png"))
    file.write_bytes(rotated.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    time.sleep(TICK)
    after, _ = dataset.__getitems__(keys)
    differing = [one != other for one, other in zip(names_of(before), names_of(after), strict=True)]
    assert differing == [index == 3 and not kept for index in keys]
    assert torch.equal(cache.rows("source", after, means), means(after))
    assert torch.equal(after, before) == kept
    anew, _ = module(folder).dataset("train").__getitems__(keys)
    assert torch.equal(cache.rows("source", anew, means), means(anew))


def test_a_file_just_written_has_no_name(folder, monkeypatch):
    """It could be written once more before the clock of the file system ticks."""
    dataset = module(folder).dataset("train")
    assert dataset.source.stamp(0) is not None
    changed = dataset.source.paths[0].stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed + 10**6)
    assert dataset.source.stamp(0) is None
    assert type(dataset.__getitems__([0, 1])) is tuple


def test_augmentation_is_in_the_name(folder):
    """Fixed views come round again and are the same; anew drawn ones never do; no augmentation is one view."""
    for options, same in (
        ({"augmentation": "none"}, [(0, 1), (0, 2)]),
        ({"augmentation": "crop_flip", "views": 2}, [(0, 2)]),
        ({"augmentation": "random_resized_crop"}, []),
    ):
        data = module(folder, **options)
        epochs = [named(data, epoch) for epoch in range(3)]
        assert all(len(epoch) == 8 for epoch in epochs)
        for pair in ((0, 1), (0, 2), (1, 2)):
            first, second = (epochs[index] for index in pair)
            common = first.keys() & second.keys()
            expected = pair in same or (pair == (1, 2) and options["augmentation"] == "none")
            assert len(common) == (8 if expected else 0)
            assert all(torch.equal(first[name], second[name]) for name in common)


def test_treatment_and_seed_are_in_the_name(folder):
    plain = named(module(folder)).keys()
    assert named(module(folder)).keys() == plain  # another data module that does the same
    for options in ({"normalisation": "imagenet"}, {"resize": "squash"}, {"augmentation": "crop_flip", "views": 1}):
        assert not named(module(folder, **options)).keys() & plain
    drawn = {"augmentation": "random_resized_crop", "views": 1}
    first = named(module(folder, **drawn)).keys()
    assert not named(module(folder, seed=6, **drawn)).keys() & first
    assert not named(module(folder, crop_area=(0.5, 1.0), **drawn)).keys() & first


def test_processes_and_workers_name_alike(folder):
    """Each of two devices has its share of the names, and what a worker sends keeps them."""
    alone = named(module(folder, batch_size=2))
    shares = [named(module(folder, batch_size=2, num_workers=rank), 0, 2, rank) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 4
    together = shares[0] | shares[1]
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], image) for name, image in alone.items())


def test_whoever_changes_images_takes_their_names(folder, hashed):
    """A hook may put augmentation of its own between the data and the model, or write into the batch."""
    cache, data = ContentCache(), module(folder)

    def rows(images):
        assert torch.equal(cache.rows("source", images, means), means(images))

    for inference in (False, True):
        with torch.inference_mode(inference):
            batch = batch_of(data)
            rows(batch.to("cpu")[0])
            assert hashed == []
            rows(batch[0] * 2)
            rows(batch[0].flip(3))
            changed = Batch((batch[0] * 3, batch[1]))  # as Lightning makes another precision of it
            rows(changed.to("cpu")[0])
            batch[0][2].add_(1)
            rows(batch[0])
            rows(batch.to("cpu")[0])  # its names are not renewed on the way to a device
            moved = batch_of(data).to("cpu")[0]
            moved.mul_(0.5)
            rows(moved)
            assert len(hashed) == 6
            hashed.clear()


def test_classes_that_may_do_something_else_have_no_names(folder, hashed):
    class Random(ImageTransform):
        def augment(self, image, *seeds):
            return image + torch.randint(9, image.shape, dtype=torch.uint8)

    class Made(ImageFiles):
        def image(self, index):
            return super().image(index).rotate(90 * len(hashed))

    dataset = module(folder).dataset("train")
    plain = dataset.source, dataset.transform
    assert isinstance(dataset.__getitems__([0, 1]), Batch)
    for source, transform in ((plain[0], Random(SMALL)), (Made(plain[0].paths, plain[0].labels), plain[1])):
        dataset.source, dataset.transform = source, transform
        assert type(dataset.__getitems__([0, 1])) is tuple


def test_a_batch_is_a_pair(folder):
    batch = batch_of(module(folder))
    images, labels = batch
    assert labels.tolist() == pickle.loads(pickle.dumps(batch))[1].tolist()
    assert names_of(pickle.loads(pickle.dumps(batch))[0]) == names_of(images)
    assert names_of(pickle.loads(pickle.dumps(images))) is None
    lower = move_data_to_device([batch, images], torch.device("cpu"))
    assert names_of(lower[0][0]) == names_of(images)


def test_a_cached_trunk_finds_images_by_their_names(folder, hashed):
    torch.manual_seed(0)
    model = vp.attach(vit(), vp.LoRA(2, blocks="last:1")).eval()
    data = module(folder, replace(SMALL, input_size=(32, 32)))
    cache = CachedTrunk(model, ContentCache())
    for epoch in range(2):
        images, _ = batch_of(data, epoch)
        torch.testing.assert_close(cache(images), model(images.clone()), atol=1e-6, rtol=1e-5)
    assert hashed == []


def test_a_run_reads_no_image_to_know_it(tmp_path, hashed):
    """Nor in its validation, which Lightning runs in inference mode; and it learns the same."""
    images = draw_images(tmp_path / "images")
    options = ("--model.method.init_args.blocks", "last:1", "--data.val_fraction", "0.2", "--data.augmentation", "none")
    plain = run(tmp_path / "plain", images, *options, epochs=2)
    cached = run(tmp_path / "cached", images, *options, "--model.cache", "memory", epochs=2)
    assert hashed == []
    assert results(cached)["test"] == pytest.approx(results(plain)["test"], abs=1e-5)
