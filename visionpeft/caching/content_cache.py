"""What frozen modules make of images, kept by what it depends on: the content of the image and of the modules."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from visionpeft.errors import StorageError
from visionpeft.files import write_whole

DEFAULT_BYTES = 512 * 2**20


class ContentCache:
    """Rows of tensors worked out from images, in memory, found again by the bytes of the image and a source.

    A changed image or source is another key, so that a stale row is never given out. What is kept is bounded: when it
    is full, rows of other sources make room, and then further ones are worked out each time.

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

    def rows(self, source: str, images: Tensor, work_out: Callable[[Tensor], Tensor]) -> Tensor:
        """One row for each of images (batch, ...), (batch, *shape of a row), without a graph.

        Args:
            source: what a row depends on besides the image.
            images: the images.
            work_out: makes the rows of some images.
        """
        keys = [(source, content) for content in contents(images)]
        found = {key: self._find(key, images.device) for key in dict.fromkeys(keys)}
        missing = [index for index, key in enumerate(keys) if found[key] is None]
        if missing:
            # Outside of inference mode, whose tensors could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                for index, row in zip(missing, work_out(images[missing]), strict=True):
                    if found[keys[index]] is None:  # the same image may be twice in a batch
                        found[keys[index]] = row
                        self._keep(keys[index], row)
        return torch.stack([found[key] for key in keys])

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

    Several processes may use one folder. When it is full, the sources make room that were not written to for longest.

    Args:
        folder: where the files are; nothing else belongs there.
        max_bytes: most bytes of rows that are kept.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_BYTES):
        super().__init__(max_bytes)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made ({error.strerror}); name another folder to keep") from None
        self.bytes = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def _find(self, key: tuple[str, bytes], device: torch.device) -> Tensor | None:
        try:
            return safetensors.torch.load_file(self._path(key), device=str(device))["row"]
        except (OSError, safetensors.SafetensorError, KeyError):  # not there, made room, or damaged
            return None

    def _keep(self, key: tuple[str, bytes], row: Tensor) -> None:
        path = self._path(key)
        content = safetensors.torch.save({"row": row.detach().cpu().contiguous()})
        if self.bytes + len(content) > self.max_bytes:
            self._make_room(path.parent, len(content))
        self.full = self.bytes + len(content) > self.max_bytes
        if not self.full:
            try:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, content)
            except (OSError, StorageError):  # a full disk, or another process has just made room
                self.full = True
                return
            self.bytes += len(content)

    def _path(self, key: tuple[str, bytes]) -> Path:
        source, content = key
        return self.folder / hashlib.sha256(source.encode()).hexdigest()[:32] / f"{content.hex()}.safetensors"

    def _make_room(self, own: Path, wanted: int) -> None:
        others = [path for path in self.folder.iterdir() if path.is_dir() and path != own]
        for other in sorted(others, key=lambda path: path.stat().st_mtime):
            if self.bytes + wanted <= self.max_bytes:
                return
            self.bytes -= sum(path.stat().st_size for path in other.glob("*.safetensors"))
            shutil.rmtree(other, ignore_errors=True)


class Fingerprint:
    """A hash of tensors, worked out again when they say that they were written to, or replaced."""

    def __init__(self):
        self._last: tuple[list, str] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """The hash of the names, shapes, types and values of these tensors."""
        state = [(name, id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()]
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
    """Where and in which precision rows are worked out, as a part of their source."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return f"{device} {autocast}"
