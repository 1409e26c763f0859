"""Passes over a split in order, for what a task computes from its images before training."""

from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from visionpeft.caching.content_cache import ContentCache
from visionpeft.data.dataset import ImageLoader, as_batch


@torch.no_grad()
def in_order(
    task: pl.LightningModule, split: str, view: int, compute: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is computed from the images of each batch of a split, and labels; the task is left in evaluation mode.

    Args:
        task: the task, whose trainer has the data and says on which device and in which precision it runs.
        split: "train" or "val".
        view: which of the fixed views of each image.
        compute: maps images (batch, 3, height, width).
    """
    device, datamodule = task.trainer.strategy.root_device, task.trainer.datamodule
    task.to(device).eval()
    dataset = datamodule.dataset(split)
    loader = ImageLoader(
        dataset,
        batch_size=64,
        sampler=[(index, view) for index in range(len(dataset))],
        num_workers=datamodule.num_workers,
        collate_fn=as_batch,
    )
    for batch in loader:
        images, labels = move_data_to_device(batch, device)
        with task.trainer.precision_plugin.forward_context():
            result = compute(images)
        yield result, labels


def keep_all(task: pl.LightningModule, views: int, compute: Callable[[Tensor], Tensor], cache: ContentCache) -> None:
    """Compute what a cache keeps of all training images, until it is full.

    Always in the same order, so that a resumed run, which may have nothing kept yet, gets the very same numbers.

    Args:
        task: as for `in_order`.
        views: in how many ways each image is seen.
        compute: maps images (batch, 3, height, width), and keeps what it gives.
        cache: where that is kept.
    """
    for view in range(views):
        for _ in in_order(task, "train", view, compute):
            if cache.full:
                return
