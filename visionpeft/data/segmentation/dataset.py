"""Images and masks as tensors, batch by batch."""

import torch

from visionpeft.data.dataset import LabelledDataset
from visionpeft.data.records import rgb_of
from visionpeft.data.segmentation.sources import MaskedSource
from visionpeft.data.segmentation.transforms import MaskedTransform
from visionpeft.errors import DataError


class MaskedDataset(LabelledDataset):
    """Images float32 (3, H, W) and class indices int64 (H, W), `IGNORED` where a pixel counts nowhere.

    To train, both are cut to one square; an index may be a pair `(index, epoch)`, which seeds that. To measure, images
    are resized and masks are not, so that a batch of several needs images and masks of one size.

    Args:
        source: images with masks.
        transform: what is done to them.
        trains: whether they are drawn anew in each epoch.
        seed: seed of that, together with the epoch and the index.
    """

    def __init__(self, source: MaskedSource, transform: MaskedTransform, *, trains: bool, seed: int = 0):
        self.source = source
        self.transform = transform
        self.trains = trains
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = self._batch([key])
        return images[0], masks[0]

    def _batch(self, keys: list[int | tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self._pair(*key) if isinstance(key, tuple) else self._pair(key, 0) for key in keys]
        images, masks = zip(*pairs, strict=True)
        if len({(image.shape, mask.shape) for image, mask in pairs}) > 1:
            raise DataError(
                f"{self.source.name(keys[0])} and the next {len(keys) - 1} images are of different sizes and make no "
                "batch; set --data.test_batch_size 1"
            )
        return self.transform.normalise(torch.stack(images)), torch.stack(masks)

    def _pair(self, index: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = rgb_of(self.source, index), self.source.mask(index)
        if self.trains:
            return self.transform.train(image, mask, self.seed, epoch, index)
        return self.transform.measure(image), torch.from_numpy(mask.copy())
