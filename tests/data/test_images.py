"""Opening image files of every mode, and refusing broken ones by name."""

import numpy as np
import pytest
from data_layouts import truncate, write_image
from PIL import Image

from visionpeft.data import images
from visionpeft.data.images import check_image, list_images, open_image
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
