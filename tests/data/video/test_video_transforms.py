"""What is done to clips: the same to all frames, by seeds alone, against values computed by hand or by Pillow."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.video.transforms import ClipAugmentation, ClipTransform, _JitteredCover
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


def bilinear(image, height, width):
    """Bilinear interpolation without antialiasing of (3, h, w), corners not aligned, in float64."""
    for axis, length in ((1, height), (2, width)):
        old = image.shape[axis]
        at = ((np.arange(length) + 0.5) * old / length - 0.5).clip(0, old - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, old - 1), at - low
        shape = [1, 1, 1]
        shape[axis] = length
        share = share.reshape(shape)
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image


@pytest.mark.parametrize("size", [(101, 60), (60, 101), (20, 20)])
def test_resizing_as_tensors_is_published(size):
    """ST-Adapter's test: w * 32 // h, bilinear or bicubic, not antialiased, not rounded to whole values."""
    width, height = size
    frame = picture(width, height)
    scaled = (32, width * 32 // height) if height < width else (height * 32 // width, 32)
    transform = ClipTransform(dataclasses.replace(PLAIN, interpolation="bilinear"), resizing="tensor")
    found = transform.prepare(frame)
    expected = bilinear(pixels(frame).double().numpy(), *scaled)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < 1e-3
    by_pillow = ClipTransform(dataclasses.replace(PLAIN, interpolation="bilinear")).prepare(frame)
    if size == (101, 60):
        assert by_pillow.shape[-1] == 54  # rounded, not cut down to 53
    elif size == (20, 20):
        assert np.abs(by_pillow.numpy() - expected).max() < 2  # enlarged, nothing is antialiased


@pytest.mark.parametrize("crop", ["centre", "jitter", "random_resized_crop"])
def test_training_clips_resized_as_tensors(crop):
    transform = ClipTransform(PLAIN, ClipAugmentation(crop, flip=True), "tensor")
    frame = transform.prepare(picture(60, 44))
    assert torch.equal(frame, pixels(picture(60, 44)))  # cut from the frame as it is
    clip = transform.augment(frame.expand(3, *frame.shape), 1, 2)
    assert (clip.dtype, clip.shape) == (torch.float32, (3, 3, 32, 32))
    assert all(torch.equal(clip[0], other) for other in clip[1:])
    assert float(clip.frac().abs().max()) > 0 or crop == "centre"


def test_jitter_of_tensors_covers_whole_pixels():
    """The short side is a whole number from 224 to round(1.15 * 224) = 258, all of them but the ends equally often."""
    transform = ClipTransform(
        dataclasses.replace(PLAIN, input_size=(224, 224)), ClipAugmentation("jitter", jitter=1.15), "tensor"
    )
    step = next(each for each in transform._random.transforms if isinstance(each, _JitteredCover))
    torch.manual_seed(0)
    clip = torch.zeros(1, 1, 24, 32)
    sizes = [tuple(step(clip).shape[-2:]) for _ in range(600)]
    heights = {height for height, _ in sizes}
    assert (min(heights), max(heights)) == (224, 258)
    assert all(width == height * 32 // 24 for height, width in sizes)


def unchanged(policy):
    """The share of clips that are left as they are."""
    transform = ClipTransform(PLAIN, ClipAugmentation("centre", policy=policy))
    clip = transform.prepare(picture(32, 32)).expand(2, 3, 32, 32)
    return np.mean([torch.equal(transform.augment(clip, draw), clip) for draw in range(500)])


def test_operations_of_a_policy_have_probability_one_half():
    """None of 4 out of 15, of which autocontrast changes nothing of a noisy picture: (1 / 2 + 1 / 30)^4 = .081."""
    assert unchanged("rand-m7-n4-mstd0.5-inc1") == pytest.approx(0.081, abs=0.036)  # three standard deviations
    assert unchanged("rand-m7-n4-mstd0.5-inc1-p1") < 0.01


def test_a_policy_is_drawn_once_for_a_clip_and_spares_the_global_generators():
    transform = ClipTransform(PLAIN, ClipAugmentation("centre", policy="rand-m7-n4-mstd0.5-inc1"))
    clip = transform.prepare(picture(32, 32)).expand(4, 3, 32, 32)
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    made = [transform.augment(clip, draw) for draw in range(40)]
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert all(torch.equal(one[0], frame) for one in made for frame in one)
    assert all(torch.equal(one, transform.augment(clip, draw)) for draw, one in enumerate(made))
    assert len({one.numpy().tobytes() for one in made}) > 25


def test_policies_that_make_no_sense():
    for policy in ("rand-x7", "augmix-m3", "rand-mseven"):
        with pytest.raises(ConfigurationError, match="is no RandAugment of timm's"):
            ClipAugmentation(policy=policy)
    with pytest.raises(ConfigurationError, match="two kinds of RandAugment"):
        ClipAugmentation(policy="rand-m7-n4", randaugment=2)
