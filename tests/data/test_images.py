"""Opening image files of every mode, and refusing broken ones by name."""

import struct
from io import BytesIO

import numpy as np
import pytest
from data_layouts import truncate, write_image
from PIL import Image

from visionpeft.data import images
from visionpeft.data.images import check_image, decode_image, list_images, open_image
from visionpeft.data.segmentation.masks import size_of_image
from visionpeft.errors import DataError


def test_gray_image_gets_three_equal_channels(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "gray.png")
    opened = open_image(tmp_path / "gray.png")
    assert opened.mode == "RGB"
    assert (np.asarray(opened) == levels[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    opened = np.asarray(open_image(tmp_path / f"deep.{suffix}"))[..., 0]
    assert np.abs(opened - levels / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "clear.png")
    pixels = np.asarray(open_image(tmp_path / "clear.png"))
    assert (pixels[:, 4:] == 255).all()
    assert np.abs(pixels[:, :4].astype(int) - 200).max() <= 4


def test_half_transparent_pixel_is_blended_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert np.asarray(open_image(tmp_path / "half.png")).ravel().tolist() == [127] * 12


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = np.asarray(open_image(tmp_path / "print.jpg"))[0, 0]
    assert red > 200
    assert max(green, blue) < 60


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste((255, 255, 255), (0, 0, 10, 10))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opened = open_image(tmp_path / "turned.jpg")
    assert opened.size == (10, 20)
    pixels = np.asarray(opened)
    assert pixels[2].min() > 200  # the left has become the top
    assert pixels[-3].max() < 50


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        open_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file_is_named(tmp_path, suffix):
    path = truncate(write_image(tmp_path / f"cut.{suffix}", size=(64, 64)))
    with pytest.raises(DataError, match=rf"cut\.{suffix} cannot be read .*skip_corrupt"):
        open_image(path)


def test_text_with_an_image_suffix_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.jpg cannot be read \(not an image Pillow can read\)"):
        open_image(tmp_path / "page.jpg")


@pytest.mark.parametrize("limit", [100, 200, 399])
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    write_image(tmp_path / "bomb.png", size=(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"bomb\.png is refused .*more than {limit} pixels; make it smaller or cut"):
        open_image(tmp_path / "bomb.png")


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(DataError, match=r"depth\.tif .*floating-point"):
        open_image(tmp_path / "depth.tif")


def test_listing_ignores_other_and_hidden_files(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.jpeg", ".hidden.png", ".checkpoints/d.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png", "c.jpeg"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_most_damage_is_found_without_decoding(tmp_path, ending, monkeypatch):
    path = write_image(tmp_path / f"whole.{ending}")
    with monkeypatch.context() as patch:
        patch.setattr(images, "open_image", None)  # it is not decoded
        check_image(path)
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        check_image(tmp_path / "gone.png")
    (tmp_path / f"text.{ending}").write_text("no image")
    with pytest.raises(DataError, match=rf"text\.{ending} cannot be read \(not an image"):
        check_image(tmp_path / f"text.{ending}")
    if ending in ("png", "jpg"):
        with pytest.raises(DataError, match="cannot be read"):
            check_image(truncate(path))


def test_what_follows_the_end_of_an_image_is_no_damage(tmp_path):
    """Cameras and programs write more after it; so much of it that the end is not seen lets the image be decoded."""
    for ending in ("png", "jpg"):
        path = write_image(tmp_path / f"more.{ending}")
        path.write_bytes(path.read_bytes() + 100 * b"more")
        check_image(path)


def write_tiff(path, planes, *, bits=16, photometric=1, bands=1, separate=False):
    """A little-endian TIFF without compression, of bytes for each of its strips."""
    height, width = 4, 8
    offsets, at = [], 8
    for plane in planes:
        offsets.append(at)
        at += len(plane)
    tags = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric], 273: offsets, 277: [bands]}
    tags |= {278: [height], 279: [len(plane) for plane in planes], 284: [2 if separate else 1]}
    longs, more, entries = at + 2 + 12 * len(tags) + 4, b"", b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        inside = packed if len(values) == 1 else struct.pack("<I", longs + len(more))
        more += b"" if len(values) == 1 else packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + inside
    head = b"II" + struct.pack("<HI", 42, at) + b"".join(planes)
    path.write_bytes(head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + more)
    return path


@pytest.mark.parametrize(("bits", "photometric"), [(8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_gray_levels_of_a_tiff_have_the_range_it_says(tmp_path, bits, photometric):
    """Pillow gives 12 bits as they are, and turns levels that are stored as on a film only where they have 8."""
    values = np.linspace(0, 2**bits - 1, 32).astype(np.uint16).reshape(4, 8)
    content = values.astype("<u2" if bits == 16 else np.uint8).tobytes()
    if bits == 12:
        first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
        content = packed.astype(np.uint8).tobytes()
    path = write_tiff(tmp_path / "film.tif", [content], bits=bits, photometric=photometric)
    check_image(path)
    opened = np.asarray(open_image(path))[..., 0]
    shown = values / (2**bits - 1)
    assert np.abs(opened - 255 * (shown if photometric else 1 - shown)).max() <= 0.5


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "RGB"])
def test_a_tiff_that_lies_on_its_side(tmp_path, mode, compression):
    """Pillow maps some uncompressed ones into memory, and takes their sides for each other."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    if mode == "I;16":
        image, shown = Image.fromarray(colours[..., 0] * np.uint16(257)), np.stack([colours[..., 0]] * 3, axis=-1)
    else:
        image = Image.fromarray(colours).convert(mode)
        shown = np.asarray(image.convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "side.tif", exif=exif, compression=compression)
    assert np.array_equal(open_image(tmp_path / "side.tif"), np.rot90(shown, -1))


def test_16_bit_colours_in_planes_of_their_own_are_refused_uncompressed(tmp_path):
    """Pillow reads the two bytes of a value as two pixels; before training it is told, not in the middle."""
    planes = [np.full((4, 8), level, "<u2").tobytes() for level in (1000, 30000, 60000)]
    path = write_tiff(tmp_path / "planes.tif", planes, photometric=2, bands=3, separate=True)
    for use in (open_image, check_image):
        with pytest.raises(DataError, match=r"planes\.tif cannot be read \(uncompressed 16-bit colours in separate"):
            use(path)
    bytes_alone = [np.full((4, 8), level, np.uint8).tobytes() for level in (10, 20, 30)]
    path = write_tiff(tmp_path / "bytes.tif", bytes_alone, bits=8, photometric=2, bands=3, separate=True)
    check_image(path)
    assert (np.asarray(open_image(path)) == [10, 20, 30]).all()
    together = np.broadcast_to(np.array([1000, 30000, 60000], "<u2"), (4, 8, 3)).tobytes()
    path = write_tiff(tmp_path / "together.tif", [together], photometric=2, bands=3)
    assert (np.asarray(open_image(path)) == [1000 >> 8, 30000 >> 8, 60000 >> 8]).all()


@pytest.mark.parametrize("bands", [5, 13])
def test_bands_that_are_no_colours_are_counted(tmp_path, bands):
    path = write_tiff(tmp_path / "satellite.tif", [bytes(4 * 8 * 2 * bands)], bands=bands)
    with pytest.raises(DataError, match=rf"satellite\.tif cannot be read \(a TIFF of {bands} bands of 16 bits, which"):
        open_image(path)
    with pytest.raises(DataError, match=rf"image a\.tif cannot be read \(a TIFF of {bands} bands"):
        decode_image(BytesIO(path.read_bytes()), "image a.tif")


def test_a_transparent_level_of_16_bits_is_white(tmp_path):
    values = np.array([[0, 1, 30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "holes.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "holes.png"))[0, :, 0].tolist() == [255, 0, 117, 255]


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_the_size_of_a_file_is_that_of_its_image(tmp_path, ending, orientation):
    """Pillow says the size of a TIFF as it is shown, and of other files as they are stored."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    write_image(tmp_path / "plain.png", size=(20, 12))
    Image.open(tmp_path / "plain.png").save(tmp_path / f"turned.{ending}", exif=exif)
    shown = open_image(tmp_path / f"turned.{ending}").size
    assert size_of_image(tmp_path / f"turned.{ending}") == shown == ((12, 20) if (orientation or 1) > 4 else (20, 12))
