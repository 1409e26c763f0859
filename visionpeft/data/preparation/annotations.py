"""Annotation files of the published archives."""

import gzip
import zipfile
from pathlib import Path

import numpy as np

from visionpeft.data.annotations import read_text
from visionpeft.errors import DataError


def lines(file: Path) -> list[str]:
    """Lines of a text file that are not blank."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def numbered(file: Path) -> dict[str, str]:
    """Lines `<id> <value>` of CUB and NABirds."""
    return {number: value for number, _, value in (line.partition(" ") for line in lines(file))}


def matlab(file: Path) -> dict:
    """Variables of a MATLAB file.

    Raises:
        DataError: SciPy is not installed, or the file is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"reading {file} needs SciPy; install it with pip install scipy") from error
    if not file.is_file():
        raise DataError(f"annotation file {file} does not exist")
    return loadmat(file)


def norb_matrix(file: Path) -> np.ndarray:
    """A matrix of smallNORB: int32 type and number of dimensions, at least three int32 sizes, then the values.

    Raises:
        DataError: it is of another kind, or too short.
    """
    types = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
    content = gzip.decompress(file.read_bytes())
    kind, dimensions = np.frombuffer(content, "<i4", 2)
    if kind not in types or not 1 <= dimensions <= 4:
        raise DataError(f"{file} is not a matrix of smallNORB")
    shape = np.frombuffer(content, "<i4", dimensions, offset=8)
    offset = 8 + 4 * max(3, dimensions)
    if len(content) - offset != np.prod(shape) * types[kind].itemsize:
        raise DataError(f"{file} holds {len(content) - offset:,} bytes of values, not {tuple(shape)}")
    return np.frombuffer(content, types[kind], offset=offset).reshape(shape)


def npz_rows(file: Path, name: str, indices: np.ndarray) -> np.ndarray:
    """Some rows of an array in a .npz file, read without loading all of it, and never unpickled.

    Raises:
        DataError: the array is missing, holds objects, or is too short.
    """
    wanted = np.sort(indices)
    with zipfile.ZipFile(file) as opened:
        if f"{name}.npy" not in opened.namelist():
            raise DataError(f"{file} has no array {name}")
        with opened.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(stream)
            if dtype.hasobject or columns_first:
                raise DataError(f"array {name} of {file} is not one of plain rows")
            if len(wanted) and wanted[-1] >= shape[0]:
                raise DataError(f"array {name} of {file} has {shape[0]:,} rows, not {wanted[-1] + 1:,}")
            size = int(np.prod(shape[1:])) * dtype.itemsize
            found = np.empty((len(wanted), *shape[1:]), dtype)
            step = max(1, 2**24 // size)
            for start in range(0, shape[0], step):
                block = stream.read(size * min(step, shape[0] - start))
                rows = np.frombuffer(block, dtype).reshape(-1, *shape[1:])
                inside = slice(*np.searchsorted(wanted, [start, start + step]))
                found[inside] = rows[wanted[inside] - start]
    return found[np.argsort(np.argsort(indices, kind="stable"), kind="stable")]
