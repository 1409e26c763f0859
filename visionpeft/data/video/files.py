"""Labelled videos: what a list or a folder of videos becomes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from visionpeft.data.records import Files
from visionpeft.data.video.reading import open_video
from visionpeft.errors import DataError


class VideoFiles(Files):
    """Videos with labels: encoded files, or folders whose images are the frames.

    Args:
        paths: video files or folders of frames, (n,).
        labels: class indices, (n,).
        scenes: which videos show the same scene, if that is known: (n,).
    """

    kind = "video"

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], scenes: Sequence[int] | None = None):
        super().__init__(paths, labels)
        self.scenes = None if scenes is None else list(scenes)

    def subset(self, indices: np.ndarray | Sequence[int]) -> "VideoFiles":
        """The videos at `indices`."""
        scenes = None if self.scenes is None else [self.scenes[i] for i in indices]
        return VideoFiles([self.paths[i] for i in indices], [self.labels[i] for i in indices], scenes)

    def readable(self, num_workers: int = 0) -> list[int]:
        """Indices of the videos that can be decoded to the end; decodes every one, in `num_workers` processes."""
        checks = DataLoader(_Checks(self.paths), batch_size=None, num_workers=num_workers)
        return [index for index, fine in enumerate(checks) if fine]

    def check_exist(self) -> None:
        """Raise DataError naming the first video that does not exist."""
        for path in self.paths:
            if not path.exists():
                raise DataError(f"video {path} does not exist")


class _Checks(Dataset):
    """Whether each of the videos can be decoded."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bool:
        try:
            open_video(self.paths[index]).check()
        except DataError:
            return False
        return True
