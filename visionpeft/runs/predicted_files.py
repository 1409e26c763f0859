"""Predictions that are files of their own: which images are read, and where what is predicted of each goes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from visionpeft.data.images import open_image
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import replacing


def named_after(files: list[Path], folder: Path, endings: Sequence[str], what: str) -> list[tuple[Path, ...]]:
    """Where what is predicted of each image goes: its name without ending, and each of the endings.

    Args:
        files: the images.
        folder: the folder.
        endings: such as ".png" and "_overlay.png".
        what: is predicted, for errors.

    Raises:
        ConfigurationError: the folder is none, would be written over an image that is predicted, or two images have
            one name.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output: {folder} is a file; {what} go into a folder")
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.setdefault(file.stem, file)) != file:
            raise ConfigurationError(
                f"the {what} of {other} and {file} would both be {folder / file.stem}{endings[0]}; predict them into "
                "two folders"
            )
    names = [tuple(folder / f"{file.stem}{ending}" for ending in endings) for file in files]
    taken: dict[Path, Path] = {}
    for file, several in zip(files, names, strict=True):
        for path in several:
            if (other := taken.setdefault(path, file)) != file:  # of photo.jpg and photo_overlay.jpg
                raise ConfigurationError(
                    f"what is predicted of {other} and of {file} would both be {path}; predict them into two folders"
                )
    given = {file.resolve() for file in files}
    if written := [path for several in names for path in several if path.resolve() in given]:
        raise ConfigurationError(f"--output {folder} would write over the image {written[0]}; name another folder")
    return names


def readable(files: Sequence[Path], skip_corrupt: bool) -> Iterator[tuple[int, Image.Image]]:
    """Place and content of each image; of those that cannot be read, none if they are to be left out.

    Raises:
        DataError: one cannot be read, and none is to be left out.
    """
    for index, file in enumerate(files):
        try:
            image = open_image(file)
        except DataError:
            if not skip_corrupt:
                raise
            continue
        yield index, image


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as a whole or not at all."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
