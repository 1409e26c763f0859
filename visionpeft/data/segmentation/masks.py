"""Masks that people have, as class indices: palettes, gray levels of 8 or 16 bits, and colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from visionpeft.data.images import LEAVE_OUT, PHOTOMETRIC, WHITE_IS_ZERO, opened
from visionpeft.errors import ConfigurationError, DataError, did_you_mean

IGNORED = -1  # of pixels that count nowhere, whatever value they have in a file
PALETTE_BITS = 8

Colour = Sequence[int]


class MaskReader:
    """What the values of masks mean.

    Without `colours`, a pixel is a number: the index in the palette of a palette PNG, never the colour behind it, or a
    gray level, of 8 or 16 bits. Without `values`, number i is class i. A mask of three equal channels is one of gray
    levels.

    Args:
        class_names: names in the order of the classes.
        ignore: the number, or the colour, of pixels that count nowhere; None for none.
        values: what numbers mean, by number: the name of a class or its index, or None to ignore it; several may mean
            one class. All others are refused.
        colours: the colour (red, green, blue) of each class by its name, or a list of several. All others are refused.

    Raises:
        ConfigurationError: a class that there is not, both values and colours, something that is no colour, or a number
            to ignore that is a class.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        ignore: int | Colour | None = 255,
        values: Mapping[int, str | int | None] | None = None,
        colours: Mapping[str, Colour | Sequence[Colour]] | None = None,
    ):
        if values is not None and colours is not None:
            raise ConfigurationError("give either values or colours of masks, not both")
        self.class_names = list(class_names)
        self.ignore = ignore
        self.table = None if values is None else {_number(value): self._index(name) for value, name in values.items()}
        self.colours: dict[int, int] | None = None
        self.palette: list[list[int]] | None = None  # one colour for each class, to show masks in
        if colours is not None:
            self._take_colours(colours)
        elif isinstance(ignore, Sequence):
            raise ConfigurationError(f"ignore {list(ignore)} is a colour, but no colours of classes are given")
        elif values is None and ignore is not None and 0 <= ignore < len(self.class_names):
            raise ConfigurationError(
                f"ignore {ignore} is also the value of class {self.class_names[ignore]!r}; ignore null or a value from "
                f"{len(self.class_names)} on, or say with values what each value means (null to ignore it)"
            )
        # 0 and 255 alone are how programs write two classes, and how they write one class and pixels to ignore.
        self.may_be_binary = len(self.class_names) == 2 and values is None and colours is None and ignore == 255

    def read(self, path: Path) -> np.ndarray:
        """Class indices int64 (height, width), `IGNORED` where a pixel counts nowhere.

        Raises:
            DataError: the file is missing or damaged, or holds a value or colour without a meaning.
        """
        if not path.is_file():
            raise DataError(f"mask file {path} does not exist")
        try:
            with opened(path) as file, Image.open(file) as image:
                self._check_numbers(image, path)
                image.load()
                # upright as its image is read, where a program has copied the flag of the camera into the mask
                pixels = self._pixels(ImageOps.exif_transpose(image), path)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # as in `decode_image`
            reason = "not an image Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise DataError(f"mask file {path} cannot be read ({reason}); {LEAVE_OUT}") from error
        return self._classes(pixels, path)

    def _check_numbers(self, image: Image.Image, path: Path) -> None:
        """Refuse a TIFF whose numbers Pillow turns, as few programs mean it that write masks: tifffile of booleans."""
        if self.colours is None and image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise DataError(
                f"mask {path} stores white as 0, so that its numbers are not those that are shown; save it as gray "
                "levels of 8 bits in which black is 0"
            )

    def _pixels(self, image: Image.Image, path: Path) -> np.ndarray:
        """The number of each pixel; of colours red * 65536 + green * 256 + blue."""
        if self.colours is not None:
            channels = np.asarray(image.convert("RGB")).astype(np.int64)
            return (channels[..., 0] << 16) + (channels[..., 1] << 8) + channels[..., 2]
        if image.mode in ("P", "L", "1") or image.mode.startswith("I"):
            return np.asarray(image).astype(np.int64)
        if image.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(image)[..., : 1 if image.mode == "LA" else 3].astype(np.int64)
            if (channels == channels[..., :1]).all():
                return channels[..., 0]
            raise DataError(
                f"mask {path} is in colours; say which colour is which class with --data.colours "
                "'{name: [red, green, blue], ...}'"
            )
        raise DataError(f"mask {path} has pixels of mode {image.mode}, which are no class indices")

    def _classes(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        numbers, places, counts = np.unique(pixels, return_inverse=True, return_counts=True)
        if self.may_be_binary and set(numbers.tolist()) == {0, 255}:
            raise DataError(
                f"mask {path} holds nothing but 0 and 255, which may be the two classes, or one of them and pixels to "
                f"ignore; say which with --data.values '{{0: {self.class_names[0]}, 255: {self.class_names[1]}}}', or "
                f"'{{0: {self.class_names[0]}, 1: {self.class_names[1]}, 255: null}}'"
            )
        found = np.array([self._class(number) for number in numbers.tolist()], np.int64)
        if (found < IGNORED).any():
            self._refuse(int(numbers[found < IGNORED][0]), int(counts[found < IGNORED][0]), path)
        return found[places.reshape(pixels.shape)]

    def _class(self, number: int) -> int:
        """The class of a number or colour; below `IGNORED` if it has no meaning."""
        if self.colours is not None:
            return self.colours.get(number, IGNORED - 1)
        if self.table is not None:
            return self.table.get(number, IGNORED if number == self.ignore else IGNORED - 1)
        if number == self.ignore:
            return IGNORED
        return number if 0 <= number < len(self.class_names) else IGNORED - 1

    def _refuse(self, number: int, count: int, path: Path) -> None:
        pixels = f"in {count:,} pixel{'s' if count > 1 else ''}"
        if self.colours is not None:
            colour = [number >> 16, number >> 8 & 255, number & 255]
            raise DataError(
                f"mask {path} has the colour {colour} {pixels}, which is that of no class; add it to --data.colours, "
                "or save masks without smoothing and lossy compression"
            )
        known = "those of --data.values" if self.table is not None else f"0 to {len(self.class_names) - 1}"
        raise DataError(
            f"mask {path} holds the value {number} {pixels}, and classes are {known}; name more classes, or say "
            "what it means with --data.values (null to ignore it)"
        )

    def _index(self, name: str | int | None) -> int:
        if name is None:
            return IGNORED
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.class_names):
            return name
        if name not in self.class_names:
            raise ConfigurationError(f"there is no class {name!r}{did_you_mean(str(name), self.class_names)}")
        return self.class_names.index(name)

    def _take_colours(self, colours: Mapping[str, Colour | Sequence[Colour]]) -> None:
        self.colours, self.palette = {}, []
        if missing := [name for name in self.class_names if name not in colours]:
            raise ConfigurationError(f"colours: class {missing[0]!r} has none")
        for name, given in colours.items():
            several = given if given and isinstance(given[0], Sequence) else [given]
            for colour in several:
                number = _of_colour(colour, name)
                if self.colours.setdefault(number, self._index(name)) != self._index(name):
                    raise ConfigurationError(f"colours: {list(colour)} is that of two classes, one of them {name!r}")
        self.palette = [
            list(given if not isinstance(given[0], Sequence) else given[0])
            for given in (colours[name] for name in self.class_names)
        ]
        if isinstance(self.ignore, Sequence):
            self.colours.setdefault(_of_colour(self.ignore, "ignore"), IGNORED)


