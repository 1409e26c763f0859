"""Reading single frames of videos: encoded files by PyAV, decoding from the nearest keyframe on, and folders of frames.

A frame is known by its place in order of presentation, whatever the frame rate does. Memory holds eight bytes for each
frame of a video and what is made of the frames asked for, however long the video is.
"""

import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from visionpeft.data.images import EXTENSIONS as IMAGE_EXTENSIONS
from visionpeft.data.images import list_images, open_image
from visionpeft.errors import DataError

EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .ts .mts .m2ts .ogv .gif".split()  # noqa: SIM905
)
REMEDY = "repair or remove it, or set skip_corrupt to leave it out"
# A decoder may return a frame or two fewer than there are packets (DivX); the last frame then stands for them.
MISSING_AT_END = 2

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of an encoded video are.

    Args:
        frames: Number of frames.
        times: Time stamp of each frame in order of presentation, int64 (frames,); empty where the file has none that
            can be relied on, and frames can only be counted from the beginning.
        keyframes: Time stamps of the keyframes, int64, ascending.
        time_base: Seconds of one unit of the time stamps.
        last: Units of it for which the last frame is shown; the mean of the others where the file does not say.
    """

    frames: int
    times: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction
    last: int = 0

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.times.nbytes + self.keyframes.nbytes


def open_video(path: Path, index: FrameIndex | None = None) -> "EncodedVideo | FrameFolder":
    """A video file or a folder of frames, with `len` and `read`.

    Args:
        path: File or folder.
        index: Of a file that was opened before.

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
        path: The folder.

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
        """Read all frames; raises DataError naming one that is damaged."""
        for file in self.files:
            open_image(file)


