"""Images and their objects as tensors, batch by batch."""

import torch

from visionpeft.data.dataset import LabelledDataset
from visionpeft.data.detection.objects import ObjectSource
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.data.records import rgb_of
from visionpeft.errors import DataError


class ObjectDataset(LabelledDataset):
    """Images float32 (3, H, W), and for each what is to be found in it.

    That is "boxes" float32 (n, 4) as x0, y0, x1, y1 in pixels of the tensor, "labels" int64 (n,) and, where there are
    masks, "masks" uint8 (n, H, W). To train, images are cut to one square; an index may be a pair `(index, epoch)`,
    which seeds that. To measure, images are resized, and "truth" are their `Objects` and "size" their height and width
    before that.

    Args:
        source: images with objects.
        transform: what is done to them.
        trains: whether they are drawn anew in each epoch.
        seed: seed of that, together with the epoch and the index.
    """

    def __init__(self, source: ObjectSource, transform: ObjectTransform, *, trains: bool, seed: int = 0):
        self.source = source
        self.transform = transform
        self.trains = trains
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, dict]:
        images, targets = self._batch([key])
        return images[0], targets[0]

    def _batch(self, keys: list[int | tuple[int, int]]) -> tuple[torch.Tensor, list[dict]]:
        pairs = [self._pair(*key) if isinstance(key, tuple) else self._pair(key, 0) for key in keys]
        images, targets = zip(*pairs, strict=True)
        if len({image.shape for image in images}) > 1:
            raise DataError(
                f"{self.source.name(keys[0])} and the next {len(keys) - 1} images are of different sizes and make no "
                "batch; set --data.test_batch_size 1"
            )
        return self.transform.normalise(torch.stack(images)), list(targets)

    def _pair(self, index: int, epoch: int) -> tuple[torch.Tensor, dict]:
        image, objects = rgb_of(self.source, index), self.source.objects(index)
        if self.trains:
            return self.transform.train(image, objects, self.seed, epoch, index)
        pixels, target = self.transform.measured(image, objects)
        return pixels, {**target, "truth": objects, "size": (image.height, image.width)}