class ShiftedReader(MaskReader):
    """Masks in which 0 is a pixel that counts nowhere, and number i is class i - 1, as in ADE20K."""

    def _class(self, number: int) -> int:
        return number - 1 if 0 <= number <= len(self.class_names) else IGNORED - 1


def size_of_image(path: Path) -> tuple[int, int]:
    """Width and height of an image file as it is shown, read from its header.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientation: lying on its side
            # Of a TIFF Pillow gives the size as it is shown already.
            return image.size[::-1] if turned and image.format != "TIFF" else image.size
    except Exception as error:  # as in `decode_image`
        raise DataError(f"image file {path} cannot be read ({error}); {LEAVE_OUT}") from error


def palette_of(num_classes: int) -> list[list[int]]:
    """A colour (red, green, blue) for each of up to 256 classes, black the first: Pascal VOC's.

    The bits of the class number, from the lowest, go in turn to red, green and blue, from their highest bits down.
    """
    colours = []
    for number in range(num_classes):
        channels = [0, 0, 0]
        for bit in range(PALETTE_BITS):
            for channel in range(3):
                channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append(channels)
    return colours


def palette_image(classes: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Class indices (height, width) as a palette image, whose numbers are the classes.

    With more than 256 classes, an image of 16-bit gray levels.
    """
    if len(palette) > 256:
        return Image.fromarray(classes.astype(np.uint16))
    image = Image.fromarray(classes.astype(np.uint8), mode="L")
    image.putpalette([value for colour in palette for value in colour])
    return image


def _number(value: object) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"values: {value!r} is no pixel value") from None


def _of_colour(colour: object, name: str) -> int:
    valid = isinstance(colour, Sequence) and len(colour) == 3 and all(isinstance(v, int) for v in colour)
    if not valid or not all(0 <= value <= 255 for value in colour):
        raise ConfigurationError(f"colours: {name!r} needs [red, green, blue] from 0 to 255, not {colour!r}")
    return (colour[0] << 16) + (colour[1] << 8) + colour[2]
