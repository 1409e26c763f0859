"""Which frames of a video make a clip, by their numbers or by the times at which they are shown.

Uniform: Wang et al. 2016, "Temporal Segment Networks: Towards Good Practices for Deep Action Recognition"
(arXiv 1608.00859). Dense views "ends" are placed as in ST-Adapter (Pan et al. 2022, arXiv 2206.13559), "centred" as in
AIM (Yang et al. 2023, arXiv 2302.03024).

The functions know only the number of frames n, or the length D of the video in seconds; random ones are given their
draws, numbers in [0, 1). Times are counted from the first frame; the frame of a time is the one that a player shows.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from visionpeft.errors import ConfigurationError


def segment_bounds(frames: int, count: int) -> np.ndarray:
    """Bounds b_i = round(i (n - 1) / T) of T segments: int (T + 1,); halves are rounded to even."""
    return np.rint(np.arange(count + 1) * (frames - 1) / count).astype(np.int64)


def uniform_train(frames: int, count: int, draws: np.ndarray) -> np.ndarray:
    """A random frame of each segment, bounds included: b_i + floor(draws_i (b_{i+1} - b_i + 1)), (T,)."""
    bounds = segment_bounds(frames, count)
    return bounds[:-1] + np.floor(np.asarray(draws) * (np.diff(bounds) + 1)).astype(np.int64)


def uniform_test(frames: int, count: int) -> np.ndarray:
    """The middle frame of each segment: (b_i + b_{i+1}) // 2, (T,)."""
    bounds = segment_bounds(frames, count)
    return (bounds[:-1] + bounds[1:]) // 2


def dense_train(
    frames: int, count: int, stride: int, draw: float, too_short: str = "repeat", placement: str = "ends"
) -> np.ndarray:
    """T frames, s apart, from a random start: (T,).

    "ends": among the n - (T - 1) s that fit; "centred": among the first n - T s + 1, so that the s - 1 frames after the
    last one are there, too. 0 where there are none.
    """
    window = count * stride if placement == "centred" else (count - 1) * stride + 1
    starts = max(frames - window, 0) + 1
    indices = math.floor(draw * starts) + np.arange(count) * stride
    if too_short == "repeat_sampled":
        return np.minimum(indices, indices[indices < frames].max())
    return within(indices, frames, too_short)


