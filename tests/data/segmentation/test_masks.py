"""Masks as people have them: each pixel's class is the one that was meant, or one sentence names the file."""

import numpy as np
import pytest
from PIL import Image

from visionpeft.data.segmentation.masks import MaskReader, ShiftedReader, palette_image, palette_of
from visionpeft.data.segmentation.overlays import overlay
from visionpeft.errors import ConfigurationError, DataError

NAMES = ["ground", "road", "roof"]
CLASSES = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
MEANT = np.where(CLASSES == 255, -1, CLASSES.astype(int))
COLOURS = {"ground": [1, 2, 3], "road": [[200, 0, 0], [210, 0, 0]], "roof": [0, 0, 250]}


def palette_mask(classes):
    """With 256 colours: of fewer, Pillow would write fewer bits, and cut 255 down to them."""
    image = Image.fromarray(classes, mode="L")
    image.putpalette([9, 9, 9, 0, 200, 0, 7, 7, 7, *([5, 5, 5] * 253)])
    return image


def saved(tmp_path, image, name="mask.png"):
    image.save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(CLASSES),
        Image.fromarray(CLASSES.astype(np.uint16)),
        Image.fromarray(np.dstack([CLASSES] * 3)),
        palette_mask(CLASSES),
    ],
    ids=["gray", "16-bit", "three equal channels", "palette"],
)
def test_numbers_are_classes(tmp_path, image):
    found = MaskReader(NAMES).read(saved(tmp_path, image))
    assert found.dtype == np.int64
    assert np.array_equal(found, MEANT)


def test_a_palette_is_not_read_as_colours(tmp_path):
    """The negative control: as Pillow converts it, the mask would hold gray levels of its colours."""
    path = saved(tmp_path, palette_mask(CLASSES))
    gray = np.asarray(Image.open(path).convert("L"))
    assert not np.array_equal(gray[CLASSES != 255], CLASSES[CLASSES != 255])


def test_16_bits_hold_more_classes(tmp_path):
    names = [str(number) for number in range(1000)]
    classes = np.array([[0, 300], [999, 256]], np.uint16)
    reader = MaskReader(names, ignore=65535)
    assert np.array_equal(reader.read(saved(tmp_path, Image.fromarray(classes))), classes)
    assert np.array_equal(np.asarray(palette_image(classes, palette_of(1000))), classes)


def test_what_is_ignored_is_no_class(tmp_path):
    """255 of itself, of more than 255 classes; the negative control has one class less."""
    names = [str(number) for number in range(256)]
    path = saved(tmp_path, Image.fromarray(np.array([[254, 255]], np.uint8)))
    with pytest.raises(ConfigurationError, match="ignore 255 is also the value of class '255'"):
        MaskReader(names)
    assert MaskReader(names[:255]).read(path).tolist() == [[254, -1]]
    assert MaskReader(names, ignore=None).read(path).tolist() == [[254, 255]]
    assert MaskReader(names, values={254: None, 255: "255"}).read(path).tolist() == [[-1, 255]]


def test_colours(tmp_path):
    pixels = np.array([[[1, 2, 3], [200, 0, 0]], [[210, 0, 0], [255, 255, 255]]], np.uint8)
    reader = MaskReader(NAMES, ignore=[255, 255, 255], colours=COLOURS)
    path = saved(tmp_path, Image.fromarray(pixels))
    assert reader.read(path).tolist() == [[0, 1], [1, -1]]
    with pytest.raises(DataError, match=r"mask.png has the colour \[255, 255, 255\] in 1 pixel, .* of no class"):
        MaskReader(NAMES, ignore=None, colours=COLOURS).read(path)
    with pytest.raises(DataError, match=r"mask.png is in colours; say which .* --data.colours"):
        MaskReader(NAMES).read(path)


