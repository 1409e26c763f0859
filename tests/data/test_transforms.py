"""Resizing, cropping, augmentation and normalisation, against values computed by hand or by Pillow."""

import dataclasses
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.transforms import ImageTransform, covering
from visionpeft.errors import ConfigurationError

PLAIN = Preprocessing((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 0.8)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_squash_is_pillows_resize(interpolation):
    transform = ImageTransform(dataclasses.replace(PLAIN, interpolation=interpolation, input_size=(24, 40)), "squash")
    image = picture(50, 90)
    expected = image.resize((40, 24), Image.Resampling[interpolation.upper()])
    assert torch.equal(transform.prepare(image), pixels(expected))


def test_image_of_the_input_size_is_untouched():
    image = picture(32, 32)
    assert torch.equal(ImageTransform(PLAIN).prepare(image), pixels(image))


@pytest.mark.parametrize(("size", "scaled"), [((100, 60), (66, 40)), ((60, 100), (40, 66)), ((5, 5), (40, 40))])
def test_crop_covers_then_cuts_the_centre(size, scaled):
    image = picture(*size)
    resized = image.resize(scaled, Image.Resampling.BICUBIC)  # short side 32 / 0.8
    left, top = ((side - 32) // 2 for side in scaled)
    expected = resized.crop((left, top, left + 32, top + 32))
    assert torch.equal(ImageTransform(PLAIN, "crop").prepare(image), pixels(expected))


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (160, 10)])
def test_a_very_long_image_is_seen_in_its_middle(size):
    """As from the whole, which resized by its shorter side has no bound: a strip of 1 x 300,000 would be 1.4 GB."""
    image = picture(*size)
    scaled = [40 * side // min(size) for side in size]
    left, top = ((side - 32) // 2 for side in scaled)
    whole = image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    assert torch.equal(ImageTransform(PLAIN, "crop").prepare(image), pixels(whole))
    strip = Image.new("RGB", (300_000, 1))
    assert ImageTransform(PLAIN, "crop").prepare(strip).shape == (3, 32, 32)
    assert ImageTransform(PLAIN, "crop", "crop_flip").prepare(strip).shape == (3, 40, 640)


def test_resize_covers_224_as_torchvision_does_to_the_pixel():
    short, long = (side.ravel() for side in np.meshgrid(np.arange(1, 961), np.arange(1, 961), indexing="ij"))
    short, long = short[short < long], long[short < long]
    published = 224 * long // short  # whole numbers: nothing is rounded
    found = np.array([covering(a, b, 224, 224) for a, b in zip(short.tolist(), long.tolist(), strict=True)])
    assert (found[:, 0] == 224).all()
    assert (found[:, 1] == published).all()
    # Dividing first, as this was once done, loses a pixel for 397 of 460,320 sizes.
    divided_first = (long * (224 / short)).astype(int)
    assert (len(short), (divided_first != published).sum(), (published - divided_first).max()) == (460_320, 397, 1)
    # One of them, whole: by torchvision itself, upright and lying.
    a, b = (int(side[divided_first != published][-1]) for side in (short, long))
    for width, height in [(b, a), (a, b)]:
        image = picture(width, height)
        expected = F.center_crop(F.resize(image, 224, F.InterpolationMode.BICUBIC, antialias=True), 224)
        transform = ImageTransform(dataclasses.replace(PLAIN, input_size=(224, 224), crop_pct=1.0), "crop")
        assert torch.equal(transform.prepare(image), pixels(expected))


def test_oblong_sizes_are_covered_exactly():
    rng = np.random.default_rng(0)
    for height, width, least_height, least_width in rng.integers(1, 500, (2000, 4)).tolist():
        ratio = max(Fraction(least_height, height), Fraction(least_width, width))
        expected = [floor(height * ratio), floor(width * ratio)]
        assert covering(height, width, least_height, least_width) == expected
        assert expected[0] >= least_height
        assert expected[1] >= least_width
        assert least_height in expected or least_width in expected


def test_crop_of_an_oblong_input():
    transform = ImageTransform(dataclasses.replace(PLAIN, input_size=(16, 48), crop_pct=1.0), "crop")
    for size in [(48, 16), (100, 100), (10, 90), (90, 10)]:
        assert transform.prepare(picture(*size)).shape == (3, 16, 48)


@pytest.mark.parametrize(("crop_pct", "side"), [(0.8, 40), (1.0, 36)])
def test_random_crop_leaves_room(crop_pct, side):
    transform = ImageTransform(dataclasses.replace(PLAIN, crop_pct=crop_pct), "crop", "crop_flip")
    assert transform.prepare(picture(100, 100)).shape == (3, side, side)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_crop_flip_cuts_every_place_and_flips_half(resize):
    # Each pixel tells its own column and row, so a cut shows where it came from.
    side = 36
    places = np.stack(np.broadcast_arrays(np.arange(side)[None], np.arange(side)[:, None], 0), -1).astype(np.uint8)
    transform = ImageTransform(dataclasses.replace(PLAIN, crop_pct=1.0), resize, "crop_flip")
    prepared = transform.prepare(Image.fromarray(places))
    assert torch.equal(prepared, pixels(places))
    cuts = [transform.augment(prepared, 7, draw) for draw in range(400)]
    flipped = [bool(cut[0, 0, 0] > cut[0, 0, 1]) for cut in cuts]
    corners = {(int(cut[0].min()), int(cut[1].min())) for cut in cuts}
    assert corners == {(left, top) for left in range(5) for top in range(5)}
    assert 150 < sum(flipped) < 250
    assert all(cut.shape == (3, 32, 32) for cut in cuts)


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.5, 1.0), (0.3, 0.4)])
def test_random_resized_crop_cuts_shares_of_the_area(area):
    side = 128
    columns = np.stack(np.broadcast_arrays(np.arange(side)[None], np.arange(side)[:, None], 0), -1).astype(np.uint8)
    transform = ImageTransform(dataclasses.replace(PLAIN, interpolation="nearest"), "crop", "random_resized_crop", area)
    prepared = transform.prepare(Image.fromarray(columns))
    shares = []
    for draw in range(200):
        cut = transform.augment(prepared, draw)
        assert cut.shape == (3, 32, 32)
        width, height = (int(cut[c].max() - cut[c].min()) * 32 / 31 for c in (0, 1))
        shares.append(width * height / side**2)
    # Of whole pixels, and read off at their centres.
    assert area[0] * 0.9 - 0.02 < min(shares) < area[0] * 1.2 + 0.1
    assert area[1] * 0.8 < max(shares) <= area[1] * 1.1


