"""People's own videos in a folder for each class, or in lists."""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.data.class_folders import read_class_folders
from visionpeft.data.image_list import read_lists
from visionpeft.data.video.annotations import read_video_list
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.module import VideoDataModule
from visionpeft.data.video.reading import list_videos


class VideoFolder(VideoDataModule):
    """A folder for each class: `root/{train,val,test}/<class>/`, or `root/<class>/` which is split at random.

    The first layout is taken where every folder in the root that holds any has the name of a split, in any case, also
    `training`, `valid`, `validation`, `dev` and `testing`; where only some have, the folder is refused as ambiguous.
    Files that are left out are counted and named in the description of a run.

    The class names are the folder names, sorted. Videos are encoded files or folders of frames. In the first layout
    `val` and `test` may be absent. In the second the videos of each class are split by the fractions, at least one
    staying in the train split.

    Args:
        root: the folder.
        val_fraction: share of each class held out for selection, where the folder has no splits.
        test_fraction: share of each class held out for the test, where the folder has no splits.
        split_seed: seed of that split; the split depends on the sorted file names and on this alone.

    Raises:
        DataError: a folder that is missing or empty, one class only, or a class without training videos.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        **kwargs,
    ):
        videos = read_class_folders(
            "VideoFolder", root, val_fraction, test_fraction, split_seed, VideoFiles, list_videos
        )
        super().__init__(videos, **kwargs)


class VideoList(VideoDataModule):
    """Videos listed with their labels in one file for each split: lines `path label`, or CSV or JSON as for images.

    Args:
        train: list of training videos.
        val: list of videos for selection.
        test: list of videos for the test.
        root: folder that the paths are relative to and may not leave; "auto" is the folder of the training list. With
            null, paths may lie anywhere, absolute or relative to the working directory.
        class_names: names in the order of the labels; the sorted labels found in the lists when absent.

    Raises:
        DataError: a list that is missing or malformed, a path outside the root, a label out of range or with two
            meanings, a video in two splits, one class only, or a class without training videos.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path | None = None,
        test: str | Path | None = None,
        root: str | Path | None = "auto",
        class_names: Sequence[str] | None = None,
        **kwargs,
    ):
        lists = {"train": train, "val": val, "test": test}
        super().__init__(read_lists("VideoList", lists, root, class_names, VideoFiles, read_video_list), **kwargs)
