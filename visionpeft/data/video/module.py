"""What all video data sets share: clips, test views, skipping damaged videos, the written record."""

from typing import Literal

from visionpeft.data.module import ImageDataModule
from visionpeft.data.ordering import EpochSampler, SceneSampler
from visionpeft.data.records import ImageSet
from visionpeft.data.video.dataset import VideoDataset
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.transforms import ClipAugmentation, ClipTransform, Resizing
from visionpeft.errors import ConfigurationError
from visionpeft.models.video_sampling import FrameSampling

SAMPLING = FrameSampling()
AUGMENTATION = ClipAugmentation()


class VideoDataModule(ImageDataModule):
    """Labelled videos in a train split and, where there are any, a val split (for selection) and a test split.

    Loaders, order, resuming and normalisation are those of images. Training and val batches hold one clip of each
    video, float32 (B, 3, T, H, W); test batches hold its views, (B, V, 3, T, H, W), for each temporal clip its crops.

    Args:
        videos: splits of `VideoFiles`, class names and what is to be recorded about them.
        mirrored: whether a mirrored video keeps its label.
        sampling: which frames make a clip.
        augmentation: of training clips.
        test_crops: crops of each test clip: 1 (centre) or 3 along the longer side.
        batch_size: videos in a batch.
        batches: training batches of "random" videos, or of "scene": all videos of one scene or of several, which then
            differ in nothing but their classes. Needs data that know their scenes (Motion) and a batch size that is a
            multiple of the videos of a scene.
        num_workers: processes that decode videos; 0 decodes in the main process.
        normalisation: "pretrained" (the backbone's), "imagenet", "half" (mean and std 0.5) or "none".
        drop_last: leave out the last incomplete training batch of each epoch.
        test_samples: score a fixed random subset of the test split, this large; all of it when absent.
        skip_corrupt: leave damaged videos out (each is decoded once before training, counted and reported) instead of
            stopping at the first one.
        seed: of shuffling, frames and augmentation; the seed given to Lightning when absent.
        test_batch_size: videos in a batch of the val and test splits; as `batch_size` when absent.
        shuffle_test_frames: put the frames of test clips in a random order, to see whether their order is used.
        resizing: "pillow", or "tensor" as in ST-Adapter's code; see `ClipTransform`.
    """

    def __init__(
        self,
        videos: ImageSet,
        *,
        mirrored: bool = True,
        sampling: FrameSampling = SAMPLING,
        augmentation: ClipAugmentation = AUGMENTATION,
        test_crops: int = 1,
        batch_size: int = 16,
        batches: Literal["random", "scene"] = "random",
        num_workers: int = 0,
        normalisation: Literal["pretrained", "imagenet", "half", "none"] = "pretrained",
        drop_last: bool = False,
        test_samples: int | None = None,
        skip_corrupt: bool = False,
        seed: int | None = None,
        test_batch_size: int | None = None,
        shuffle_test_frames: bool = False,
        resizing: Resizing = "pillow",
    ):
        if test_crops not in (1, 3):
            raise ConfigurationError(f"test_crops {test_crops} must be 1 or 3")
        if augmentation.flip and not mirrored:
            raise ConfigurationError(f"flip changes labels of {videos.about['dataset']}; leave it off")
        if resizing not in ("pillow", "tensor"):
            raise ConfigurationError(f"unknown resizing '{resizing}' of frames: choose pillow or tensor")
        if batches not in ("random", "scene"):
            raise ConfigurationError(f"unknown batches '{batches}': choose random or scene")
        super().__init__(
            videos,
            batch_size=batch_size,
            num_workers=num_workers,
            resize="crop",
            normalisation=normalisation,
            drop_last=drop_last,
            cache_in_memory=False,
            test_samples=test_samples,
            skip_corrupt=skip_corrupt,
            seed=seed,
            test_batch_size=test_batch_size,
        )
        self.batches = batches
        if batches == "scene":
            self._check_scenes()
        self.sampling = sampling
        self.augmentation = augmentation
        self.test_crops = test_crops
        self.shuffle_test_frames = shuffle_test_frames
        self.resizing = resizing

    @property
    def deterministic_views(self) -> None:
        """Frames are chosen anew in each epoch."""
        return None

    def _readable(self, source: VideoFiles) -> list[int]:
        return source.readable(self.num_workers)

    def dataset(self, split: str) -> VideoDataset:
        """The clips of "train" (random and augmented), "val" (one view) or "test" (all views).

        Raises:
            DataError: there is no such split.
            ConfigurationError: `preprocessing` was not set.
        """
        self._check_ready(split)
        tested = split == "test"
        return VideoDataset(
            self.sources[split],
            self.sampling,
            ClipTransform(self.preprocessing, self.augmentation if split == "train" else None, self.resizing),
            seed=self._seed(),
            crops=self.test_crops if tested else None,
            shuffle_frames=self.shuffle_test_frames and tested,
            num_workers=self.num_workers,
        )

    def sampler(self, dataset: VideoDataset, **options) -> EpochSampler:
        """The order of the training videos.

        Raises:
            DataError: with batches "scene", scenes of different numbers of videos, after skipping some.
        """
        if self.batches == "scene":
            return SceneSampler(dataset.source.scenes, **options)
        return EpochSampler(dataset, **options)

    def _treatment(self) -> dict[str, object]:
        """Entries of the description on how clips are made."""
        return {
            "interpolation": self.preprocessing.interpolation if self.preprocessing else None,
            "resizing": self.resizing,
            "batches": self.batches,
            "sampling": vars(self.sampling) | {},
            "test_views": self.sampling.test_clips * self.test_crops,
            "test_crops": self.test_crops,
            "shuffle_test_frames": self.shuffle_test_frames,
            "augmentation": vars(self.augmentation) | {"area": list(self.augmentation.area)},
        }

    def _check_scenes(self) -> None:
        scenes = getattr(self.sources.get("train"), "scenes", None)
        if scenes is None:
            raise ConfigurationError(
                f"batches 'scene': {self.images.about['dataset']} does not say which videos show the same scene; use "
                "batches 'random'"
            )
        size = scenes.count(scenes[0])
        if self.batch_size % size:
            raise ConfigurationError(
                f"batches 'scene': batch_size {self.batch_size} must be a multiple of the {size} videos of a scene"
            )


def video_set(
    sources: dict[str, VideoFiles], class_names: list[str], about: dict[str, object], notes: list[str] | None = None
) -> ImageSet:
    """Splits of videos with their record."""
    return ImageSet(sources, class_names, about, notes or [], kind="video")