def dense_test(
    frames: int, count: int, stride: int, clips: int, placement: str = "ends", too_short: str = "repeat"
) -> np.ndarray:
    """V clips of T frames, s apart: (V, T).

    "ends": the first and last clip touch the ends, start_v = round(v slide / (V - 1)), slide = n - (T - 1) s - 1; one
    clip starts at slide // 2. "centred": a clip in each of V equal parts, start_v = floor((v + 0.5) (n - T s + 1) / V).
    All start at 0 where the video is shorter than a clip.
    """
    numbers = np.arange(clips)
    if placement == "centred":
        starts = np.floor((numbers + 0.5) * max(frames - count * stride + 1, 0) / clips)
    else:
        slide = max(frames - ((count - 1) * stride + 1), 0)
        starts = np.rint(numbers * slide / (clips - 1)) if clips > 1 else np.array([slide // 2])
    return within(starts.astype(np.int64)[:, None] + np.arange(count) * stride, frames, too_short)


def uniform_times(length: float, count: int, draws: np.ndarray | float = 0.5) -> np.ndarray:
    """A moment of each of T equal parts of the video, its middle unless drawn: (i + draws_i) D / T, (T,)."""
    return (np.arange(count) + draws) * (length / count)


def dense_times(length: float, count: int, seconds: float, starts: np.ndarray, too_short: str = "repeat") -> np.ndarray:
    """T moments, L / T apart, from each of V starts in seconds: (V, T).

    Past the end they stay at the end of the video ("repeat") or start over ("loop", modulo D).
    """
    times = starts[:, None] + np.arange(count) * (seconds / count)
    return np.mod(times, length) if too_short == "loop" else np.minimum(times, length)


def dense_starts(length: float, seconds: float, clips: int, placement: str = "ends") -> np.ndarray:
    """Starts of V clips of L seconds, with the slide S = D - L, or 0 where the video is shorter: (V,).

    "ends": the first and last clip touch the ends, v S / (V - 1); one clip starts at S / 2. "centred": a clip in each
    of V equal parts, (v + 0.5) S / V.
    """
    slide = max(length - seconds, 0.0)
    if placement == "centred" or clips == 1:
        return (np.arange(clips) + 0.5) * (slide / clips)
    return np.arange(clips) * (slide / (clips - 1))


def within(indices: np.ndarray, frames: int, too_short: str) -> np.ndarray:
    """Indices past the end become the last frame ("repeat", "repeat_sampled") or start over ("loop", modulo n)."""
    return indices % frames if too_short == "loop" else np.minimum(indices, frames - 1)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames make a clip.

    Args:
        kind: "uniform" takes one frame of each of `num_frames` equal parts of the video, a random one in training and
            the middle one in the test; "dense" takes frames `stride` apart, from a random start in training.
        num_frames: T, frames in a clip.
        stride: s, distance of the frames of a dense clip.
        test_clips: dense clips of a video whose predictions are averaged in the test.
        placement: of those clips: "ends", from one end of the video to the other, or "centred" in equal parts; the same
            authors' random starts in training, see `dense_train`.
        too_short: where a video is shorter than a clip, "repeat" its last frame or "loop"; "repeat_sampled" repeats in
            training the last frame that is a multiple of the stride, as ST-Adapter's code does, in the test the last.
        by: "index" counts frames, as the published recipes do; "time" takes the frames that a player shows at equally
            distant moments, so that clips of videos of different or varying rates show the same stretch of time. Files
            without time stamps and folders of frames can only be read by index.
        seconds: length L of a dense clip by time, whose frames are L / T apart; `stride` then stays 1. Kinetics at 30
            frames a second with 8 frames and stride 16 corresponds to 8 x 16 / 30 = 4.27.

    Raises:
        ConfigurationError: an unknown choice, a number below 1, several test clips with uniform sampling, or `seconds`
            missing or beside a choice that does not read them.
    """

    kind: Literal["uniform", "dense"] = "uniform"
    num_frames: int = 8
    stride: int = 1
    test_clips: int = 1
    placement: Literal["ends", "centred"] = "ends"
    too_short: Literal["repeat", "loop", "repeat_sampled"] = "repeat"
    by: Literal["index", "time"] = "index"
    seconds: float | None = None

    def __post_init__(self):
        choices = {
            "kind": ("uniform", "dense"),
            "placement": ("ends", "centred"),
            "too_short": ("repeat", "loop", "repeat_sampled"),
            "by": ("index", "time"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"unknown {name} '{getattr(self, name)}' of frames: {' or '.join(allowed)}")
        for name in ("num_frames", "stride", "test_clips"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be 1 or more")
        if self.kind == "uniform" and self.test_clips > 1:
            raise ConfigurationError(
                f"test_clips {self.test_clips}: uniform sampling covers the whole video with one clip; "
                "use dense sampling for several, or more crops"
            )
        if (self.kind == "dense" and self.by == "time") != (self.seconds is not None):
            raise ConfigurationError(
                f"seconds {self.seconds} with {self.kind} sampling by {self.by}: the length of a clip in seconds "
                "belongs to dense sampling by time, which needs it"
            )
        if self.by == "time" and self.too_short == "repeat_sampled":
            raise ConfigurationError(
                'too_short "repeat_sampled" counts frames, which sampling by time does not; use "repeat"'
            )
        if self.seconds is not None and not (0 < self.seconds < math.inf and self.stride == 1):
            raise ConfigurationError(
                f"seconds {self.seconds} with stride {self.stride}: seconds must be a positive number, and "
                "stride 1, as frames are seconds / num_frames apart"
            )

    def train(self, frames: int, draws: np.ndarray) -> np.ndarray:
        """Frame indices of a training clip, (T,), from T draws in [0, 1) (dense sampling uses the first)."""
        if self.kind == "uniform":
            return uniform_train(frames, self.num_frames, draws)
        return dense_train(frames, self.num_frames, self.stride, float(draws[0]), self.too_short, self.placement)

    def test(self, frames: int, clips: int | None = None) -> np.ndarray:
        """Frame indices of the test clips, (V, T); V is `test_clips` unless `clips` says otherwise."""
        if self.kind == "uniform":
            return uniform_test(frames, self.num_frames)[None]
        clips = self.test_clips if clips is None else clips
        return dense_test(frames, self.num_frames, self.stride, clips, self.placement, self.too_short)

    def train_times(self, length: float, draws: np.ndarray) -> np.ndarray:
        """Seconds from the first frame of a training clip by time, (T,), from T draws (dense uses the first)."""
        if self.kind == "uniform":
            return uniform_times(length, self.num_frames, draws)
        start = np.array([float(draws[0]) * max(length - self.seconds, 0.0)])
        return dense_times(length, self.num_frames, self.seconds, start, self.too_short)[0]

    def test_times(self, length: float, clips: int | None = None) -> np.ndarray:
        """Seconds from the first frame of the test clips by time, (V, T)."""
        if self.kind == "uniform":
            return uniform_times(length, self.num_frames)[None]
        starts = dense_starts(length, self.seconds, self.test_clips if clips is None else clips, self.placement)
        return dense_times(length, self.num_frames, self.seconds, starts, self.too_short)
