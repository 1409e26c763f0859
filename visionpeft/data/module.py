"""What all image classification data sets share: loaders, test subset, skipping damaged images, the written record."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import lightning
import torch
from torch.utils.data import DataLoader

from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.data.dataset import ImageDataset, ImageLoader, TrainLoader, as_batch
from visionpeft.data.generated_views import GeneratedViews, WithGeneratedViews, check_generated_views
from visionpeft.data.labels import Labels, as_tensor
from visionpeft.data.ordering import BalancedSampler, EpochSampler, ShareSampler, permutation, subset
from visionpeft.data.records import Files, ImageSet, Source, size_of
from visionpeft.data.transforms import CROP_AREA, Augmentation, ImageTransform, check_crop_area
from visionpeft.data.views import ImageViews
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.methods.parts.field_types import as_python

CACHE_BYTES = 512 * 2**20
TEST_SUBSET_SEED = 0
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class ImageDataModule(lightning.LightningDataModule):
    """Labelled images in a train split and, where there are any, a val split (for selection) and a test split.

    Data sets that only exist to be scored have a test split alone.

    `preprocessing` is set from the backbone before the loaders are built. The order of training images and their
    augmentation depend on (seed, epoch) only, so a resumed run sees what the uninterrupted one would have seen.

    Args:
        images: splits, class names and what is to be recorded about them.
        batch_size: images in a batch.
        num_workers: processes that load images; 0 loads in the main process.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".
        normalisation: "pretrained" (the backbone's), "imagenet", "half" (mean and std 0.5) or "none".
        drop_last: leave out the last incomplete training batch of each epoch.
        cache_in_memory: keep resized train and val images, so that epochs cost no decoding: up to 512 MiB for both
            splits and all workers together (each process of distributed training has as much of its own).
        test_samples: score a fixed random subset of the test split, this large; all of it when absent.
        skip_corrupt: leave damaged images out (each is opened once before training, counted and reported) instead of
            stopping at the first one.
        seed: of shuffling and augmentation; the seed given to Lightning when absent.
        test_batch_size: images in a batch of the val and test splits; as `batch_size` when absent.
        views: augment each training image in this many fixed ways, which come round again with the epochs, so that the
            features of a frozen backbone can be kept; anew in each epoch when absent.
        test_views: test batches hold this many views of each image, (B, V, 3, H, W): the usual one and random crops.
        augmix: mix the random ones of the test views by AugMix.
        generated_views: folder of images that you generated from each test image, in <folder of the image>/<its name
            without ending>/, equally many of each: further views of it, after the `test_views`.
        test_order: of the test split: "listed", as the files are listed, in many data sets class by class; or
            "shuffled" by the seed, for what depends on the order.
        crop_area: smallest and largest share of the area that "random_resized_crop" cuts.
        balanced: draw training images so that all classes come equally often, those of rare ones repeatedly; an epoch
            has as many images as without. For labels that are classes.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        resize: Resize = "squash",
        augmentation: Augmentation = "none",
        normalisation: Literal["pretrained", "imagenet", "half", "none"] = "pretrained",
        drop_last: bool = False,
        cache_in_memory: bool = True,
        test_samples: int | None = None,
        skip_corrupt: bool = False,
        seed: int | None = None,
        test_batch_size: int | None = None,
        views: int | None = None,
        test_views: int | None = None,
        augmix: bool = False,
        generated_views: str | Path | None = None,
        test_order: Literal["listed", "shuffled"] = "listed",
        crop_area: tuple[float, float] = CROP_AREA,
        balanced: bool = False,
    ):
        super().__init__()
        batch_size, num_workers, test_samples, seed, test_batch_size, views, test_views = as_python(
            (batch_size, num_workers, test_samples, seed, test_batch_size, views, test_views)
        )
        self.images = images
        self.balanced = balanced
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.resize = resize
        self.augmentation = augmentation
        self.normalisation = normalisation
        self.drop_last = drop_last
        self.cache_in_memory = cache_in_memory
        self.skip_corrupt = skip_corrupt
        self.seed = seed
        self.test_batch_size = test_batch_size
        self.views = views
        self.test_views = test_views
        self.augmix = augmix
        self.generated_folder = generated_views
        self.generated: GeneratedViews | None = None
        self.test_order: str = test_order
        self._check_options(test_samples)
        check_crop_area(crop_area)
        self.crop_area = tuple(crop_area)
        self.skipped = dict.fromkeys(images.sources, 0)
        self.test_subset: dict[str, int] | None = None
        self._preprocessing: Preprocessing | None = None
        self._checked = False
        images.check()
        self._check_batches()
        if test_samples is not None and test_samples < len(images.sources.get("test", ())):
            self._keep_some_of_test(test_samples)
        if test_order == "shuffled" and "test" in images.sources:
            self._shuffle_test()

    def _check_options(self, test_samples: int | None) -> None:
        """Refuse options that make no sense, or none together.

        Raises:
            ConfigurationError: naming the first of them.
        """
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigurationError(
                f"batch_size {self.batch_size} must be 1 or more and num_workers {self.num_workers} 0 or more"
            )
        if test_samples is not None and test_samples < 1:
            raise ConfigurationError(
                f"test_samples {test_samples} must be 1 or more, or absent for the full test split"
            )
        for name in ("test_batch_size", "views", "test_views"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigurationError(f"{name} {count} must be 1 or more, or absent")
        if self.augmix and self.test_views is None:
            raise ConfigurationError("augmix mixes the random views of test images; set test_views, too")
        if self.generated_folder is not None:
            check_generated_views(self.test_views, self.images.sources.get("test"))
        if self.normalisation not in ("pretrained", *NORMALISATIONS):
            raise ConfigurationError(
                f"unknown normalisation '{self.normalisation}': choose pretrained, {', '.join(NORMALISATIONS)}"
            )
        if self.test_order not in ("listed", "shuffled"):
            raise ConfigurationError(f"unknown test_order '{self.test_order}': choose listed or shuffled")
        if self.balanced and self.images.labels != "classes":
            remedy = "; weigh them by --model.positive_weights balanced" if self.images.labels == "several" else ""
            raise ConfigurationError(
                f"balanced draws images of one class each, which labels {self.images.labels!r} are not{remedy}"
            )

    def _keep_some_of_test(self, samples: int) -> None:
        """Score a fixed random subset of the test split."""
        test = self.images.sources["test"]
        self.images.sources["test"] = test.subset(subset(len(test), samples, TEST_SUBSET_SEED))
        self.test_subset = {"samples": samples, "of": len(test), "seed": TEST_SUBSET_SEED}
        self.images.check()

    def _shuffle_test(self) -> None:
        """Put the test split in an order that the seed says."""
        test = self.images.sources["test"]
        self.images.sources["test"] = test.subset(permutation(len(test), self._seed()))
        self.test_order = f"shuffled by seed {self._seed()}"

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the labels; none of numbers."""
        return self.images.class_names

    @property
    def labels(self) -> Labels:
        """What a label is: one of "classes", "several" of them, or a "number"."""
        return self.images.labels

    @property
    def sources(self) -> dict[str, Source]:
        """Labelled images by split: "train", and where there are any "val" and "test"; or "test" alone."""
        return self.images.sources

    @property
    def tasks(self) -> dict[str, int] | None:
        """The number of classes of each task where there are several, in the order of the labels; else None."""
        return None

    @property
    def deterministic_views(self) -> int | None:
        """In how many ways each training image is seen, or None when it is augmented anew in each epoch.

        In epoch e an image is seen as in epoch `e % deterministic_views`.
        """
        return 1 if self.augmentation == "none" else self.views

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Input size, interpolation and normalisation in effect; set it to the backbone's."""
        if self._preprocessing is None or self.normalisation == "pretrained":
            return self._preprocessing
        mean, std = NORMALISATIONS[self.normalisation]
        return replace(self._preprocessing, mean=mean, std=std)

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing | None) -> None:
        self._preprocessing = preprocessing

    def select_on_test(self) -> None:
        """Select on the test split, as papers did that report their best test epoch; the record says so.

        Raises:
            DataError: there is no test split.
        """
        if "test" not in self.sources:
            raise DataError("there is no test split to select on")
        self.sources["val"] = self.sources["test"]
        self.skipped["val"] = 0
        self.images.about["selected_on"] = "test"

    def setup(self, stage: str | None = None) -> None:
        """Check that all files exist and their first and last bytes, or with `skip_corrupt` whether they can be read.

        Done once.

        Raises:
            DataError: a file is missing or damaged, or skipping leaves a split or a class without any.
            ConfigurationError: skipping leaves less than the one batch that `drop_last` asks for.
        """
        if self._checked:
            return
        for split, source in self.sources.items():
            if isinstance(source, Files):
                source.check_exist()
                if self.skip_corrupt:
                    readable = self._readable(source)
                    self.skipped[split] = len(source) - len(readable)
                    self.sources[split] = source.subset(readable)
                else:
                    source.check_files()
        self.images.check()
        self._check_batches()
        if self.generated_folder is not None:
            self.generated = GeneratedViews(self.generated_folder, self.sources["test"])
        self._checked = True

    def _check_batches(self) -> None:
        trained = len(self.sources.get("train", ()))
        if self.drop_last and trained < self.batch_size:
            raise ConfigurationError(
                f"drop_last leaves no batch: batch_size {self.batch_size}, {trained} training {self.images.kind}s"
            )

    def _readable(self, source: Files) -> list[int]:
        return source.readable()

    def dataset(self, split: str) -> ImageDataset:
        """The images of "train" (augmented), "val" or "test" as the backbone wants them.

        Raises:
            DataError: there is no such split.
            ConfigurationError: `preprocessing` was not set.
        """
        self._check_ready(split)
        with_more = split == "test" and self.generated is not None
        kind = partial(WithGeneratedViews, self.generated) if with_more else ImageDataset
        return kind(
            self.sources[split],
            self._transform(split),
            seed=self._seed(),
            # The test split is read once.
            cache_bytes=self._cache_bytes(split),
            views=self.views,
            as_labels=partial(as_tensor, kind=self.labels, num_classes=len(self.class_names)),
        )

    def _transform(self, split: str) -> ImageTransform | ImageViews:
        """What is done to the images of a split."""
        if split == "test" and self.test_views is not None:
            return ImageViews(self.preprocessing, self.resize, self.test_views, self.augmix)
        augmentation = self.augmentation if split == "train" else "none"
        return ImageTransform(self.preprocessing, self.resize, augmentation, self.crop_area)

    def _cache_bytes(self, split: str) -> int:
        """What one process may keep of a split, so that all splits and workers together keep `CACHE_BYTES` at most."""
        if not self.cache_in_memory or split == "test":
            return 0
        total = sum(len(self.sources[kept]) for kept in ("train", "val") if kept in self.sources)
        # Each worker is a process with images of its own.
        return CACHE_BYTES * len(self.sources[split]) // total // max(1, self.num_workers)

    def _check_ready(self, split: str) -> None:
        if split not in self.sources:
            raise DataError(
                f"{self.images.about['dataset']} has no {split} split here; it has {', '.join(self.sources)}"
            )
        if self.preprocessing is None:
            raise ConfigurationError(
                f"set the data module's `preprocessing` to the backbone's before asking for {self.images.kind}s"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches: images float32 (B, 3, H, W) and labels.

        Labels are class indices int64 (B,); several of them float32 (B, K) of zeros and ones; or numbers float32 (B,).
        """
        return self.train_loader(*self._processes)

    def train_loader(self, num_processes: int = 1, rank: int = 0) -> TrainLoader:
        """The share of the shuffled batches that one of several processes trains on; all of them by default.

        Where they cannot be shared evenly, the last batches are of different sizes, and `Part` says of which.
        """
        dataset = self.dataset("train")
        sampler = self.sampler(
            dataset,
            num_replicas=num_processes,
            rank=rank,
            # Consecutive seeds must not share orders, and EpochSampler adds the epoch to its seed.
            seed=self._seed() * 100_003,
            drop_last=self.drop_last,
        )
        return self._loader(TrainLoader, dataset, sampler=sampler, drop_last=self.drop_last)

    def sampler(self, dataset: ImageDataset, **options) -> EpochSampler:
        """The order of the training samples."""
        if self.balanced:
            return BalancedSampler(dataset.source.labels, **options)
        return EpochSampler(dataset, **options)

    def val_dataloader(self) -> DataLoader | list:
        """Batches in order; an empty list when nothing is held out for selection."""
        return self._measured("val") if "val" in self.sources else []

    def test_dataloader(self) -> DataLoader:
        """Batches in the order of `sources["test"]`: images (B, 3, H, W), with `test_views` (B, V, 3, H, W).

        Of several processes, each has its share, and no image is measured twice.
        """
        return self._measured("test")

    def _measured(self, split: str) -> ImageLoader:
        dataset = self.dataset(split)
        num_processes, rank = self._processes
        sampler = ShareSampler(dataset, num_processes, rank, shuffle=False) if num_processes > 1 else None
        return self._loader(ImageLoader, dataset, sampler=sampler)

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes train together, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def description(self) -> dict[str, object]:
        """What was trained, selected and scored on and how inputs were treated, for the record of a run."""
        used = self.preprocessing
        return {
            **self.images.about,
            "labels": self.labels,
            "classes": len(self.class_names),
            "sizes": {split: size_of(source) for split, source in self.sources.items()},
            "test_subset": self.test_subset,
            f"skipped_{self.images.kind}s": dict(self.skipped),
            "input_size": list(used.input_size) if used else None,
            **self._treatment(),
            "normalisation": {
                "source": self.normalisation,
                "mean": list(used.mean) if used else None,
                "std": list(used.std) if used else None,
            },
            **({"views": self.views} if self.views else {}),
            **({"balanced": True} if self.balanced else {}),
            **({"test_order": self.test_order} if self.test_order != "listed" else {}),
            **({"test_views": self.test_views, "augmix": self.augmix} if self.test_views else {}),
            **({"generated_views": self.generated.count} if self.generated else {}),
            "notes": list(self.images.notes),
        }

    def _treatment(self) -> dict[str, object]:
        """Entries of the description on what is done to images before they are normalised."""
        used = self.preprocessing
        return {
            "resize": self.resize,
            "crop_pct": used.crop_pct if used and self.resize == "crop" else None,
            "interpolation": used.interpolation if used else None,
            "augmentation": self.augmentation,
            **({"crop_area": list(self.crop_area)} if self.augmentation == "random_resized_crop" else {}),
        }

    def _seed(self) -> int:
        # lightning.seed_everything leaves its seed in this variable.
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def _loader(self, loader: type[ImageLoader], dataset: ImageDataset, **options) -> ImageLoader:
        trains = loader is TrainLoader
        return loader(
            dataset,
            batch_size=self.batch_size if trains else self.test_batch_size or self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_batch,
            # Its own, so that starting an epoch does not advance the generator that dropout draws from.
            generator=torch.Generator(),
            **options,
        )
