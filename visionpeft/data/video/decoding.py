"""Decoding single frames of an encoded video, from the nearest keyframe on, and showing them as a player does."""

from collections.abc import Iterator, Sequence, Set

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from visionpeft.data.video.frame_index import REMEDY, FrameIndex
from visionpeft.errors import DataError

# A decoder may return a frame or two fewer than there are packets (DivX); the last frame then stands for them.
MISSING_AT_END = 2


class Overshot(Exception):
    """Seeking led past the frame that was asked for."""


def by_time(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: FrameIndex,
    wanted: Sequence[int],
    seeks: bool,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices, each sought from the last keyframe before it, or all decoded in one go.

    A frame that the decoder leaves out (one whose references were cut away) is replaced by the next one.

    Raises:
        Overshot: the container cannot seek to where it is asked to.
    """
    needed = set(index.times[list(wanted)].tolist())
    frames = decoded_frames(container, stream, needed)
    frame, position = None, -1  # the last decoded frame and its index
    for target in wanted:
        key = int(np.searchsorted(index.keyframes, index.times[target], side="right")) - 1
        start = int(np.searchsorted(index.times, index.keyframes[key])) if key > 0 else 0
        if seeks and start > max(position, 0):
            # Some containers land after the keyframe they were asked for; then from an earlier one.
            for attempt in (key, key - 2):
                container.seek(int(index.keyframes[max(attempt, 0)]), stream=stream, backward=True)
                frames = decoded_frames(container, stream, needed)
                frame = next(frames, None)
                position = index.frames if frame is None else _position(index, frame)
                if position <= target:
                    break
            else:
                raise Overshot
        while position < target and (following := next(frames, None)) is not None:
            frame, position = following, _position(index, following)
        if frame is None or not _serves(position, target, index.frames):
            return
        yield target, frame


def by_counting(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: FrameIndex,
    wanted: Sequence[int],
    seeks: bool,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices, decoded from the beginning."""
    frame, position = None, -1
    frames = decoded_frames(container, stream)
    for target in wanted:
        while position < target and (following := next(frames, None)) is not None:
            frame, position = following, position + 1
        if frame is None or not _serves(position, target, index.frames):
            return
        yield target, frame


def _serves(position: int, target: int, frames: int) -> bool:
    """Whether the frame at which decoding stopped can be shown for the one asked for."""
    return position >= target or (target >= frames - MISSING_AT_END and position >= target - MISSING_AT_END)


def decoded_frames(
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


def upright(frame: av.VideoFrame, converter: VideoReformatter) -> Image.Image:
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
