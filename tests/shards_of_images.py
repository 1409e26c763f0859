"""Small local WebDataset shards and Parquet files, whose images say by their grey value which one they are."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import datasets

CLASSES = ["blue", "green", "red"]
SHARDS = (7, 5, 6, 4)  # images in each of the train shards, 22 in all


def png(value: int, side: int = 8) -> bytes:
    """A grey image."""
    return of_pixels(np.full((side, side, 3), value, np.uint8))


def of_pixels(pixels: np.ndarray) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar file, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes=SHARDS, prefix: str = "train") -> Path:
    """Shards `train-0.tar` ...; image number n is grey n and of class n modulo 3."""
    number = 0
    for shard, size in enumerate(sizes):
        files = {}
        for each in range(number, number + size):
            files |= {f"{each:04}.png": png(each), f"{each:04}.cls": str(each % 3).encode()}
        write_tar(folder / f"{prefix}-{shard}.tar", files)
        number += size
    return folder


def write_parquet(folder: Path, sizes=SHARDS, split: str = "train", labels=None) -> Path:
    """A local data set of Hugging Face's, of the same images."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    number = 0
    datasets.disable_progress_bars()
    for shard, size in enumerate(sizes):
        rows = [
            {"image": {"bytes": png(each), "path": None}, "label": each % 3 if labels is None else labels}
            for each in range(number, number + size)
        ]
        file = folder / f"{split}-{shard:05}-of-{len(sizes):05}.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)
        number += size
    return folder