@pytest.mark.parametrize("augmentation", ["crop_flip", "random_resized_crop"])
def test_augmentation_is_a_function_of_its_seeds_and_spares_the_global_one(augmentation):
    transform = ImageTransform(PLAIN, "crop", augmentation)
    prepared = transform.prepare(picture(64, 64))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (transform.augment(prepared, 1, 2, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    others = [transform.augment(prepared, *seeds) for seeds in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]]
    assert all(not torch.equal(first, other) for other in others)


def test_normalisation():
    transform = ImageTransform(dataclasses.replace(PLAIN, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    expected = torch.tensor([[-1.0, -1.0, 0.0], [-0.6, -0.2, 0.1], [1.0, 3.0, 0.5]])
    torch.testing.assert_close(transform.normalise(images)[..., 0, 0], expected)


def test_unknown_options():
    with pytest.raises(ConfigurationError, match="unknown resize 'pad': choose squash or crop"):
        ImageTransform(PLAIN, "pad")
    with pytest.raises(ConfigurationError, match="unknown augmentation 'flip': choose none, crop_flip or"):
        ImageTransform(PLAIN, "crop", "flip")
    for area in [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1), (0.5,)]:
        with pytest.raises(ConfigurationError, match="two shares above 0 and at most 1, the smaller first"):
            ImageTransform(PLAIN, "crop", "random_resized_crop", area)
    with pytest.raises(ConfigurationError, match=r"unknown interpolation 'cubic': choose one of nearest, .*bicubic"):
        ImageTransform(dataclasses.replace(PLAIN, interpolation="cubic"))
