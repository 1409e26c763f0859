"""What all data sets share: batches, order and resuming, caching, test subset, damaged images, the written record."""

import json
from itertools import pairwise

import lightning
import numpy as np
import pytest
import torch
from data_layouts import SMALL, truncate, write_class_folders, write_image
from PIL import Image

from visionpeft.data import ImageDataModule, ImageFolder, VTAB1k
from visionpeft.data.module import CACHE_BYTES
from visionpeft.data.ordering import mix, permutation, subset
from visionpeft.data.records import ImageSet
from visionpeft.errors import ConfigurationError, DataError


@pytest.fixture
def folders(tmp_path):
    for split, count in {"train": 10, "val": 3, "test": 5}.items():
        write_class_folders(tmp_path / split, {"a": count, "b": count})
    return tmp_path


def module(root, **options):
    data = ImageFolder(root, **{"batch_size": 6, "seed": 5, **options})
    data.preprocessing = SMALL
    data.setup()
    return data


def epoch_of(loader, epoch):
    """Images of an epoch in the order of delivery, as Lightning asks for it."""
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


class Recorder(lightning.LightningModule):
    """Trains one number and records the images it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        images, _ = batch
        self.seen.append((self.current_epoch, images))
        return (self.weight - images.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, folder, epochs, *, stop_after=None, resume=None):
    recorder = Recorder()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        max_steps=stop_after or -1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
    )
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder.seen, recorder.weight.item()


def test_batches(folders):
    data = module(folders, drop_last=True)
    batches = list(data.train_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(6, 3, 16, 16)] * 3
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert [len(labels) for _, labels in data.val_dataloader()] == [6]
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [0] * 5 + [1] * 5
    image, label = data.dataset("test")[7]
    assert image.shape == (3, 16, 16)
    assert label == 1


def test_evaluation_images_are_not_augmented(folders):
    data = module(folders, augmentation="random_resized_crop")
    first, again = (torch.cat([images for images, _ in data.val_dataloader()]) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_epoch_only(folders, workers):
    data = module(folders, num_workers=workers)
    loader = data.train_dataloader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not torch.equal(first, second)
    fresh = module(folders)
    assert torch.equal(epoch_of(fresh.train_dataloader(), 1), second)
    assert not torch.equal(epoch_of(module(folders, seed=6).train_dataloader(), 0), first)


def test_consecutive_seeds_do_not_share_orders(folders):
    later, earlier = (module(folders, seed=seed, augmentation="none").train_dataloader() for seed in (6, 5))
    assert not torch.equal(epoch_of(later, 0), epoch_of(earlier, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_does_not_draw_from_the_global_generator(folders, workers):
    data = module(folders, num_workers=workers)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_is_lightnings_when_absent(folders, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert torch.equal(
        epoch_of(module(folders, seed=None).train_dataloader(), 3), epoch_of(module(folders).train_dataloader(), 3)
    )


@pytest.mark.parametrize("steps", [4, 6], ids=["at the end of an epoch", "inside an epoch"])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(folders, tmp_path, steps):
    # 20 images in batches of 6: 4 batches an epoch.
    whole, weight = train(module(folders), tmp_path / "whole", 3)
    cut, _ = train(module(folders), tmp_path / "cut", 3, stop_after=steps)
    assert len(cut) == steps
    saved = next((tmp_path / "cut").glob(f"*step={steps}.ckpt"))
    rest, resumed_weight = train(module(folders), tmp_path / "rest", 3, resume=saved)
    assert [epoch for epoch, _ in cut + rest] == [epoch for epoch, _ in whole]
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(cut + rest, whole, strict=True))
    assert resumed_weight == weight


def test_decoded_images_are_kept(folders):
    data = module(folders)
    loader = data.train_dataloader()
    first = epoch_of(loader, 0)
    for path in data.sources["train"].paths:
        path.unlink()
    assert torch.equal(epoch_of(loader, 0), first)
    with pytest.raises(DataError, match="does not exist"):
        epoch_of(data.train_dataloader(), 0)


def test_cache_stops_at_its_size(folders):
    data = module(folders, augmentation="none")
    dataset = data.dataset("train")
    dataset.free_bytes = 3 * 3 * 16 * 16 + 1
    for index in range(20):
        dataset[index]
    assert sorted(dataset.prepared) == [0, 1, 2]
    assert module(folders, cache_in_memory=False).dataset("train").free_bytes == 0
    # All splits and workers together keep no more than one bound.
    for workers in (0, 1, 3):
        several = module(folders, num_workers=workers)
        kept = [several.dataset(split).free_bytes for split in ("train", "val")]
        assert min(kept) > 0
        assert CACHE_BYTES - 10 < sum(kept) * max(1, workers) <= CACHE_BYTES
    assert data.dataset("test").free_bytes == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named_in_one_sentence(folders, workers):
    truncate(folders / "train/b/4.png")
    with pytest.raises(DataError) as caught:
        list(module(folders, num_workers=workers).train_dataloader())
    assert str(caught.value).startswith(f"image file {folders}/train/b/4.png cannot be read (")
    assert "\n" not in str(caught.value)


def test_damaged_images_are_left_out_and_counted_when_asked(folders):
    truncate(folders / "train/b/4.png")
    truncate(folders / "test/a/0.png")
    data = module(folders, skip_corrupt=True)
    assert data.description()["sizes"] == {"train": 19, "val": 6, "test": 9}
    assert data.description()["skipped_images"] == {"train": 1, "val": 0, "test": 1}
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 19
    data.setup()  # Lightning calls it once for each stage
    assert data.description()["skipped_images"]["train"] == 1


def test_a_class_without_readable_images(folders):
    for number in range(10):
        truncate(folders / f"train/b/{number}.png")
    with pytest.raises(DataError, match="class 'b' is in the val split and has no image in the train split"):
        module(folders, skip_corrupt=True)


def test_test_subset_is_fixed_and_recorded():
    data = VTAB1k("dsprites_ori", test_samples=500)
    again = VTAB1k("dsprites_ori", test_samples=500)
    assert data.description()["test_subset"] == {"samples": 500, "of": 73_728, "seed": 0}
    assert data.description()["sizes"]["test"] == 500
    assert (data.sources["test"].indices == again.sources["test"].indices).all()
    full = VTAB1k("dsprites_ori")
    assert full.description()["test_subset"] is None
    assert set(data.sources["test"].indices) < set(full.sources["test"].indices)
    assert VTAB1k("dsprites_ori", test_samples=10**6).description()["test_subset"] is None


def test_description_is_complete_and_json(folders):
    record = module(folders, normalisation="imagenet").description()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "dataset": "ImageFolder",
        "task": folders.name,
        "trained_on": "train",
        "selected_on": "val",
        "split": "folders",
        "labels": "classes",
        "classes": 2,
        "sizes": {"train": 20, "val": 6, "test": 10},
        "test_subset": None,
        "skipped_images": {"train": 0, "val": 0, "test": 0},
        "input_size": [16, 16],
        "resize": "crop",
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "augmentation": "crop_flip",
        "normalisation": {"source": "imagenet", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "notes": [],
    }


def test_normalisation_option_is_in_effect(folders):
    plain, half = (next(iter(module(folders, normalisation=name).test_dataloader()))[0] for name in ("none", "half"))
    torch.testing.assert_close(half, plain * 2 - 1)
    assert plain.min() >= 0


def test_wrong_options(folders):
    with pytest.raises(ConfigurationError, match="batch_size 0 must be 1 or more"):
        module(folders, batch_size=0)
    with pytest.raises(ConfigurationError, match="test_samples 0 must be 1 or more"):
        module(folders, test_samples=0)
    with pytest.raises(ConfigurationError, match="unknown normalisation 'clip': choose pretrained, imagenet"):
        module(folders, normalisation="clip")
    with pytest.raises(ConfigurationError, match="drop_last leaves no batch: batch_size 64, 20 training images"):
        module(folders, batch_size=64, drop_last=True)
    with pytest.raises(ConfigurationError, match="set the data module's `preprocessing`"):
        ImageFolder(folders).train_dataloader()


def test_fixed_orders():
    order = permutation(1000, 3)
    assert sorted(order) == list(range(1000))
    assert (order == permutation(1000, 3)).all()
    assert (order != permutation(1000, 4)).mean() > 0.9
    chosen = subset(1000, 100, 3)
    assert chosen.tolist() == sorted(order[:100])
    # The first outputs of the reference implementation of splitmix64 (Steele et al. 2014) for seed 0.
    step = 0x9E3779B97F4A7C15
    outputs = [int(mix(k * step % 2**64)[0]) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    # Averages over many hashes are those of a uniform distribution.
    assert (mix(1, np.arange(10_000)) / 2**64).mean() == pytest.approx(0.5, abs=0.01)


def test_each_image_is_used_once_an_epoch(tmp_path):
    for number in range(11):
        write_image(tmp_path / f"train/{'ab'[number % 2]}/{number}.png", 15 * number)
    data = module(tmp_path, augmentation="none", batch_size=4)
    loader = data.train_dataloader()
    for epoch in range(2):
        means = sorted(image.mean().item() for image in epoch_of(loader, epoch))
        assert len(means) == 11
        assert all(low < high for low, high in pairwise(means))


class Arrays:
    """A source that is not of this package, as MedMNIST's arrays make one."""

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.pixels)

    def image(self, index):
        return Image.fromarray(self.pixels[index])

    def name(self, index):
        return f"number {index}"


