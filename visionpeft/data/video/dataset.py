"""Labelled videos as clips: frames chosen, decoded, augmented and normalised."""

import numpy as np
import torch

from visionpeft.data.dataset import LabelledDataset
from visionpeft.data.ordering import mix
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.reading import FrameIndex, of_several_sizes, open_video
from visionpeft.data.video.transforms import ClipTransform
from visionpeft.models.video_sampling import FrameSampling

INDEX_BYTES = 64 * 2**20  # for all workers together


class VideoDataset(LabelledDataset):
    """Clips of labelled videos.

    In training a clip is float32 (3, T, H, W), and an index may be a pair `(index, epoch)`, which seeds the choice of
    frames and the augmentation. Else it is the middle clip's centre, or with `crops` all views of the video,
    (V, 3, T, H, W): for each of the sampling's clips its crops.

    Args:
        source: labelled videos.
        sampling: which frames make a clip.
        transform: what is done to them.
        seed: of frames and augmentation, together with the epoch and the index.
        crops: crops of each test clip, 1 or 3; absent for a single view.
        shuffle_frames: put the frames of each video's clips in a random order, fixed by the seed and the index.
        num_workers: processes that load, which share the memory for what was found of the files.
    """

    def __init__(
        self,
        source: VideoFiles,
        sampling: FrameSampling,
        transform: ClipTransform,
        *,
        seed: int = 0,
        crops: int | None = None,
        shuffle_frames: bool = False,
        num_workers: int = 0,
    ):
        self.source = source
        self.sampling = sampling
        self.transform = transform
        self.seed = seed
        self.crops = crops
        self.shuffle_frames = shuffle_frames
        self.free_bytes = INDEX_BYTES // max(1, num_workers)
        self.indices: dict[int, FrameIndex] = {}

    def _input(self, index: int, epoch: int) -> torch.Tensor:
        trains = self.transform.augmentation is not None
        return self._train_clip(index, epoch) if trains else self._views(index)

    def _train_clip(self, index: int, epoch: int) -> torch.Tensor:
        """Random frames and augmentation: uint8 (T, 3, H, W)."""
        video = self._open(index)
        draws = uniform_draws(self.sampling.num_frames, self.seed, epoch, index)
        if self.sampling.by == "time":
            chosen = np.array(video.at(self.sampling.train_times(video.length, draws).tolist()))
        else:
            chosen = self.sampling.train(len(video), draws)
        frames = video.read(chosen.tolist(), self.transform.prepare)
        return self.transform.augment(self._clip(index, frames, chosen), self.seed, epoch, index)

    def _views(self, index: int) -> torch.Tensor:
        """Fixed frames: uint8 (T, 3, H, W), or (V, T, 3, H, W) with `crops`."""
        video = self._open(index)
        clips = 1 if self.crops is None else None
        if self.sampling.by == "time":
            times = self.sampling.test_times(video.length, clips)
            chosen = np.array(video.at(times.ravel().tolist())).reshape(times.shape)
        else:
            chosen = self.sampling.test(len(video), clips)
        if self.shuffle_frames:
            order = np.argsort(mix(self.seed, index, np.arange(self.sampling.num_frames)), kind="stable")
            chosen = chosen[:, order]
        frames = video.read(np.unique(chosen).tolist(), self.transform.prepare)
        views = torch.cat([self.transform.crops(self._clip(index, frames, clip), self.crops or 1) for clip in chosen])
        return views[0] if self.crops is None else views

    def _clip(self, index: int, frames: dict[int, torch.Tensor], chosen: np.ndarray) -> torch.Tensor:
        """The chosen frames as one tensor (T, 3, h, w).

        Raises:
            DataError: they are not of one size.
        """
        clip = [frames[frame] for frame in chosen.tolist()]
        if len({frame.shape for frame in clip}) > 1:
            raise of_several_sizes(self.source.name(index))
        return torch.stack(clip)

    def _open(self, index: int):
        video = open_video(self.source.paths[index], self.indices.get(index))
        if video.index is not None and index not in self.indices and video.index.nbytes <= self.free_bytes:
            self.free_bytes -= video.index.nbytes
            self.indices[index] = video.index
        return video


def uniform_draws(count: int, *seeds: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seeds alone: float64 (count,)."""
    # 53 bits fill a float64 exactly, so that 1 is never reached.
    return (mix(*seeds, np.arange(count)) >> np.uint64(11)) / 2.0**53
