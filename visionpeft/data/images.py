"""Opening image files that people have: any mode, rotation flags, transparency, and files that are broken."""

import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from visionpeft.errors import DataError, one_line

# A build of Pillow may lack a codec; what it cannot read is counted among the files left out.
EXTENSIONS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
        *((".avif",) if features.check("avif") else ()),
        *((".jp2", ".j2k", ".j2c", ".jpf", ".jpx") if features.check("jpg_2000") else ()),
    }
)
DECODED_HERE = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000")

# Tags of TIFF, and what they may say.
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLES_PER_PIXEL, PLANES = 258, 259, 262, 277, 284
WHITE_IS_ZERO, SEPARATE = 0, 2
DEEPEST = 65535

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
END = 64  # bytes in which these are looked for: programs write a few after them


class TooManyPixels(DataError):
    """An image that is larger than what is decoded."""


LEAVE_OUT = "repair or remove it, or set skip_corrupt to leave it out"


def open_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB: upright by its EXIF flag, transparency over white, 16 bits scaled to 8.

    Raises:
        DataError: the file is missing, damaged, larger than Pillow's limit on pixels, or of an unknown pixel format.
    """
    if not path.is_file():
        raise DataError(f"image file {path} does not exist")
    return decode_image(path, f"image file {path}")


def check_image(path: Path) -> None:
    """Find most damage of an image file for a fraction of what decoding it costs, without its pixels.

    Its header is read, and of a JPEG or PNG whether it ends as these do; one that does not is decoded.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                end = ENDS.get(image.format)
                _levels(image)
            file.seek(0, 2)
            file.seek(-min(END, file.tell()), 2)
            whole = end is None or end in file.read()
    except Exception:  # as in `decode_image`, which says what is wrong
        whole = False
    if not whole:
        open_image(path)


def decode_image(file: Path | BinaryIO, name: str, remedy: str = LEAVE_OUT) -> Image.Image:
    """As `open_image`, of a file or a stream of bytes.

    Args:
        file: the image.
        name: what messages call it.
        remedy: what to do about one that cannot be read.
    """
    try:
        with warnings.catch_warnings(), opened(file) as stream:
            # Between one and two times its limit Pillow would only warn.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                return _upright_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name} is refused as a possible decompression bomb: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it "
            "smaller or cut it into parts, or remove it"
        ) from error
    except MemoryError:
        raise
    # Pillow's decoders raise a dozen types on damaged files (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception as error:
        reason = _unread(file) if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(f"{name} cannot be read ({reason}); {remedy}") from error


def opened(file: Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """What Pillow is to read an image file from.

    A file that it opens itself it may map into memory, and there Pillow 13.0 takes the sides of a gray TIFF that lies
    on its side for each other (findings/pillow_scrambles_gray_tiffs_that_lie_on_their_side.sh).
    """
    return file.open("rb") if isinstance(file, Path) else nullcontext(file)


def decode_foreign(content: bytes, max_pixels: int) -> Image.Image:
    """Read the bytes of an image file that may come from anywhere, as `open_image` reads a file.

    Only formats that Pillow decodes itself are tried: others start programs. Pillow's own limit on pixels warns, and
    what is to be done with a warning is the same for all threads of a process; so the pixels are counted here.

    Args:
        content: the file.
        max_pixels: the most that are decoded.

    Raises:
        TooManyPixels: there are more; nothing has been decoded.
        DataError: it is no image, or damaged.
    """
    try:
        with Image.open(BytesIO(content), formats=DECODED_HERE) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixels(f"the image has {width} x {height} pixels, and at most {max_pixels:,} are decoded")
            return _upright_rgb(image)
    except (MemoryError, TooManyPixels):
        raise
    except Image.DecompressionBombError:
        raise TooManyPixels(f"the image has more than {max_pixels:,} pixels, which is the most decoded") from None
    except Exception as error:  # as in open_image
        reason = "not one Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise DataError(f"the image cannot be decoded ({reason})") from error


def list_images(folder: Path) -> list[Path]:
    """Image files under `folder`, at any depth, sorted; other and hidden files are ignored."""
    return sorted(path for path in folder.rglob("*") if _is_listed(path, folder))


def left_out(folder: Path, found: Iterable[Path], kind: str = "image") -> str | None:
    """One sentence that counts and names the visible files under `folder` that are not among those found.

    Args:
        folder: what was listed.
        found: files, and folders that are taken whole.
        kind: what was looked for.
    """
    taken = set(found)
    others = [
        path
        for path in sorted(folder.rglob("*"))
        if not is_hidden(path, folder) and path.is_file() and not taken & {path, path.parent}
    ]
    if not others:
        return None
    counts = Counter(path.suffix.lower() or "without ending" for path in others)
    by_ending = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
    names = ", ".join(path.relative_to(folder).as_posix() for path in others[:5]) + ", ..." * (len(others) > 5)
    return f"{len(others)} files in {folder} are left out, being no {kind}s that can be read ({by_ending}): {names}"


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether the name of a path below `folder`, or of a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_listed(path: Path, folder: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not is_hidden(path, folder) and path.is_file()


def _unread(file: Path | BinaryIO) -> str:
    """Why Pillow recognises no image in a file, which may be a TIFF whose bands are no colours."""
    try:
        with opened(file) as content:
            content.seek(0)
            tags = ImageFileDirectory_v2(content.read(8))
            content.seek(tags.next)
            tags.load(content)
        bands, bits = tags[SAMPLES_PER_PIXEL], tags[BITS_PER_SAMPLE][0]
    except Exception:  # no TIFF, or a damaged one
        return "not an image Pillow can read"
    return f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} bits, which Pillow does not read as colours"


def _upright_rgb(image: Image.Image) -> Image.Image:
    """An opened file as 8-bit RGB."""
    levels = _levels(image)  # of the file: a copy that is turned knows nothing of it
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image, *levels)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _levels(image: Image.Image) -> tuple[int, int]:
    """What black and white are among the gray levels of more than 8 bits of an opened file.

    Raises:
        ValueError: it is a TIFF whose colours Pillow takes apart wrongly.
    """
    if image.format != "TIFF":
        return 0, DEEPEST
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0]
    in_planes = image.tag_v2.get(PLANES) == SEPARATE and len(image.getbands()) > 1
    # Pillow 13.0 reads each plane as if it had 8 bits; those that are compressed it leaves to libtiff.
    if in_planes and bits == 16 and image.tag_v2.get(COMPRESSION, 1) == 1:
        raise ValueError("uncompressed 16-bit colours in separate planes, which Pillow misreads; save it compressed")
    white = 2**bits - 1 if 8 < bits < 16 else DEEPEST
    # Of 8 bits and fewer Pillow itself turns what is stored the other way round, as films are.
    return (white, 0) if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, white)


def _eight_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    """Gray levels of up to 16 bits to 8; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > DEEPEST:
        raise ValueError("integer pixels outside 0..65535 have no defined range")
    most = max(black, white)
    levels = np.abs(values - black) * 510 // most + 1 >> 1  # rounded
    if isinstance(clear := image.info.get("transparency"), int):
        levels[values == clear] = 255
    return Image.fromarray(levels.astype(np.uint8))
