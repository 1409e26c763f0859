"""Archives unpacked without trust: regular files below one folder, nothing else."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from visionpeft.data.records import path_inside
from visionpeft.errors import DataError


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a tar (plain or compressed) or zip archive into a folder.

    Raises:
        DataError: the archive is damaged, a member's path leaves the folder, or a member is a link or a device.
    """
    try:
        for name, content in _members(archive):
            target = path_inside(folder, name.replace("\\", "/"), str(archive), "unpacked")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # What is there under that name is replaced, never written to: a link would lead out of the folder.
                target.unlink(missing_ok=True)
                file = target.open("xb")
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise DataError(f"{archive}: {name} is both a file and a folder in it; get it again") from None
            with content, file:
                shutil.copyfileobj(content, file)
    # zipfile raises NotImplementedError for a compression it does not know.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive} is damaged: {error}; get it again") from error


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, info.filename)
                if not info.is_dir():
                    yield info.filename, opened.open(info)
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if not (member.isreg() or member.isdir()):
                    raise _refused(archive, member.name)
                if member.isreg():
                    yield member.name, opened.extractfile(member)


def _refused(archive: Path, name: str) -> DataError:
    return DataError(f"{archive}: {name} is a link or a device and is not unpacked; this is no archive of images alone")