def test_values(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 7, 8, 9]], np.uint8)))
    reader = MaskReader(NAMES, values={0: "ground", 7: "road", 8: 1, 9: None})
    assert reader.read(path).tolist() == [[0, 1, 1, -1]]
    with pytest.raises(DataError, match=r"holds the value 7 in 1 pixel, and classes are 0 to 2"):
        MaskReader(NAMES).read(path)
    with pytest.raises(DataError, match=r"holds the value 8 .* those of --data.values"):
        MaskReader(NAMES, values={0: 0, 7: 1}).read(path)


def test_two_classes_in_black_and_white(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)))
    with pytest.raises(DataError, match=r"0 and 255.* --data.values '\{0: no, 255: yes\}'"):
        MaskReader(["no", "yes"]).read(path)
    assert MaskReader(["no", "yes"], values={0: "no", 255: "yes"}).read(path).tolist() == [[0, 1], [1, 0]]
    assert MaskReader(["no", "yes"], values={0: "no", 1: "yes", 255: None}).read(path).tolist() == [[0, -1], [-1, 0]]
    assert MaskReader(NAMES).read(path).tolist() == [[0, -1], [-1, 0]]


def test_zero_of_ade20k_counts_nowhere(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 1, 3]], np.uint8)))
    assert ShiftedReader(NAMES).read(path).tolist() == [[-1, 0, 2]]
    path = saved(tmp_path, Image.fromarray(np.array([[0, 4]], np.uint8)))
    with pytest.raises(DataError, match="holds the value 4"):
        ShiftedReader(NAMES).read(path)


def test_damaged_and_odd_files_are_named(tmp_path):
    reader = MaskReader(NAMES)
    with pytest.raises(DataError, match=r"mask file .*none.png does not exist"):
        reader.read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"mask file .*text.png cannot be read"):
        reader.read(tmp_path / "text.png")
    path = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "mask.tiff")
    with pytest.raises(DataError, match="mode F"):
        reader.read(path)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_numbers_that_are_turned_to_be_shown_are_refused(tmp_path, mode):
    """Read by Pillow, the two classes of booleans that tifffile has written would have changed places."""
    image = Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).convert(mode)
    reader = MaskReader(["ground", "road"], values={0: "ground", 1: "road", 255: "road"})
    image.save(tmp_path / "shown.tif")
    assert reader.read(tmp_path / "shown.tif").tolist() == [[0, 1], [1, 1]]
    image.save(tmp_path / "turned.tif", tiffinfo={262: 0})  # white is 0
    with pytest.raises(DataError, match=r"turned\.tif stores white as 0"):
        reader.read(tmp_path / "turned.tif")
    shown = MaskReader(["ground", "road"], colours={"ground": [0, 0, 0], "road": [255, 255, 255]})
    assert shown.read(tmp_path / "shown.tif").tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": {0: "grund"}}, "no class 'grund'.*ground"),
        ({"values": {"x": 0}}, "no pixel value"),
        ({"values": {0: 0}, "colours": COLOURS}, "either values or colours"),
        ({"colours": {"ground": [0, 0, 0]}}, "class 'road' has none"),
        ({"colours": COLOURS | {"roof": [1, 2]}}, r"needs \[red, green, blue\]"),
        ({"colours": COLOURS | {"roof": [1, 2, 3]}}, "that of two classes"),
        ({"ignore": [0, 0, 0]}, "no colours of classes"),
        ({"ignore": 2}, "ignore 2 is also the value of class 'roof'; ignore null or a value from 3 on"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        MaskReader(NAMES, **options)


def test_palette_and_overlay():
    assert palette_of(16)[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette_of(16)[8] == [64, 0, 0]  # bicycles are [0, 128, 0] and so on, cats are [64, 0, 0]
    assert len({tuple(colour) for colour in palette_of(256)}) == 256
    image = Image.new("RGB", (6, 6), (100, 100, 100))
    classes = np.zeros((6, 6), np.int64)
    classes[2:, 2:] = 1
    shown = np.asarray(overlay(image, classes, palette_of(2)))
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[2, 4].tolist() == [128, 0, 0]  # the line where classes meet
    assert shown[4, 4].tolist() == [115, 45, 45]  # .55 of the colour
