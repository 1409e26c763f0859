"""Frame indices, against values worked out by hand."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from visionpeft.data.video.dataset import uniform_draws
from visionpeft.errors import ConfigurationError
from visionpeft.models.video_sampling import FrameSampling


def test_uniform_takes_the_middle_of_each_part():
    # n = 17, T = 4: segments of 4, bounds 0 4 8 12 16.
    assert FrameSampling("uniform", 4).test(17).tolist() == [[2, 6, 10, 14]]
    # n = 11, T = 4: segments of 2.5, bounds 0 2.5 5 7.5 10 rounded to even: 0 2 5 8 10.
    assert FrameSampling("uniform", 4).test(11).tolist() == [[1, 3, 6, 9]]
    # n = 3, T = 8: segments of 1/4, bounds 0 .25 .5 .75 1 1.25 1.5 1.75 2 -> 0 0 0 1 1 1 2 2 2.
    assert FrameSampling("uniform", 8).test(3).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert FrameSampling("uniform", 8).test(1).tolist() == [[0] * 8]


def test_uniform_training_frames_span_their_parts():
    sampling = FrameSampling("uniform", 4)
    # Bounds 0 2 5 8 10: parts {0 1 2} {2 3 4 5} {5 6 7 8} {8 9 10}.
    assert sampling.train(11, np.zeros(4)).tolist() == [0, 2, 5, 8]
    assert sampling.train(11, np.full(4, 0.999)).tolist() == [2, 5, 8, 10]
    assert sampling.train(11, np.array([0.34, 0.5, 0.25, 0.66])).tolist() == [1, 4, 6, 9]
    drawn = [sampling.train(11, uniform_draws(4, 7, epoch)) for epoch in range(3000)]
    counts = Counter(clip[1] for clip in drawn)
    assert sorted(counts) == [2, 3, 4, 5]
    assert min(counts.values()) > 650


def test_dense_training_starts_anywhere_it_fits():
    sampling = FrameSampling("dense", 4, stride=3)
    # n = 14: the window has (4 - 1) 3 + 1 = 10 frames, so starts 0 to 4.
    assert sampling.train(14, np.array([0.0])).tolist() == [0, 3, 6, 9]
    assert sampling.train(14, np.array([0.999])).tolist() == [4, 7, 10, 13]
    assert sampling.train(14, np.array([0.59])).tolist() == [2, 5, 8, 11]
    assert sampling.train(10, np.array([0.999])).tolist() == [0, 3, 6, 9]
    starts = Counter(int(sampling.train(14, uniform_draws(4, 1, epoch))[0]) for epoch in range(2000))
    assert sorted(starts) == [0, 1, 2, 3, 4]


def test_short_videos_repeat_or_loop():
    repeated, looped = (FrameSampling("dense", 4, stride=3, too_short=choice) for choice in ("repeat", "loop"))
    for indices in (repeated.train(7, np.array([0.9])), repeated.test(7)[0]):
        assert indices.tolist() == [0, 3, 6, 6]
    for indices in (looped.train(7, np.array([0.9])), looped.test(7)[0]):
        assert indices.tolist() == [0, 3, 6, 2]


def test_dense_test_clips_from_end_to_end():
    # n = 20, window 10, slide 10: starts round(10 v / 2) = 0 5 10.
    sampling = FrameSampling("dense", 4, stride=3, test_clips=3)
    assert sampling.test(20).tolist() == [[0, 3, 6, 9], [5, 8, 11, 14], [10, 13, 16, 19]]
    assert sampling.test(20, clips=1).tolist() == [[5, 8, 11, 14]]
    # Slide 3: round(1.5) is 2.
    assert sampling.test(13)[:, 0].tolist() == [0, 2, 3]
    assert sampling.test(5)[:, 0].tolist() == [0, 0, 0]


def test_dense_test_clips_centred_in_equal_parts():
    # n = 25, T s = 12, n - T s + 1 = 14: starts floor(14 (v + 0.5) / 3) = floor(2.33, 7, 11.67).
    sampling = FrameSampling("dense", 4, stride=3, test_clips=3, placement="centred")
    assert sampling.test(25)[:, 0].tolist() == [2, 7, 11]
    assert sampling.test(25)[0].tolist() == [2, 5, 8, 11]
    assert sampling.test(25, clips=1)[:, 0].tolist() == [7]
    assert sampling.test(11)[:, 0].tolist() == [0, 0, 0]


def test_uniform_times_are_those_of_equal_parts():
    sampling = FrameSampling("uniform", 4, by="time")
    # 10 s in parts of 2.5 s.
    assert sampling.test_times(10.0).tolist() == [[1.25, 3.75, 6.25, 8.75]]
    assert sampling.train_times(10.0, np.array([0.0, 0.5, 0.2, 0.8])).tolist() == [0.0, 3.75, 5.5, 9.5]


def test_dense_times():
    sampling = FrameSampling("dense", 4, test_clips=3, by="time", seconds=2.0)
    # A clip of 2 s slides over 6 of 8 s; frames are 0.5 s apart.
    assert sampling.test_times(8.0).tolist() == [[0.0, 0.5, 1.0, 1.5], [3.0, 3.5, 4.0, 4.5], [6.0, 6.5, 7.0, 7.5]]
    assert sampling.test_times(8.0, clips=1).tolist() == [[3.0, 3.5, 4.0, 4.5]]
    centred = dataclasses.replace(sampling, placement="centred")
    assert centred.test_times(8.0)[:, 0].tolist() == [1.0, 3.0, 5.0]
    assert sampling.train_times(8.0, np.array([0.75, 0, 0, 0])).tolist() == [4.5, 5.0, 5.5, 6.0]
    # A video of 1.2 s: all clips start at 0, and what is past its end is at the end, or from the beginning.
    assert sampling.test_times(1.2)[2].tolist() == [0.0, 0.5, 1.0, 1.2]
    looped = dataclasses.replace(sampling, too_short="loop")
    assert looped.test_times(1.2)[2].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="dense", by="time"), "seconds None with dense sampling by time"),
        (dict(kind="dense", seconds=1.0), "seconds 1.0 with dense sampling by index"),
        (dict(kind="uniform", by="time", seconds=1.0), "seconds 1.0 with uniform sampling by time"),
        (dict(kind="dense", by="time", seconds=0.0), "must be a positive number"),
        (dict(kind="dense", by="time", seconds=float("nan")), "must be a positive number"),
        (dict(kind="dense", by="time", seconds=1.0, stride=2), "and stride 1, as"),
        (dict(by="frames"), "unknown by 'frames' of frames: index or time"),
    ],
)
def test_wrong_choices_of_times(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FrameSampling(**options)


@pytest.mark.parametrize("kind", ["uniform", "dense"])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("too_short", ["repeat", "loop"])
def test_indices_lie_in_the_video(kind, frames, too_short):
    for placement in ("ends", "centred"):
        clips = 1 if kind == "uniform" else 4
        sampling = FrameSampling(kind, 8, 5, clips, placement, too_short)
        for epoch in range(20):
            indices = sampling.train(frames, uniform_draws(8, epoch))
            assert indices.shape == (8,)
            assert indices.min() >= 0
            assert indices.max() < frames
        views = sampling.test(frames)
        assert views.shape == (clips, 8)
        assert views.min() >= 0
        assert views.max() < frames


def test_wrong_choices():
    with pytest.raises(ConfigurationError, match="unknown kind 'tsn' of frames: uniform or dense"):
        FrameSampling("tsn")
    with pytest.raises(ConfigurationError, match="num_frames 0 must be 1 or more"):
        FrameSampling(num_frames=0)
    with pytest.raises(ConfigurationError, match="test_clips 3: uniform sampling covers the whole video"):
        FrameSampling("uniform", 8, test_clips=3)
