"""Loaders of streams: whole batches out of what the workers read, epochs of a known length, and resuming in them."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from visionpeft.data.dataset import as_batch
from visionpeft.data.streaming.stream import Part, StreamDataset
from visionpeft.errors import ConfigurationError, DataError

Batch = tuple[torch.Tensor, torch.Tensor]


class StreamLoader:
    """Every image of this process's share once, in batches of which only the last may be smaller.

    Args:
        share: the images of this process.
        split: its name, for messages.
        num_workers: processes that load; at most as many as the share has parts.
    """

    def __init__(self, share: StreamDataset, split: str, num_workers: int):
        self.share = share  # not `dataset`: Lightning takes a loader of an iterable one to know no length
        self.split = split
        self.num_workers = min(num_workers, share.stream.parts(share.processes))

    def __iter__(self) -> Iterator[Batch]:
        found = 0
        for batch in regrouped(self._read(), self.share.batch_size):
            found += len(batch[1])
            yield batch
        self._check_any(found)
        if self.share.processes > 1:
            return
        stream = self.share.stream
        if stream.size not in (None, found):
            raise DataError(
                f"the {self.split} split is said to hold {stream.size:,} images, but {found:,} were read; correct the "
                "number, or look for shards that are missing"
            )
        stream.size = found

    def _read(self) -> Iterator[Part]:
        """What the workers yield, in turn; their errors are raised."""
        loader = DataLoader(
            self.share,
            batch_size=None,  # they are batches already
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_batch,
            # Its own, so that starting an epoch does not advance the generator that dropout draws from.
            generator=torch.Generator(),
        )
        for part in loader:
            if isinstance(part, DataError):
                raise part
            yield part

    def _check_any(self, found: int) -> None:
        if not found:
            device = f" for device {self.share.rank + 1} of {self.share.processes}"
            raise DataError(
                f"the {self.split} split holds no images{device if self.share.processes > 1 else ''}"
                + ("; use fewer devices (--trainer.devices)" if self.share.processes > 1 else "")
            )


class StreamTrainLoader(StreamLoader):
    """As many images in each epoch as the split is said to hold, shared evenly by the processes.

    One process reads each image once. Of several, one whose share is smaller than that of the others goes on with a
    share of the next order, and one whose share is larger does not come to its last images.

    Its state lets Lightning resume in the middle of an epoch: what was seen is read once more, without being decoded.

    Args:
        share: the images of this process.
        split: its name, for messages.
        num_workers: processes that load.
        drop_last: leave out the last incomplete batch.
    """

    resume: tuple[int, int] = (-1, 0)  # an epoch, and how many of its images this process has seen

    def __init__(self, share: StreamDataset, split: str, num_workers: int, drop_last: bool = False):
        super().__init__(share, split, num_workers)
        total, size = len(share.stream), share.batch_size
        self.images = total // share.processes // size * size if drop_last else -(-total // share.processes)
        self.delivered = 0

    @property
    def sampler(self) -> StreamDataset:
        """What Lightning tells each epoch, by `set_epoch`; it asks the sampler of a loader for that."""
        return self.share

    def __len__(self) -> int:
        return math.ceil(self.images / self.share.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, seen = self.resume
        self.delivered = seen if epoch == self.share.epoch else 0
        for batch in regrouped(self._epoch(self.delivered), self.share.batch_size):
            self.delivered += len(batch[1])
            yield batch

    def _epoch(self, seen: int) -> Iterator[Batch]:
        """The images of the present epoch after those that were seen."""
        read = turn = 0
        while read < self.images and seen < self.images:
            begun = read
            self.share.turn = turn
            # So many batches of every worker are among what was seen, because they come in turn.
            self.share.skipped = max(0, seen - read) // (self.share.batch_size * max(1, self.num_workers))
            for part in self._read():
                number = part if isinstance(part, int) else len(part[1])
                first, last = max(0, seen - read), min(number, self.images - read)
                read += number
                if first < last:
                    yield part[0][first:last], part[1][first:last]
                if read >= self.images:
                    break
            self._check_any(read - begun)
            if read < self.images and self.share.processes == 1:
                raise DataError(
                    f"the {self.split} split is said to hold {len(self.share.stream):,} images, but there are "
                    f"{read:,}; correct the number, or look for shards that are missing"
                )
            turn += 1

    def state_dict(self) -> dict[str, int]:
        """Epoch, how many of its images this process was given, and what decides which ones."""
        return {
            "epoch": self.share.epoch,
            "images": self.delivered,
            "of": self.images,
            "processes": self.share.processes,
            "workers": self.num_workers,
            "batch_size": self.share.batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ConfigurationError: in the middle of an epoch, with another number of devices or workers, or other batches.
        """
        seen = state["images"]
        if seen == state["of"]:
            seen = self.images
        elif seen:
            now = self.state_dict()
            for key, option in (
                ("processes", "--trainer.devices"),
                ("workers", "--data.num_workers"),
                ("batch_size", "--data.batch_size"),
            ):
                if state[key] != now[key]:
                    raise ConfigurationError(
                        f"this run stopped in the middle of epoch {state['epoch'] + 1} of a stream that was shared by "
                        f"{option} {state[key]}; resume with as many, not {now[key]}"
                    )
        self.resume = (state["epoch"], seen)


def regrouped(parts: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same images in the same order, in batches of `size`; the last one may be smaller."""
    held: list[Batch] = []
    number = 0
    for part in parts:
        held.append(part)
        number += len(part[1])
        while number >= size:
            images, labels = joined(held)
            yield images[:size], labels[:size]
            number -= size
            held = [(images[size:], labels[size:])] if number else []
    if number:
        yield joined(held)


def joined(parts: list[Batch]) -> Batch:
    """Several batches as one."""
    if len(parts) == 1:
        return parts[0]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
