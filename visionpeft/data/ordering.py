"""Orders that depend on a seed alone: fixed splits and subsets, and shuffling that an interrupted run can resume."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import DistributedSampler

from visionpeft.errors import DataError


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers, broadcast against each other, to uint64 (splitmix64 chained over the values).

    Written out because NumPy and PyTorch promise no stable random streams across versions, and a split must stay fixed.
    """
    state = np.zeros(1, np.uint64)
    for value in values:
        state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permutation(length: int, seed: int) -> np.ndarray:
    """Fixed random order of `range(length)`: the same on every machine and library version."""
    return np.argsort(mix(seed, np.arange(length)), kind="stable")


def subset(length: int, count: int, seed: int) -> np.ndarray:
    """`count` indices out of `range(length)`, drawn without replacement by `seed`, in ascending order."""
    return np.sort(permutation(length, seed)[:count])


class EpochSampler(DistributedSampler):
    """Shuffle by (seed, epoch) and yield `(index, epoch)`, so that a data set can seed its augmentation the same way.

    Lightning calls `set_epoch` before each epoch, also after resuming, and leaves a `DistributedSampler` in place when
    it trains on several devices. `resume = (epoch, samples)` leaves out the first samples of that epoch.
    """

    resume: tuple[int, int] = (-1, 0)

    @property
    def start(self) -> int:
        """Samples left out of the current epoch."""
        epoch, samples = self.resume
        return samples if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, self.epoch) for index in islice(self.order(), self.start, None))

    def order(self) -> Iterator[int]:
        """Indices of the current epoch, in this process."""
        return super().__iter__()

    def fresh(self, begin: int, end: int) -> tuple[int, int]:
        """How many of its samples from `begin` to `end` are no repeats, in this process and in all together.

        Where samples cannot be shared evenly, the last of some processes are others' once more.
        """
        shares = [self._share(rank) for rank in range(self.num_replicas)]
        counts = [max(0, min(end, share) - begin) for share in shares]
        return counts[self.rank], sum(counts)

    def _share(self, rank: int) -> int:
        """How many samples of an epoch a process has that are no repeats."""
        return len(range(rank, len(self.dataset), self.num_replicas))


class BalancedSampler(EpochSampler):
    """An `EpochSampler` that draws each of K classes equally often, repeating images of the rare ones.

    An epoch has as many samples as there are: of each class n / K, rounded so that they sum to n, and over the epochs
    all classes come equally often. The images of a class are gone through in a random order, then in another one, on
    from epoch to epoch, so that those of a frequent class, of which an epoch has a part, all come equally often, too.

    Args:
        labels: class of each sample, (n,).
        **options: of `EpochSampler`; `seed` is the seed of these orders, too.
    """

    def __init__(self, labels: Sequence[int], **options):
        super().__init__(labels, **options)
        by_class = np.argsort(labels, kind="stable")
        _, firsts = np.unique(np.asarray(labels)[by_class], return_index=True)
        self.members = np.split(by_class, firsts[1:])

    def order(self) -> Iterator[int]:
        """Indices of the current epoch, in this process."""
        drawn = self._drawn()
        return (int(drawn[position]) for position in super().order())

    def _drawn(self) -> np.ndarray:
        """The samples of the epoch in all processes together, class by class, (n,)."""
        total, classes = len(self.dataset), len(self.members)
        drawn = []
        for number, members in enumerate(self.members):
            # By Hermite's identity these parts of the classes sum to n in each epoch.
            begin, end = ((total * epoch + number) // classes for epoch in (self.epoch, self.epoch + 1))
            size = len(members)
            first = begin // size
            rounds = np.arange(first, -(-end // size))  # how often the class has been gone through
            orders = np.argsort(mix(self.seed, number, rounds[:, None], np.arange(size)), axis=1, kind="stable")
            drawn.append(members[orders].ravel()[begin - first * size : end - first * size])
        return np.concatenate(drawn)


class ShareSampler(DistributedSampler):
    """Every process's share of a split that is measured, in order and nothing twice: rank, rank + processes, ...

    A plain `DistributedSampler` repeats samples until all shares are of one size, which falsifies what is measured.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class SceneSampler(EpochSampler):
    """An `EpochSampler` that shuffles scenes instead of samples: the samples of a scene follow each other.

    A batch of m times as many samples as a scene has therefore holds m whole scenes, on each of several devices, too.

    Args:
        scenes: the scene of each sample, (n,).
        **options: of `EpochSampler`; `drop_last` and the repeats that even out devices count in scenes.

    Raises:
        DataError: scenes of different numbers of samples.
    """

    def __init__(self, scenes: Sequence[int], **options):
        _, counts = np.unique(scenes, return_counts=True)
        if counts.min() != counts.max():
            raise DataError(
                f"batches of whole scenes need scenes of equal size, but these have {counts.min()} to {counts.max()} "
                "samples; use batches 'random'"
            )
        self.samples = np.argsort(scenes, kind="stable").reshape(len(counts), -1)
        super().__init__(self.samples, **options)

    def __len__(self) -> int:
        return super().__len__() * self.samples.shape[1]

    def _share(self, rank: int) -> int:
        return super()._share(rank) * self.samples.shape[1]

    def order(self) -> Iterator[int]:
        """Indices of the current epoch, in this process, scene by scene."""
        return (index for scene in super().order() for index in self.samples[scene].tolist())