class EncodedVideo:
    """A video file.

    Args:
        path: The file.
        index: From an earlier look at the file; made now, without decoding, when absent.

    Raises:
        DataError: the file is missing, damaged, cut off, too large in pixels, or holds no video.
    """

    def __init__(self, path: Path, index: FrameIndex | None = None):
        self.path = path
        self.index = _index(path) if index is None else index

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
        except _Overshot:
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
        with _opened(self.path) as (container, stream):
            find = _by_time if len(self.index.times) else _by_counting
            converter = VideoReformatter()
            return {
                index: prepare(_upright(frame, converter))
                for index, frame in find(container, stream, self.index, wanted, seeks)
            }

    def check(self) -> None:
        """Decode everything once; raises DataError when something is damaged."""
        with _opened(self.path) as (container, stream):
            decoded = sum(1 for _ in _decoded(container, stream))
        if decoded < len(self) - MISSING_AT_END or decoded == 0:
            raise DataError(f"video file {self.path} cannot be read ({decoded} of {len(self)} frames); {REMEDY}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Container and first video stream; PyAV's errors become DataError."""
    if not path.is_file():
        raise DataError(f"video file {path} does not exist")
    if path.stat().st_size == 0:
        raise DataError(f"video file {path} is empty; {REMEDY}")
    try:
        # As a file and nothing else: a list of streams under a video's name must not open other files or the network.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            stream = next((stream for stream in container.streams.video if _moves(stream)), None)
            if stream is None:
                held = ", ".join(sorted({stream.type for stream in container.streams} - {"video"})) or "nothing"
                raise DataError(f"video file {path} holds no video that can be decoded, only {held}; {REMEDY}")
            # Workers run side by side already.
            stream.codec_context.thread_count = 1
            pixels = stream.codec_context.width * stream.codec_context.height
            if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
                raise DataError(f"video file {path} is refused: frames of {pixels} pixels, above Pillow's limit")
            yield container, stream
    except (av.FFmpegError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = "its data are damaged" if isinstance(error, av.InvalidDataError) else str(error).splitlines()[0]
        raise DataError(f"video file {path} cannot be read ({reason}); {REMEDY}") from error


def _moves(stream: av.VideoStream) -> bool:
    """Whether there is a decoder, and the stream is not the cover picture of a piece of music."""
    return stream.codec_context is not None and not stream.disposition & Disposition.attached_pic


def _index(path: Path) -> FrameIndex:
    """Time stamps and keyframes from the packets, without decoding."""
    times, keyframes = array("q"), array("q")
    frames, ticks, same, end = 0, 0, True, 0.0
    latest, lasting = None, 0  # time stamp of the frame that is shown last, and for how long
    with _opened(path) as (container, stream):
        for packet in container.demux():
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise DataError(f"video file {path} is damaged or cut off; {REMEDY}")
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            frames += 1
            same &= packet.pts == packet.dts
            ticks = max(ticks, (packet.dts or 0) + 1)
            if packet.pts is not None:
                times.append(packet.pts)
                if latest is None or packet.pts > latest:
                    latest, lasting = packet.pts, packet.duration or 0
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
        declared = (container.duration or 0) / 1e6
        begin = (container.start_time or 0) / 1e6
        # AVI has no time stamps of presentation; those that are reported follow the order of decoding.
        is_avi = "avi" in container.format.name
        reliable = not is_avi or (same and not stream.codec_context.has_b_frames)
        # What it counts are not frames but ticks of its rate, most of which are empty where the rate varies.
        promised = stream.frames if is_avi else 0
        time_base = stream.time_base
    if frames == 0:
        raise DataError(f"video file {path} holds no frames; {REMEDY}")
    # What is declared is a length or, in Matroska, the last time stamp.
    length = end - min(begin, 0.0)
    if declared - length > max(1.0, 0.1 * declared) or max(frames, ticks) < 0.9 * promised:
        raise DataError(f"video file {path} is cut off after {length:.1f} of {declared:.1f} seconds; {REMEDY}")
    stamps = np.unique(np.frombuffer(times, np.int64)) if times else np.zeros(0, np.int64)
    if len(stamps) < frames or len(keyframes) == 0 or not reliable:
        stamps = np.zeros(0, np.int64)
    if not lasting and len(stamps) > 1:
        lasting = max(1, round(int(stamps[-1] - stamps[0]) / (len(stamps) - 1)))
    return FrameIndex(frames, stamps, np.sort(np.array(keyframes, np.int64)), time_base, lasting)


class _Overshot(Exception):
    """Seeking led past the frame that was asked for."""


def _by_time(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: FrameIndex,
    wanted: Sequence[int],
    seeks: bool,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices, each sought from the last keyframe before it, or all decoded in one go.

    A frame that the decoder leaves out (one whose references were cut away) is replaced by the next one.

    Raises:
        _Overshot: the container cannot seek to where it is asked to.
    """
    needed = set(index.times[list(wanted)].tolist())
    frames = _decoded(container, stream, needed)
    frame, position = None, -1  # the last decoded frame and its index
    for target in wanted:
        key = int(np.searchsorted(index.keyframes, index.times[target], side="right")) - 1
        start = int(np.searchsorted(index.times, index.keyframes[key])) if key > 0 else 0
        if seeks and start > max(position, 0):
            # Some containers land after the keyframe they were asked for; then from an earlier one.
            for attempt in (key, key - 2):
                container.seek(int(index.keyframes[max(attempt, 0)]), stream=stream, backward=True)
                frames = _decoded(container, stream, needed)
                frame = next(frames, None)
                position = index.frames if frame is None else _position(index, frame)
                if position <= target:
                    break
            else:
                raise _Overshot
        while position < target and (following := next(frames, None)) is not None:
            frame, position = following, _position(index, following)
        if frame is None or not _serves(position, target, index.frames):
            return
        yield target, frame


def _by_counting(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: FrameIndex,
    wanted: Sequence[int],
    seeks: bool,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices, decoded from the beginning."""
    frame, position = None, -1
    frames = _decoded(container, stream)
    for target in wanted:
        while position < target and (following := next(frames, None)) is not None:
            frame, position = following, position + 1
        if frame is None or not _serves(position, target, index.frames):
            return
        yield target, frame


def _serves(position: int, target: int, frames: int) -> bool:
    """Whether the frame at which decoding stopped can be shown for the one asked for."""
    return position >= target or (target >= frames - MISSING_AT_END and position >= target - MISSING_AT_END)


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, needed: Set[int] | None = None
) -> Iterator[av.VideoFrame]:
    """Frames in order of presentation; raises DataError at one that the decoder marks as damaged.

    Frames to which no other refers are decoded only where their time stamp is `needed`, or all of them.
    """
    for packet in container.demux(stream):
        if needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DataError(f"video file {container.name.removeprefix('file:')} has damaged frames; {REMEDY}")
            yield frame


def _position(index: FrameIndex, frame: av.VideoFrame) -> int:
    """Index of a decoded frame."""
    if frame.pts is None:
        raise ValueError("a frame without a time stamp")
    return int(np.searchsorted(index.times, frame.pts, side="right")) - 1


def _upright(frame: av.VideoFrame, converter: VideoReformatter) -> Image.Image:
    """RGB image as a player shows it: turned in quarters of a turn and mirrored, as the display matrix asks for.

    The matrix (a b u; c d v; x y w) takes a pixel to (a x + c y, b x + d y), y pointing down. PyAV's `rotation` is the
    angle alone and calls a mirrored picture one that is turned by 180 degrees.
    """
    # Without a converter of its own, each frame would start threads to be converted.
    image = converter.reformat(frame, format="rgb24", threads=1).to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        horizontal, vertical = c, b
    else:
        horizontal, vertical = a, d
    if horizontal < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if vertical < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def _numbered(file: Path) -> list[tuple[int, int | str]]:
    """Sort key under which frame 2 comes before frame 10."""
    parts = re.split(r"(\d+)", file.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
