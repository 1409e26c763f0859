"""Videos to predict: files and folders that people name, as batches in that order."""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.dataset import ImageLoader, as_batch
from visionpeft.data.images import list_images
from visionpeft.data.unlabelled import find_files
from visionpeft.data.video.dataset import VideoDataset
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.reading import list_videos
from visionpeft.data.video.transforms import ClipTransform, Resizing
from visionpeft.errors import DataError
from visionpeft.models.video_sampling import FrameSampling


def find_videos(paths: Sequence[str | Path]) -> list[Path]:
    """The video files named, and those in the folders named, at any depth, sorted within each folder.

    A folder that directly holds images and no video is itself a video, of frames.

    Raises:
        DataError: nothing is named, a path does not exist, or a folder holds no videos.
    """

    def list_folder(folder: Path) -> list[Path]:
        videos = list_videos(folder)
        if not videos and any(image.parent == folder for image in list_images(folder)):
            return [folder]
        return videos

    return find_files(paths, list_folder, "video")


def videos_dataloader(
    files: Sequence[Path],
    preprocessing: Preprocessing,
    sampling: FrameSampling,
    *,
    crops: int = 1,
    batch_size: int = 8,
    num_workers: int = 0,
    skip_corrupt: bool = False,
    resizing: Resizing = "pillow",
) -> tuple[ImageLoader, list[Path]]:
    """Batches (views float32 (B, V, 3, T, H, W), zeros (B,)) of videos in order, and the files that are in them.

    Args:
        files: video files or folders of frames.
        preprocessing: of the backbone.
        sampling: as in training.
        crops: of each clip, 1 or 3.
        batch_size: videos in a batch.
        num_workers: processes that decode videos; 0 decodes in the main process.
        skip_corrupt: leave damaged videos out, decoding each once before.
        resizing: of frames, as in training.

    Raises:
        DataError: a file is missing, or no file can be read; while iterating, a file is damaged.
    """
    source = VideoFiles(files, [0] * len(files))
    source.check_exist()
    if skip_corrupt:
        source = source.subset(source.readable(num_workers))
    if not source.paths:
        raise DataError(f"none of the {len(files)} videos can be read")
    loader = ImageLoader(
        VideoDataset(source, sampling, ClipTransform(preprocessing, resizing=resizing), crops=crops),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=as_batch,
    )
    return loader, source.paths
