"""Reading single frames of videos: encoded files by PyAV, decoding from the nearest keyframe on, and folders of frames.

A frame is known by its place in order of presentation, whatever the frame rate does. Memory holds eight bytes for each
frame of a video and what is made of the frames asked for, however long the video is.
"""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from visionpeft.data.images import EXTENSIONS as IMAGE_EXTENSIONS
from visionpeft.data.images import list_images, open_image
from visionpeft.data.video.decoding import (
    MISSING_AT_END,
    Overshot,
    by_counting,
    by_time,
    decoded_frames,
    upright,
)
from visionpeft.data.video.frame_index import REMEDY, FrameIndex, index_of, opened
from visionpeft.errors import DataError

EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .ts .mts .m2ts .ogv .gif".split()  # noqa: SIM905
)
Prepared = TypeVar("Prepared")


def open_video(path: Path, index: FrameIndex | None = None) -> "EncodedVideo | FrameFolder":
    """A video file or a folder of frames, with `len` and `read`.

    Args:
        path: file or folder.
        index: of a file that was opened before.

    Raises:
        DataError: the file is missing, damaged, cut off or holds no video; the folder holds no images.
    """
    return FrameFolder(path) if path.is_dir() else EncodedVideo(path, index)


def list_videos(folder: Path) -> list[Path]:
    """Videos under `folder`, at any depth, sorted: video files, and folders that directly hold images (frames)."""
    found = set()
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if path.suffix.lower() in EXTENSIONS:
            found.add(path)
        elif path.suffix.lower() in IMAGE_EXTENSIONS and path.parent != folder:
            found.add(path.parent)
    return sorted(found)


class FrameFolder:
    """A folder of images, which are the frames in the order of the numbers in their names.

    Args:
        path: the folder.

    Raises:
        DataError: it holds no images.
    """

    index = None

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted((file for file in list_images(path) if file.parent == path), key=_numbered)
        if not self.files:
            raise DataError(f"video folder {path} holds no frames (images); {REMEDY}")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def length(self) -> float:
        """Refused, because images have no times.

        Raises:
            DataError: always.
        """
        raise self._timeless()

    def at(self, seconds: Sequence[float]) -> list[int]:
        """Refused like `length`."""
        raise self._timeless()

    def _timeless(self) -> DataError:
        return DataError(
            f"video folder {self.path} holds images, and nobody knows when one is shown; sample its frames by index"
        )

    def read(self, indices: Sequence[int], prepare: Callable[[Image.Image], Prepared]) -> dict[int, Prepared]:
        """`prepare(frame)` for each of the indices; raises DataError when a frame is damaged."""
        return {index: prepare(open_image(self.files[index])) for index in sorted(set(indices))}

    def check(self) -> None:
        """Read all frames; raises DataError naming one that is damaged, or when they are not of one size."""
        if len({open_image(file).size for file in self.files}) > 1:
            raise of_several_sizes(str(self.path))


class EncodedVideo:
    """A video file.

    Args:
        path: the file.
        index: from an earlier look at the file; made now, without decoding, when absent.

    Raises:
        DataError: the file is missing, damaged, cut off, too large in pixels, or holds no video.
    """

    def __init__(self, path: Path, index: FrameIndex | None = None):
        self.path = path
        self.index = index_of(path) if index is None else index

    def __len__(self) -> int:
        return self.index.frames

    def read(self, indices: Sequence[int], prepare: Callable[[Image.Image], Prepared]) -> dict[int, Prepared]:
        """`prepare(frame)` for each of the indices, in a single pass; frames are upright RGB images.

        Raises:
            DataError: a frame that is needed is damaged.
        """
        wanted = sorted(set(indices))
        try:
            found = self._read(wanted, prepare, seeks=True)
        except Overshot:
            found = self._read(wanted, prepare, seeks=False)
        if len(found) < len(wanted):
            missing = next(index for index in wanted if index not in found)
            raise DataError(f"video file {self.path} cannot be read (no frame {missing} of {len(self)}); {REMEDY}")
        return found

    @property
    def length(self) -> float:
        """Seconds from the time stamp of the first frame to the end of the last.

        Raises:
            DataError: the file has no time stamps that can be relied on.
        """
        self._require_times()
        return float((self.index.times[-1] - self.index.times[0] + self.index.last) * self.index.time_base)

    def _require_times(self) -> None:
        if not len(self.index.times):
            raise DataError(
                f"video file {self.path} has no time stamps, so that nobody knows when a frame is shown; name its "
                "frames by their numbers (sample them by index)"
            )

    def at(self, seconds: Sequence[float]) -> list[int]:
        """Index of the frame that a player shows at each of these times, counted from the first frame.

        A frame is shown from its own time stamp until that of the next one, whatever the file says of its rate; at
        times before the first frame that is the first, after the last the last.

        Raises:
            DataError: the file has no time stamps that can be relied on.
        """
        self._require_times()
        # In integers: a product of floats could fall just below the time stamp that it names.
        ticks = [math.floor(Fraction(second).limit_denominator(10**9) / self.index.time_base) for second in seconds]
        places = np.searchsorted(self.index.times, np.array(ticks, np.int64) + self.index.times[0], side="right") - 1
        return np.clip(places, 0, len(self) - 1).tolist()

    def _read(
        self, wanted: Sequence[int], prepare: Callable[[Image.Image], Prepared], seeks: bool
    ) -> dict[int, Prepared]:
        with opened(self.path) as (container, stream):
            find = by_time if len(self.index.times) else by_counting
            converter = VideoReformatter()
            return {
                index: prepare(upright(frame, converter))
                for index, frame in find(container, stream, self.index, wanted, seeks)
            }

    def check(self) -> None:
        """Decode everything once; raises DataError when something is damaged, or frames are not of one size."""
        with opened(self.path) as (container, stream):
            sizes = [(frame.width, frame.height) for frame in decoded_frames(container, stream)]
        decoded = len(sizes)
        if len(set(sizes)) > 1:
            raise of_several_sizes(str(self.path))
        if decoded < len(self) - MISSING_AT_END or decoded == 0:
            raise DataError(f"video file {self.path} cannot be read ({decoded} of {len(self)} frames); {REMEDY}")


def of_several_sizes(name: str) -> DataError:
    """What is said of a video whose frames change their size, as those of recorded calls and joined streams may."""
    return DataError(
        f"the frames of video {name} are not of one size; write it again at one size (ffmpeg -i IN -vf scale=W:H OUT), "
        "remove it, or set skip_corrupt to leave it out"
    )


def _numbered(file: Path) -> list[tuple[int, int | str]]:
    """Sort key under which frame 2 comes before frame 10."""
    parts = re.split(r"(\d+)", file.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
