"""Objects of composed scenes beside the scenes' masks of classes."""

import numpy as np

from visionpeft.data import ComposedObjects
from visionpeft.data.segmentation.composed_scenes import compose


def test_objects_are_what_can_be_seen():
    source = ComposedObjects(train=6, test=1, side=64).sources["train"]
    count = 0
    for index in range(6):
        objects = source.objects(index)
        image, classes = compose("train", index, 64, 0)
        assert source.image(index).tobytes() == image.tobytes()
        shown = np.zeros((64, 64), int)
        for mask, label, box, area in zip(objects.masks, objects.labels, objects.boxes, objects.areas, strict=True):
            assert not shown[mask].any()  # each pixel shows one object
            shown[mask] = label + 1
            ys, xs = np.argwhere(mask).T
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert area == len(xs)
            count += 1
        assert np.array_equal(shown, classes)
    assert 12 <= count <= 24
    assert np.array_equal(source.subset(np.array([2])).objects(0).boxes, source.objects(2).boxes)