def module_of(pixels, labels, **options):
    about = {"dataset": "Arrays", "task": "arrays", "trained_on": "train", "selected_on": None}
    data = ImageDataModule(ImageSet({"train": Arrays(pixels, labels)}, ["a", "b"], about), batch_size=4, **options)
    data.preprocessing = SMALL
    data.setup()
    return data


COLOURS = np.zeros((6, 9, 9, 3), np.uint8)
TWO = np.arange(6) % 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("kind", "mode"), [(np.uint8, "L"), (np.uint16, "I;16")])
def test_gray_images_of_another_source_are_told(kind, mode, workers):
    data = module_of(np.zeros((6, 9, 9), kind), TWO, num_workers=workers)
    with pytest.raises(DataError, match=rf"image number \d is a Pillow image of mode {mode}, and Arrays.image must"):
        next(iter(data.train_dataloader()))
    images, labels = next(iter(module_of(COLOURS, TWO.astype(np.uint8)).train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert set(labels.tolist()) <= {0, 1}


@pytest.mark.parametrize(
    "labels",
    [
        TWO[:, None],
        TWO + 1,
        TWO - 1,
        TWO.astype(float),
        torch.tensor(TWO),
        np.array(["a", "b"])[TWO],
        [0, 1, 2, 0, 1, 0],
    ],
    ids=["column", "from 1", "from -1", "fractions", "tensors", "names", "beyond"],
)
def test_labels_of_another_source_are_class_indices(labels):
    with pytest.raises(
        DataError, match=r"the train split has the label .*; .*class indices, whole numbers from 0 to 1"
    ):
        module_of(COLOURS, labels)
