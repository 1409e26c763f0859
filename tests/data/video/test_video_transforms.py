"""What is done to clips: the same to all frames, by seeds alone, against values computed by hand or by Pillow."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.video.transforms import ClipAugmentation, ClipTransform
from visionpeft.errors import ConfigurationError

PLAIN = Preprocessing((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 0.8)
EVERYTHING = ClipAugmentation("random_resized_crop", flip=True, randaugment=4, magnitude=7, erasing=0.5)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def places(height, width, frames=3):
    """A clip whose pixels tell their own column and row, and the frame."""
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    clip = torch.stack([columns, rows, torch.zeros_like(rows)]).expand(frames, 3, height, width).clone()
    clip[:, 2] = torch.arange(frames).view(-1, 1, 1)
    return clip.to(torch.uint8)


@pytest.mark.parametrize(("size", "scaled"), [((100, 60), (53, 32)), ((60, 100), (32, 53)), ((8, 8), (32, 32))])
def test_frames_are_resized_to_cover_the_input(size, scaled):
    frame = picture(*size)
    expected = frame.resize(scaled, Image.Resampling.BICUBIC)
    assert torch.equal(ClipTransform(PLAIN).prepare(frame), pixels(expected))


@pytest.mark.parametrize(
    ("augmentation", "short"),
    [
        (ClipAugmentation("centre"), 224),
        (ClipAugmentation("jitter"), 257),
        (ClipAugmentation("random_resized_crop"), 256),
    ],
)
def test_training_frames_are_as_large_as_the_crop_needs(augmentation, short):
    transform = ClipTransform(dataclasses.replace(PLAIN, input_size=(224, 224)), augmentation)
    assert transform.prepare(picture(340, 256)).shape == (3, short, round(340 * short / 256))


def test_one_and_three_crops():
    clip = places(32, 53)
    transform = ClipTransform(PLAIN)
    centre, three = transform.crops(clip), transform.crops(clip, 3)
    assert centre.shape == (1, 3, 3, 32, 32)
    # The margin is 21: crops at 0, 10 and 21.
    assert [int(view[0, 0].min()) for view in three] == [0, 10, 21]
    assert torch.equal(centre[0], three[1])
    tall = transform.crops(places(53, 32), 3)
    assert [int(view[0, 1].min()) for view in tall] == [0, 10, 21]
    assert all(int(view[0, 0].min()) == 0 for view in tall)
    square = transform.crops(places(32, 32), 3)
    assert torch.equal(square[0], square[2])


@pytest.mark.parametrize(
    "augmentation",
    [
        ClipAugmentation("jitter", flip=True),
        ClipAugmentation("random_resized_crop", flip=True),
        ClipAugmentation("centre", randaugment=2),
        EVERYTHING,
    ],
)
def test_all_frames_of_a_clip_are_treated_alike(augmentation):
    transform = ClipTransform(PLAIN, augmentation)
    frame = transform.prepare(picture(60, 44))
    changed = False
    for draw in range(40):
        clip = transform.augment(frame.expand(5, *frame.shape), 3, draw)
        assert clip.shape == (5, 3, 32, 32)
        assert clip.dtype == torch.uint8
        assert all(torch.equal(clip[0], other) for other in clip[1:])
        changed |= not torch.equal(clip, transform.augment(frame.expand(5, *frame.shape), 3, draw + 1))
    assert changed


def test_augmentation_is_a_function_of_its_seeds_and_spares_the_global_one():
    transform = ClipTransform(PLAIN, EVERYTHING)
    clip = places(44, 60)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = [transform.augment(clip, 1, epoch, 5) for epoch in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = [transform.augment(clip, 1, epoch, 5) for epoch in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({one.numpy().tobytes() for one in first}) > 5


def test_jitter_scales_and_cuts_anywhere():
    transform = ClipTransform(dataclasses.replace(PLAIN, interpolation="nearest"), ClipAugmentation("jitter", jitter=2))
    clip = places(64, 100)
    widths, lefts = [], []
    for draw in range(300):
        columns = transform.augment(clip, draw)[0, 0]
        widths.append((int(columns.max()) - int(columns.min())) * 32 / 31)
        lefts.append(int(columns.min()))
    # Frames cover twice the input: a cut is 32 (scale 2) to 64 (scale 1) pixels wide.
    assert 30 <= min(widths) < 34
    assert 62 < max(widths) <= 66
    # Scales are uniform, widths 64 / s: the middle is at scale 1.5.
    assert np.median(widths) == pytest.approx(64 / 1.5, abs=2)
    assert min(lefts) <= 2
    assert max(lefts) >= 60


def test_random_resized_crop_cuts_the_shares_it_is_given():
    augmentation = ClipAugmentation("random_resized_crop", area=(0.25, 0.5))
    transform = ClipTransform(dataclasses.replace(PLAIN, interpolation="nearest"), augmentation)
    shares = []
    for draw in range(200):
        clip = transform.augment(places(128, 128), draw)
        width, height = (int(clip[0, c].max() - clip[0, c].min()) * 32 / 31 for c in (0, 1))
        shares.append(width * height / 128**2)
    assert 0.22 < min(shares) < 0.3
    assert 0.45 < max(shares) < 0.54


@pytest.mark.parametrize(("flip", "share"), [(False, 0), (True, 0.5)])
def test_flip(flip, share):
    transform = ClipTransform(PLAIN, ClipAugmentation("jitter", flip=flip))
    mirrored = [
        bool((cut := transform.augment(places(36, 36), draw))[0, 0, 0, 0] > cut[0, 0, 0, -1]) for draw in range(300)
    ]
    assert np.mean(mirrored) == pytest.approx(share, abs=0.1)


def test_erasing_fills_with_the_mean_colour():
    preprocessing = dataclasses.replace(PLAIN, mean=(0.5, 0.2, 0.9), std=(0.1, 0.2, 0.3))
    transform = ClipTransform(preprocessing, ClipAugmentation("centre", erasing=1.0))
    black = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    erased = transform.normalise(transform.augment(black, 1))
    values = erased[0].unique()
    assert len(values) == 2
    assert values[1].abs() < 0.02  # 0.5 * 255 rounded
    assert (erased[0, 0] == erased[0, 0].max()).sum() > 10


def test_normalised_clips_have_channels_first():
    transform = ClipTransform(dataclasses.replace(PLAIN, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    clips = torch.randint(0, 256, (2, 4, 5, 3, 32, 32), dtype=torch.uint8)
    normalised = transform.normalise(clips)
    assert normalised.shape == (2, 4, 3, 5, 32, 32)
    assert normalised.dtype == torch.float32
    mean, std = torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1), torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    expected = (clips[1, 2, 3].double() / 255 - mean) / std
    torch.testing.assert_close(normalised[1, 2, :, 3].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(2000, 30), (30, 2000), (3, 3)])
@pytest.mark.parametrize("crop", ["centre", "jitter", "random_resized_crop"])
def test_any_aspect(size, crop):
    transform = ClipTransform(dataclasses.replace(PLAIN, input_size=(16, 48)), ClipAugmentation(crop))
    frame = transform.prepare(picture(*size))
    assert transform.augment(frame[None], 0).shape == (1, 3, 16, 48)
    scored = ClipTransform(dataclasses.replace(PLAIN, input_size=(16, 48)))
    assert scored.crops(scored.prepare(picture(*size))[None], 3).shape == (3, 1, 3, 16, 48)


def test_wrong_options():
    with pytest.raises(ConfigurationError, match="unknown crop 'random'"):
        ClipAugmentation("random")
    with pytest.raises(ConfigurationError, match="area"):
        ClipAugmentation(area=(0.5, 0.1))
    with pytest.raises(ConfigurationError, match=r"jitter 0\.9 must be 1 or more"):
        ClipAugmentation(jitter=0.9)
    with pytest.raises(ConfigurationError, match="magnitude 12 0 to 10"):
        ClipAugmentation(magnitude=12)
    with pytest.raises(ConfigurationError, match="not lanczos"):
        ClipTransform(dataclasses.replace(PLAIN, interpolation="lanczos"))
