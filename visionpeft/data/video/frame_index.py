"""Where the frames of an encoded video are, looked up once in its packets and without decoding."""

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from visionpeft.errors import DataError

REMEDY = "repair or remove it, or set skip_corrupt to leave it out"


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of an encoded video are.

    Args:
        frames: number of frames.
        times: time stamp of each frame in order of presentation, int64 (frames,); empty where the file has none that
            can be relied on, and frames can only be counted from the beginning.
        keyframes: time stamps of the keyframes, int64, ascending.
        time_base: seconds of one unit of the time stamps.
        last: units of it for which the last frame is shown; the mean of the others where the file does not say.
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


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
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


def index_of(path: Path) -> FrameIndex:
    """Time stamps and keyframes from the packets, without decoding."""
    times, keyframes = array("q"), array("q")
    frames, ticks, same, end = 0, 0, True, 0.0
    latest, lasting = None, 0  # time stamp of the frame that is shown last, and for how long
    with opened(path) as (container, stream):
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
