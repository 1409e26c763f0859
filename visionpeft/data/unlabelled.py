"""Images to predict: files and folders that people name, as batches in that order."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.data.dataset import ImageDataset, ImageLoader, as_batch
from visionpeft.data.images import left_out, list_images
from visionpeft.data.records import ImageFiles
from visionpeft.data.transforms import ImageTransform
from visionpeft.errors import DataError


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and the images in the folders named, at any depth, sorted within each folder.

    Raises:
        DataError: nothing is named, a path does not exist, or a folder holds no images.
    """
    return find_files(paths, list_images, "image")


def find_files(paths: Sequence[str | Path], list_folder: Callable[[Path], list[Path]], kind: str) -> list[Path]:
    """The files named and those that `list_folder` finds in the folders named, each once; messages call them `kind`.

    What else lies in such a folder is counted and named in a warning.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            listed = list_folder(path)
            if not listed:
                remark = left_out(path, [], kind)
                raise DataError(f"folder {path} holds no {kind}s" + (f"; {remark}" if remark else ""))
            if remark := left_out(path, listed, kind):
                warnings.warn(remark, stacklevel=3)
            found += listed
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{kind} file or folder {path} does not exist")
    if not found:
        raise DataError(f"no {kind}s to predict: name {kind} files or folders")
    return list(dict.fromkeys(found))


def files_dataloader(
    files: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    resize: Resize = "squash",
    batch_size: int = 64,
    num_workers: int = 0,
    skip_corrupt: bool = False,
) -> tuple[ImageLoader, list[Path]]:
    """Batches (images float32 (B, 3, H, W), zeros (B,)) of image files in order, and the files that are in them.

    Args:
        files: image files.
        preprocessing: of the backbone.
        resize: as in training.
        batch_size: images in a batch.
        num_workers: processes that load images; 0 loads in the main process.
        skip_corrupt: leave damaged images out, opening each once before.

    Raises:
        DataError: a file is missing, or no file can be read; while iterating, a file is damaged.
    """
    source = ImageFiles(files, [0] * len(files))
    source.check_exist()
    if skip_corrupt:
        source = source.subset(source.readable())
    if not source.paths:
        raise DataError(f"none of the {len(files)} image files can be read")
    loader = ImageLoader(
        ImageDataset(source, ImageTransform(preprocessing, resize)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=as_batch,
    )
    return loader, source.paths
