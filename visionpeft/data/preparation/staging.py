"""A folder that appears when it is complete: archives unpacked, the layout written beside it, then one rename."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from visionpeft.data.preparation.download import Archive, digest, fetch
from visionpeft.data.preparation.unpack import unpack
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import claim, write_json

MARK = "made-by-visionpeft"  # an empty file that says that a folder may be deleted
PACKED = (".zip", ".tar", ".tgz", ".tar.gz")


def prepare_folder(
    target: Path,
    archives: Sequence[Archive],
    write: Callable[[Path, Path], dict],
    given: Path | None = None,
    mirror: str | None = None,
) -> dict:
    """Build `target` from archives.

    Downloads stay in `.downloads` beside it, for other tasks of the same archive; they may be removed.

    Args:
        target: the new folder.
        archives: what it is built from.
        write: takes the folder of the unpacked archives and the folder to write into; returns what is to be recorded.
        given: a folder that may have archives already.
        mirror: address of a folder with the archives.

    Returns:
        The content of `target/prepared.json`.

    Raises:
        DataError: the folder exists, or an archive cannot be had or used.
        ConfigurationError: another process is preparing here.
    """
    if os.path.lexists(target):  # a link that leads nowhere, too
        raise DataError(f"{target} exists; remove it to build it again")
    downloads = target.parent / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with claim(downloads / "lock") as mine:
        if not mine:
            raise ConfigurationError(f"another process is preparing data in {target.parent}; wait for it")
        # Beside the target, so that it is on the same disk and one rename moves it.
        work = target.with_name(f".{target.name}.partial")
        staging, unpacked = work / "folder", work / "unpacked"
        _make_work_folder(work)
        try:
            staging.mkdir()
            unpacked.mkdir()
            files = [fetch(archive, downloads, given, mirror) for archive in archives]
            for file in files:
                if file.name.endswith(PACKED):
                    print(f"unpacking {file}", flush=True)
                    unpack(file, unpacked)
                else:
                    (unpacked / file.name).symlink_to(file.resolve())
            record = {
                "made_by": "visionpeft",
                **write(unpacked, staging),
                "archives": {
                    archive.name: {"sha256": digest(file), "checksum_published": bool(archive.md5 or archive.sha256)}
                    for archive, file in zip(archives, files, strict=True)
                },
            }
            write_json(staging / "prepared.json", record)
            try:
                staging.rename(target)
            except OSError as error:
                if not os.path.lexists(target):
                    raise
                raise DataError(f"{target} has been made in the meantime ({error.strerror}); it is as it was") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return record


def _make_work_folder(folder: Path) -> None:
    """Make an empty folder with `MARK` in it; one of an earlier attempt, which has the mark too, is removed first.

    Raises:
        DataError: there is something of that name that was not made here; it is left alone.
    """
    if os.path.lexists(folder):
        if folder.is_symlink() or not (folder / MARK).is_file():
            raise DataError(
                f"{folder} is where this would unpack, and it was not made by visionpeft; rename it, or remove it "
                "yourself"
            )
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / MARK).touch()
