"""The embedded set of scenes with exact boxes and masks."""

import numpy as np

from visionpeft.data.detection.module import DetectionDataModule
from visionpeft.data.detection.objects import Objects, ObjectSet, box_of, objects_of
from visionpeft.data.segmentation.composed_scenes import (
    Scenes,
    about_scenes,
    class_names,
    compose_objects,
    splits_of_scenes,
)


class SceneObjects(Scenes):
    """The scenes of a split with the objects that can be seen in them, as a data module reads them."""

    with_masks = True

    def objects(self, index: int) -> Objects:
        """Boxes around what can be seen of each drawing, and masks of that; one that is wholly hidden is left out."""
        _, places, labels = compose_objects(self.split, int(self.indices[index]), self.side, self.seed)
        masks = np.arange(1, len(labels) + 1)[:, None, None] == places
        seen = masks.any((1, 2))
        masks = masks[seen]
        return objects_of(
            [box_of(mask) for mask in masks], np.array(labels)[seen], areas=masks.sum((1, 2)), masks=masks
        )

    def subset(self, indices: np.ndarray) -> "SceneObjects":
        """The scenes at `indices`."""
        return SceneObjects(self.split, self.indices[indices], self.side, self.seed)


class ComposedObjects(DetectionDataModule):
    """The scenes of `ComposedScenes` with exact boxes and masks of their drawings, in 7 classes.

    Nothing is downloaded: scenes are composed of the clip-art drawings of the package while they are loaded. The splits
    have different drawings. Boxes are around the visible part.

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
        sources = splits_of_scenes(SceneObjects, train, val, test, side, scene_seed)
        about = {"dataset": "ComposedObjects", "task": "objects", **about_scenes(val, side, scene_seed)}
        images = ObjectSet(sources, class_names()[1:], about)
        super().__init__(images, size=size, scale=scale, test_batch_size=test_batch_size, **kwargs)
