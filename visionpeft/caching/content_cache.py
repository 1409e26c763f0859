"""What frozen modules make of images, kept by what it depends on: the image and the content of the modules."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from visionpeft.caching.named_images import names_of
from visionpeft.errors import StorageError
from visionpeft.files import write_whole
from visionpeft.sites.tensor_versions import version_of

DEFAULT_BYTES = 512 * 2**20

OWN_FOLDER = "visionpeft-rows"
SOURCE = re.compile(r"[0-9a-f]{32}")
ROW = re.compile(r"[0-9a-f]{32}\.safetensors")
PARTIAL_ROW = re.compile(r"\.[0-9a-f]{32}\.safetensors\..+")  # as `write_whole` names it until it is complete


class ContentCache:
    """Rows of tensors computed from images, in memory, found again by the bytes of the image and a source.

    A changed image or source is another key, so that a stale row is never given out. Images that have names are found
    by these, without reading them. What is kept is bounded: when it is full, rows of other sources make room, and then
    further ones are computed each time.

    Args:
        max_bytes: most bytes that are kept.

    Attributes:
        full: a row could not be kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.full = False
        self.kept: dict[tuple[str, bytes], Tensor] = {}

    def rows(self, source: str, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """One row for each of images (batch, ...), (batch, *shape of a row), without a graph.

        Args:
            source: what a row depends on besides the image.
            images: the images.
            compute: makes the rows of some images.
        """
        keys = [(source, identity) for identity in self.identities(images)]
        found = {key: self._find(key, images.device) for key in dict.fromkeys(keys)}
        missing = [index for index, key in enumerate(keys) if found[key] is None]
        if missing:
            # Outside of inference mode, whose tensors could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                for index, row in zip(missing, compute(images[missing]), strict=True):
                    if found[keys[index]] is None:  # the same image may be twice in a batch
                        found[keys[index]] = row
                        self._keep(keys[index], row)
        return torch.stack([found[key] for key in keys])

    def identities(self, images: Tensor) -> Sequence[bytes]:
        """What each of (batch, ...) images is known by: its name, or else its content."""
        return names_of(images) or contents(images)

    def _find(self, key: tuple[str, bytes], device: torch.device) -> Tensor | None:
        return self.kept.get(key)

    def _keep(self, key: tuple[str, bytes], row: Tensor) -> None:
        if self.bytes + row.nbytes > self.max_bytes:
            self.kept = {other: value for other, value in self.kept.items() if other[0] == key[0]}
            self.bytes = sum(value.nbytes for value in self.kept.values())
        self.full = self.bytes + row.nbytes > self.max_bytes
        if not self.full:
            self.kept[key] = row.clone()
            self.bytes += row.nbytes


class FolderCache(ContentCache):
    """`ContentCache` on disk: a folder for each source, a file for each row, written whole or not at all.

    All of it is in `folder/visionpeft-rows`, and only files that have the names of rows are ever deleted, so that
    `folder` may hold anything else. Several processes may use one folder, and the bound holds for all of them together:
    the file `bytes` has the sum of what is kept, and is changed under the lock of the file `lock`. When the folder is
    full, the sources make room that were not written to for longest. Rows are found by contents, as names do not
    outlive a process; of an image that has a name, this process reads the content once.

    Args:
        folder: where `visionpeft-rows` is, or is made.
        max_bytes: most bytes of rows that are kept.

    Raises:
        StorageError: the folder cannot be made, or its file system has no locks.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES):
        super().__init__(max_bytes)
        self.folder = Path(folder) / OWN_FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made ({error.strerror}); name another folder to keep") from None
        self._contents: dict[bytes, bytes] = {}  # of the images that had names
        self._no_room: tuple[Path, int] | None = None  # source and sum of bytes at which nothing else could make room
        try:
            with FileLock(self.folder / "lock"):
                self._count()
        except NotImplementedError:  # by filelock, where the system call is not there
            raise StorageError(
                f"{folder} is on a file system without locks, so that several processes could fill it beyond its "
                "bound; name another folder to keep"
            ) from None
        except OSError:  # one that may only be read still gives what it has
            self.bytes = sum(path.stat().st_size for path in self._rows())

    def identities(self, images: Tensor) -> Sequence[bytes]:
        """The content of each image, which is read where it has no name, or has not been read under this one."""
        names = names_of(images)
        if names is None:
            return contents(images)
        if not all(name in self._contents for name in names):
            self._contents.update(zip(names, contents(images), strict=True))
        return [self._contents[name] for name in names]

    def _find(self, key: tuple[str, bytes], device: torch.device) -> Tensor | None:
        try:
            return safetensors.torch.load_file(self._path(key), device=str(device))["row"]
        except (OSError, safetensors.SafetensorError, KeyError):  # not there, made room, or damaged
            return None

    def _keep(self, key: tuple[str, bytes], row: Tensor) -> None:
        path = self._path(key)
        content = safetensors.torch.save({"row": row.detach().cpu().contiguous()})
        try:
            with FileLock(self.folder / "lock"):
                self.full = not self._has_room(path, len(content))
                if not self.full:
                    # The sum is written first: a kill between the two leaves it too high, which the next count mends.
                    self._record(self.bytes + len(content))
                    path.parent.mkdir(exist_ok=True)
                    write_whole(path, content)
        except (OSError, StorageError):  # a full disk, or a folder that may only be read
            self.full = True

    def _path(self, key: tuple[str, bytes]) -> Path:
        source, content = key
        return self.folder / hashlib.sha256(source.encode()).hexdigest()[:32] / f"{content.hex()}.safetensors"

    def _has_room(self, path: Path, wanted: int) -> bool:
        """Whether a row may be written; deletes other sources for it where it must. Under the lock."""
        try:
            self.bytes = int((self.folder / "bytes").read_text())
        except (OSError, ValueError):
            self._count()
        if self.bytes + wanted > self.max_bytes and self._no_room != (path.parent, self.bytes):
            self._count()  # a replaced row, or one whose writer was killed, was counted twice
            self._make_room(path.parent, wanted)
            self._no_room = (path.parent, self.bytes) if self.bytes + wanted > self.max_bytes else None
        return self.bytes + wanted <= self.max_bytes

    def _count(self) -> None:
        """Sum what is there anew, and delete what killed writers left. Under the lock, so that nobody is writing."""
        for path in self._rows(PARTIAL_ROW):
            path.unlink()
        self._record(sum(path.stat().st_size for path in self._rows()))

    def _record(self, total: int) -> None:
        self.bytes = total
        (self.folder / "bytes").write_text(str(total))  # a kill in between leaves no number, and the next one counts

    def _rows(self, pattern: re.Pattern = ROW, folders: Iterable[Path] | None = None) -> Iterator[Path]:
        """Files of the cache: by their names, and never by way of a link."""
        for folder in self._sources() if folders is None else folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path)

    def _sources(self) -> list[Path]:
        with os.scandir(self.folder) as entries:
            return [Path(e.path) for e in entries if SOURCE.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]

    def _make_room(self, own: Path, wanted: int) -> None:
        others = sorted((path for path in self._sources() if path != own), key=lambda path: path.stat().st_mtime)
        for other in others:
            if self.bytes + wanted <= self.max_bytes:
                return
            for path in self._rows(folders=[other]):
                self.bytes -= path.stat().st_size
                path.unlink()
            self._record(self.bytes)
            with contextlib.suppress(OSError):  # it holds something else, which stays
                other.rmdir()


class Fingerprint:
    """A hash of tensors, computed again when they say that they were written to, or replaced."""

    def __init__(self):
        self._last: tuple[list, str] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """The hash of the names, shapes, types and values of these tensors."""
        state = [(name, id(tensor), tensor.data_ptr(), version_of(tensor)) for name, tensor in tensors.items()]
        if self._last is None or self._last[0] != state:
            self._last = state, fingerprint(tensors)
        return self._last[1]

    def forget(self) -> None:
        """Hash at the next use even if the tensors do not say that they were written to."""
        self._last = None


def contents(images: Tensor) -> list[bytes]:
    """A hash of the shape, type and bytes of each of (batch, ...) images."""
    kind = hashlib.sha256(f"{tuple(images.shape[1:])} {images.dtype}".encode())
    hashes = []
    for row in images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy():
        digest = kind.copy()
        digest.update(row)
        hashes.append(digest.digest()[:16])
    return hashes


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, shapes, types and values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def arithmetic(device: torch.device) -> str:
    """Where and in which precision rows are computed, as a part of their source.

    Products of float32 in TF32 or bfloat16 are told from those in float32, as `torch.set_float32_matmul_precision` or
    the options of `torch.backends` choose them. PyTorch's own choice adds nothing, so that what was kept stays known.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    backends = torch.backends
    # Read from each backend: where both ways of choosing were used, `get_float32_matmul_precision` is an error.
    if device.type == "cuda":
        chosen = {"matmul": backends.cuda.matmul.fp32_precision, "conv": backends.cudnn.conv.fp32_precision}
        usual = {"matmul": ("none", "ieee"), "conv": ("tf32",)}
    else:
        chosen = {"matmul": backends.mkldnn.matmul.fp32_precision, "conv": backends.mkldnn.conv.fp32_precision}
        usual = dict.fromkeys(chosen, ("none", "ieee"))
    others = [f"{what} in {precision}" for what, precision in chosen.items() if precision not in usual[what]]
    return " ".join([f"{device} {autocast}", *others])
