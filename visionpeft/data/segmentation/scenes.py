"""The embedded set of scenes with exact masks."""

from visionpeft.data.segmentation.composed_scenes import Scenes, about_scenes, class_names, splits_of_scenes
from visionpeft.data.segmentation.module import SegmentationDataModule
from visionpeft.data.segmentation.sources import MaskSet


class ComposedScenes(SegmentationDataModule):
    """Drawings on a texture, with exact masks of 8 classes: background, animal, building, flag, person, plant, ...

    Nothing is downloaded: scenes are composed of the clip-art drawings of the package while they are loaded. The
    splits have different drawings; those of one drawing's versions are in one split.

    Args:
        train: number of scenes to train on.
        val: number of scenes for selection; 0 for none.
        test: number of scenes to test on.
        side: height and width of a scene in pixels.
        scene_seed: seed of the scenes themselves.
        size: pixels of a training square, and of the shorter side in val and test.
        scale: smallest and largest factor by which training images are resized.
        test_batch_size: scenes in a batch of the val and test splits.
    """

    def __init__(
        self,
        train: int = 2000,
        val: int = 100,
        test: int = 300,
        side: int = 128,
        scene_seed: int = 0,
        size: int | None = 128,
        scale: tuple[float, float] = (1.0, 1.5),
        test_batch_size: int = 16,
        **kwargs,
    ):
        sources = splits_of_scenes(Scenes, train, val, test, side, scene_seed)
        about = {"dataset": "ComposedScenes", "task": "scenes", **about_scenes(val, side, scene_seed)}
        images = MaskSet(sources, class_names(), about)
        super().__init__(images, size=size, scale=scale, test_batch_size=test_batch_size, **kwargs)
