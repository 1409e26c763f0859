"""Files: where shipped ones are, how one is written whole or not at all, and who may work in a folder."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visionpeft.errors import ConfigurationError, StorageError


def shipped(kind: str) -> Path:
    """Folder `kind` ("configs" or "datasets") inside the installed package, or beside it in an editable install.

    Raises:
        ConfigurationError: neither place has the folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"the folder '{kind}' shipped with visionpeft is missing under {package}; reinstall it")


def cache_folder() -> Path:
    """Folder `visionpeft` in the user's cache folder, for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionpeft"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`: what is there stays until the new file is complete and on the disk.

    The file to write lies in the same folder, so that one rename puts it in its place. If writing fails, it is removed.
    """
    # At random: in a folder that several containers share, their processes have equal numbers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a full disk leaves the old one.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror}); what was there before is unchanged"
        ) from None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that a crash or a full disk leaves the old one.

    Raises:
        StorageError: it cannot be written.
    """
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Hold a lock; False where another process holds it. It ends with the process, however that ends.

    Args:
        file: the file that is locked; it is there for this alone, and stays.

    Raises:
        StorageError: the file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:  # the second, where there is no such call
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"{file} cannot be locked ({reason}); write to a file system with locks, or nothing would keep two "
            "processes out of one folder"
        ) from error
    try:
        yield True
    finally:
        lock.release()
