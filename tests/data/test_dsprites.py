"""The dSprites renderer against facts computed by hand from the published factors."""

import numpy as np
import pytest

from visionpeft.data import VTAB1k, dsprites
from visionpeft.data.dsprites import Sprites, factors_of, inside, render


def index_of(shape, scale, orientation, x, y):
    return (((shape * 6 + scale) * 40 + orientation) * 32 + x) * 32 + y


def centroid(image):
    rows, columns = np.nonzero(image)
    return columns.mean(), rows.mean()


def test_order_of_the_published_array():
    assert dsprites.COUNT == 737_280
    assert factors_of(np.array([0, 1, 32, 1024, 40 * 1024, 240 * 1024, 737_279])).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],  # posY varies fastest
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 2, 5, 39, 31, 31],
    ]
    assert dsprites.SCALES.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert dsprites.ORIENTATIONS[1] == pytest.approx(0.16110732)  # as published: both ends are included


def test_images_are_binary_and_sprites_whole():
    images = render(np.arange(0, dsprites.COUNT, 997))
    assert images.shape == (740, 64, 64)
    assert images.dtype == np.uint8
    assert set(np.unique(images)) == {0, 255}
    edges = images[:, 0].any() or images[:, -1].any() or images[:, :, 0].any() or images[:, :, -1].any()
    assert not edges


@pytest.mark.parametrize("shape", range(3))
def test_area_is_proportional_to_the_squared_scale(shape):
    areas = [(render(np.array([index_of(shape, scale, 7, 10, 10)])) > 0).sum() for scale in range(6)]
    assert areas[5] == pytest.approx(294, rel=0.06)
    assert np.array(areas) / areas[5] == pytest.approx(dsprites.SCALES**2, rel=0.06)


def test_upright_square_is_17_pixels_in_the_middle():
    # posX 15 and 16 lie symmetrically around the middle of the image.
    image = render(np.array([index_of(0, 5, 0, 15, 16)]))[0]
    expected = np.zeros((64, 64), bool)
    expected[24:41, 23:40] = True
    assert ((image > 0) == expected).all()


@pytest.mark.parametrize("shape", range(3))
def test_position_moves_the_centroid_by_a_pixel_a_step(shape):
    start = centroid(render(np.array([index_of(shape, 3, 11, 0, 0)]))[0])
    for x, y in [(1, 0), (0, 1), (31, 0), (0, 31), (13, 26)]:
        moved = centroid(render(np.array([index_of(shape, 3, 11, x, y)]))[0])
        assert np.subtract(moved, start) == pytest.approx([x, y])


@pytest.mark.parametrize(("shape", "period"), [("square", np.pi / 2), ("ellipse", np.pi), ("heart", 2 * np.pi)])
def test_rotational_symmetry(shape, period):
    points = np.random.default_rng(0).uniform(-16, 16, (2, 5000))
    at = [inside(shape, 1.0, 0.3 + turn, *points) for turn in (0, period, period / 2)]
    assert (at[0] == at[1]).all()
    assert (at[0] != at[2]).mean() > 0.02


def test_first_and_last_orientation_are_the_same_angle():
    ends = np.array([index_of(2, 5, orientation, 4, 9) for orientation in (0, 39, 1)])
    images = render(ends)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_heart_points_down_and_turns_clockwise():
    # The notch between the lobes is at the top.
    assert not inside("heart", 1.0, 0.0, np.array(0.0), np.array(-9.5))
    assert inside("heart", 1.0, 0.0, np.array(5.0), np.array(-9.5))
    # After a quarter turn clockwise, what was at the top is at the right.
    assert not inside("heart", 1.0, np.pi / 2, np.array(9.5), np.array(0.0))
    assert inside("heart", 1.0, np.pi / 2, np.array(9.5), np.array(5.0))


def test_labels_are_binned_to_16_by_integer_division():
    orientations = Sprites(np.array([index_of(1, 2, orientation, 0, 0) for orientation in range(40)]), "orientation")
    assert orientations.labels == [int(o // 2.5) for o in range(40)]
    assert sorted({orientations.labels.count(label) for label in range(16)}) == [2, 3]
    positions = Sprites(np.array([index_of(1, 2, 0, x, 0) for x in range(32)]), "posX")
    assert positions.labels == [x // 2 for x in range(32)]


def test_splits_are_the_published_sizes_and_disjoint():
    final, tuned = VTAB1k("dsprites_ori"), VTAB1k("dsprites_ori", train_on="train800")
    assert {split: len(source) for split, source in final.sources.items()} == {"train": 1000, "test": 73_728}
    assert {split: len(source) for split, source in tuned.sources.items()} == {
        "train": 800,
        "val": 200,
        "test": 73_728,
    }
    train, val, test = (set(tuned.sources[split].indices.tolist()) for split in ("train", "val", "test"))
    assert len(train | val | test) == 800 + 200 + 73_728
    assert set(final.sources["train"].indices.tolist()) == train | val
    assert (VTAB1k("dsprites_loc").sources["test"].indices == tuned.sources["test"].indices).all()


def test_the_split_never_changes():
    train = VTAB1k("dsprites_loc").sources["train"]
    assert train.indices[:5].tolist() == [714837, 599290, 31135, 523744, 429783]
    assert train.labels[:5] == [1, 3, 6, 7, 11]
    assert set(train.labels) == set(range(16))


def test_source_gives_rgb_images_and_names():
    sprites = Sprites(np.array([index_of(0, 5, 0, 15, 16)]), "posX")
    assert sprites.image(0).mode == "RGB"
    assert sprites.image(0).size == (64, 64)
    assert sprites.name(0) == f"dsprites/{sprites.indices[0]}"
    assert sprites.labels == [7]
