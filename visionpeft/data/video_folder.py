"""People's own videos in a folder for each class, or in lists."""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.data.image_folder import SPLIT_FOLDERS, class_files, divided
from visionpeft.data.image_list import class_index
from visionpeft.data.records import check_disjoint, path_inside, without_duplicates
from visionpeft.data.video_annotations import read_video_list
from visionpeft.data.video_files import VideoFiles
from visionpeft.data.video_module import VideoDataModule, video_set
from visionpeft.data.video_reading import list_videos
from visionpeft.errors import ConfigurationError, DataError


class VideoFolder(VideoDataModule):
    """A folder for each class: `root/{train,val,test}/<class>/`, or `root/<class>/` which is split at random.

    The class names are the folder names, sorted. Videos are encoded files or folders of frames. In the first layout
    `val` and `test` may be absent. In the second the videos of each class are split by the fractions, at least one
    staying in the train split.

    Args:
        root: The folder.
        val_fraction: Share of each class held out for selection, where the folder has no splits.
        test_fraction: Share of each class held out for the test, where the folder has no splits.
        split_seed: Seed of that split; the split depends on the sorted file names and on this alone.

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
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"video folder {root} does not exist")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigurationError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and sum below 1"
            )
        given = {
            split: next((root / name for name in names if (root / name).is_dir()), None)
            for split, names in SPLIT_FOLDERS.items()
        }
        if given["train"]:
            videos = {split: class_files(folder, list_videos, "video") for split, folder in given.items() if folder}
            division = "folders"
        else:
            found = class_files(root, list_videos, "video")
            videos = divided(found, val_fraction, test_fraction, split_seed, "video")
            division = f"random, val {val_fraction:g}, test {test_fraction:g}, seed {split_seed}"
        class_names = sorted(set().union(*videos.values()))
        sources = {split: _labelled(classes, class_names) for split, classes in videos.items()}
        about = {
            "dataset": "VideoFolder",
            "task": root.resolve().name,
            "trained_on": "train",
            "selected_on": "val" if "val" in sources else None,
            "split": division,
        }
        super().__init__(video_set(sources, class_names, about), **kwargs)


class VideoList(VideoDataModule):
    """Videos listed with their labels in one file for each split: lines `path label`, or CSV or JSON as for images.

    Args:
        train: List of training videos.
        val: List of videos for selection.
        test: List of videos for the test.
        root: Folder that the paths are relative to and may not leave; "auto" is the folder of the training list. With
            null, paths may lie anywhere, absolute or relative to the working directory.
        class_names: Names in the order of the labels; the sorted labels found in the lists when absent.

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
        files = {split: Path(file) for split, file in (("train", train), ("val", val), ("test", test)) if file}
        splits = {split: without_duplicates(read_video_list(file), "video") for split, file in files.items()}
        check_disjoint(splits, "video")
        names, index = class_index([row for rows in splits.values() for row in rows], class_names)
        folder = files["train"].parent if root == "auto" else root
        sources = {
            split: VideoFiles(
                [
                    Path(row.path) if folder is None else path_inside(Path(folder), row.path, row.where, "video")
                    for row in rows
                ],
                [index[row.label] for row in rows],
            )
            for split, rows in splits.items()
        }
        about = {
            "dataset": "VideoList",
            "task": files["train"].resolve().parent.name,
            "trained_on": "train",
            "selected_on": "val" if "val" in sources else None,
        }
        super().__init__(video_set(sources, names, about), **kwargs)


def _labelled(classes: dict[str, list[Path]], class_names: list[str]) -> VideoFiles:
    pairs = [(path, class_names.index(name)) for name, paths in classes.items() for path in paths]
    return VideoFiles([path for path, _ in pairs], [label for _, label in pairs])
