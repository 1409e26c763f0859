"""Archives on disk: downloaded once, resumed when interrupted, and never used before their checksum is right."""

import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from visionpeft.errors import DataError
from visionpeft.files import shipped

ATTEMPTS = 5
CHUNK = 2**20
TIMEOUT = 60


@dataclass(frozen=True)
class Archive:
    """A published file.

    Args:
        name: its name on disk.
        url: where it is published; None for one that people have to get by hand.
        by_hand: how they get it.
        md5: its MD5, where that is published,
        sha256: or its SHA-256.
    """

    name: str
    url: str | None = None
    by_hand: str = ""
    md5: str | None = None
    sha256: str | None = None


def published_archives() -> dict:
    """The archives of each data set, and why some are refused."""
    return json.loads((shipped("datasets") / "archives.json").read_text(encoding="utf-8"))


def fetch(archive: Archive, folder: Path, given: Path | None = None, mirror: str | None = None) -> Path:
    """The file of an archive, checked.

    Args:
        archive: which.
        folder: where downloads are kept; an interrupted one is `NAME.partial` and is continued.
        given: a folder that may have the file already, under its name.
        mirror: address of a folder with the same files, in place of the published address.

    Raises:
        DataError: it cannot be had, or is another file than the published one.
    """
    for place in (given, folder):
        if place is not None and (place / archive.name).is_file():
            check(place / archive.name, archive)
            return place / archive.name
    if archive.url is None and mirror is None:
        raise DataError(f"{archive.name} is not downloaded: {archive.by_hand}; then pass its folder with --from")
    url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
    partial = folder / f"{archive.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    _download(url, partial)
    try:
        check(partial, archive)
    except DataError:
        partial.unlink()
        raise
    os.replace(partial, folder / archive.name)
    return folder / archive.name


def check(file: Path, archive: Archive) -> None:
    """Compare a file with the published checksum, where there is one.

    Raises:
        DataError: they differ.
    """
    kind = "sha256" if archive.sha256 else "md5"
    wanted = archive.sha256 or archive.md5
    if wanted and (found := digest(file, kind)) != wanted:
        raise DataError(
            f"{file} is not the published {archive.name}: its {kind} is {found}, not {wanted}; get it again, or give "
            "the right one with --from"
        )


def digest(file: Path, kind: str = "sha256") -> str:
    """Checksum of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, kind).hexdigest()


def _download(url: str, partial: Path) -> None:
    """Download to `partial`, going on from what is there."""
    if url.partition(":")[0] not in ("http", "https", "file"):
        raise DataError(f"{url} is no address that can be downloaded from; use http, https or file")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if _receive(url, partial):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is not the beginning of this file
                partial.unlink(missing_ok=True)
            elif error.code < 500:
                raise DataError(f"{url} cannot be downloaded: {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        print(f"attempt {attempt} of {ATTEMPTS} at {url}: {reason}", flush=True)
    raise DataError(f"{url} cannot be downloaded: {reason}; what has come is kept, and the same command goes on")


def _receive(url: str, partial: Path) -> bool:
    """One request, from where the file on disk ends; False when less came than was announced."""
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "visionpeft"})
    if start and not url.startswith("file:"):
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumes = response.status == 206 and _range_start(response) == start
        length = response.headers.get("Content-Length")
        with partial.open("ab" if resumes else "wb") as file:
            before = file.tell()
            shutil.copyfileobj(response, file, CHUNK)
            return length is None or file.tell() - before == int(length)


def _range_start(response) -> int | None:
    """Where the answer begins: `Content-Range: bytes 100-199/200`."""
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else None
