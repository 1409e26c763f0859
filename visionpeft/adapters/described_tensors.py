"""A folder with tensors and a description of them, never pickled.

`<stem>.safetensors` holds the tensors and, in its header, the description; replacing this one file is what commits a
save. `<stem>.json` repeats the description for people and other tools.

The entry `sha256` of the description is a hash of the tensors, by which damage to their bytes is noticed: of, in the
order of the names, the line "name dtype shape" and the bytes of each. A description without it is not checked so.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from visionpeft.errors import ConfigurationError, StorageError, one_line
from visionpeft.files import write_whole


def write_described(folder: str | Path, stem: str, tensors: Mapping[str, torch.Tensor], description: dict) -> None:
    """Write tensors and description; the old files stay valid until the new tensors are completely on disk.

    Raises:
        ConfigurationError: the description is nothing that JSON can hold.
        StorageError: the disk is full, the folder cannot be written, or it has files of these names that were not
            written by this; what was there is unchanged.
    """
    folder = Path(folder)
    _refuse_foreign(folder, stem)
    content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        text = json.dumps(description | {"sha256": _hash_of(content)}, indent=1)
    except (TypeError, ValueError, RecursionError) as error:  # another type, and what holds itself
        raise ConfigurationError(
            f"what is said about the {stem} cannot be written as JSON ({one_line(error)}); give metadata as texts, "
            "numbers (tensor.item()), lists and dicts"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be made ({error.strerror}); save into another one") from None
    # One word of metadata: several stand in another order each time, and so would equal adapters have other bytes
    # (findings/safetensors_of_equal_content_differ_in_bytes.sh).
    write_whole(folder / f"{stem}.safetensors", serialise(content, metadata={"visionpeft": text}))
    write_whole(folder / f"{stem}.json", (text + "\n").encode())


def read_described(
    folder: str | Path, stem: str, check: Callable[[object, Path], None]
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors that `write_described` wrote.

    Args:
        folder: the folder.
        stem: "adapter" or "learner".
        check: raises a `StorageError` if the description, of the given path, is not what was written.

    Raises:
        StorageError: the files are missing, damaged, edited or of another kind.
    """
    folder = Path(folder)
    path, copy = folder / f"{stem}.safetensors", folder / f"{stem}.json"
    if not path.is_file():
        raise StorageError(f"{folder} holds no {path.name}; give the folder that save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = _header(file, path, stem)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        description = json.loads(text)
        check(description, path)
        recorded = description.pop("sha256", None)
        # An interrupted save that only changed tensors leaves the old hash in the copy, and its description holds.
        if copy.is_file() and _without_hash(json.loads(copy.read_text())) != description:
            raise StorageError(
                f"{copy} does not describe {path.name}: it was edited, or a save was interrupted between the two "
                f"files; delete {copy.name} to rely on what the tensors' own header says"
            )
    except StorageError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise StorageError(f"the {stem} in {folder} is damaged: {error}") from None
    if recorded is not None and recorded != _hash_of(tensors):
        raise StorageError(
            f"{path} is damaged: its tensors do not have the SHA-256 that its description names; take an intact copy, "
            "or save again"
        )
    return description, tensors


def check_entries(description: object, path: Path, format: int, entries: Mapping[str, type]) -> None:
    """Refuse a description that lacks some of its entries, or is of another format.

    Args:
        description: what was read.
        path: where it was read, for an error.
        format: the number that its entry "format" must have.
        entries: the type of each entry that it must have besides.

    Raises:
        StorageError: naming the entries, or both formats.
    """
    types = {"format": int, **entries}
    if not isinstance(description, dict) or any(not isinstance(description.get(k), t) for k, t in types.items()):
        raise StorageError(f"the description in {path} lacks one of {', '.join(types)}, or has it with another type")
    if description["format"] != format:
        raise StorageError(f"{path} has format {description['format']}, this version reads format {format}")


def _refuse_foreign(folder: Path, stem: str) -> None:
    """Refuse to replace files of these names that something else wrote; damaged tensors may be replaced."""
    path, copy = folder / f"{stem}.safetensors", folder / f"{stem}.json"
    foreign = None
    if path.is_file():
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            foreign = None if "visionpeft" in (file.metadata() or {}) else path
    elif copy.is_file():
        try:
            description = json.loads(copy.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError):
            description = None
        ours = isinstance(description, dict) and {"format", "backbone", "versions"} <= description.keys()
        foreign = None if ours else copy
    if foreign is not None:
        raise StorageError(f"{foreign} was not written by visionpeft and would be replaced; save into another folder")


def _header(file, path: Path, stem: str) -> str:
    """The description in the header of an opened file, as text."""
    text = (file.metadata() or {}).get("visionpeft")
    if text is None:
        raise StorageError(f"{path} was not written by visionpeft: its header describes no {stem}")
    return text


def _without_hash(description: object) -> object:
    kept = isinstance(description, dict)
    return {key: value for key, value in description.items() if key != "sha256"} if kept else description


def _hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_described(folder: Path, target: Path, stem: str) -> None:
    """Copy what `write_described` wrote into another folder, with the description that the tensors' header has.

    Raises:
        StorageError: the file is damaged, or was written by something else.
    """
    path = folder / f"{stem}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            text = _header(file, path, stem)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"the {stem} in {folder} is damaged: {error}") from None
    write_whole(target / path.name, path.read_bytes())
    write_whole(target / f"{stem}.json", (text + "\n").encode())


def check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse tensors that differ in name, shape or kind of number from those expected.

    Raises:
        StorageError: naming the first that differs.
    """
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if tensors[key].shape != expected[key].shape
    ]
    wrong += [
        f"{key} is of type {tensors[key].dtype} instead of {expected[key].dtype}"
        for key in expected.keys() & tensors.keys()
        if tensors[key].is_floating_point() != expected[key].is_floating_point()
    ]
    wrong += [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    wrong += [f"{key} is not expected" for key in tensors.keys() - expected.keys()]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise StorageError(f"the tensors of {what} do not fit its description and this backbone: {min(wrong)}{more}")
