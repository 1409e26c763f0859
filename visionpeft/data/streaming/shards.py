"""WebDataset shards: tar files in which the files of an image have one name and several endings.

webdataset takes the tar files apart; none of its decoders runs, and only the image and its label are taken out of a
shard. timm's own reader of them goes on where a shard is cut, with a line in the log, and leaves images out or repeats
them where several processes evaluate (findings/timm_wds_reader_loses_the_rest_of_a_cut_shard.sh).
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from visionpeft.data.ordering import mix, permutation
from visionpeft.data.streaming.stream import Encoded, Share, Shuffle, Stream
from visionpeft.errors import ConfigurationError, DataError, did_you_mean, one_line

IMAGES = ("jpg", "jpeg", "png", "webp")
END = 1024  # bytes of zeros with which a tar file ends
EXAMPLE = "as in 'train-{0000..0007}.tar'"


class Shards(Stream):
    """Images in shards, local or by the address of a file system that fsspec knows (https, hf, s3, gs, ...).

    Where the processes share the number of shards evenly, each reads shards of its own; otherwise each reads all and
    takes every so many-th image. Workers share the shards of their process.

    Args:
        addresses: of the shards.
        size: how many images they hold; None if that is not known.
        image_keys: endings of the images.
        label_key: a field of the `.json` file of an image, which is its label; None for the `.cls` file.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        size: int | None,
        image_keys: Sequence[str] = IMAGES,
        label_key: str | None = None,
    ):
        super().__init__(size)
        self.addresses = list(addresses)
        self.image_keys = tuple(image_keys)
        self.label_key = label_key
        self.label_ending = "cls" if label_key is None else "json"

    def check(self) -> Encoded:
        """The first image, after a look whether local shards exist and end as a tar file does.

        Raises:
            DataError: they do not, or there is no image, or it has no label.
        """
        for address in self.addresses:
            if not is_remote(address):
                check_whole(Path(address))
        first = next(self.samples(Share()), None)
        if first is None:
            raise DataError(
                f"shard {self.addresses[0]} holds no image with one of the endings {', '.join(self.image_keys)}"
            )
        return first

    def parts(self, processes: int) -> int:
        """As many as there are shards for it."""
        return len(self.addresses) // processes if self._whole(processes) else len(self.addresses)

    def _whole(self, processes: int) -> bool:
        return len(self.addresses) % processes == 0

    def samples(self, share: Share, shuffle: Shuffle | None = None) -> Iterator[Encoded]:
        """The images of a share."""
        addresses = self.addresses
        if shuffle is not None:
            addresses = [addresses[index] for index in permutation(len(addresses), shuffle.seed)]
        whole = self._whole(share.processes)
        if whole:
            addresses = addresses[share.rank :: share.processes]
        samples = self._read(addresses[share.worker :: share.workers])
        if not whole:
            samples = islice(samples, share.rank, None, share.processes)
        if shuffle is None:
            return samples
        from webdataset.filters import detshuffle

        seed = int(mix(shuffle.seed, share.rank, share.worker)[0])
        # What is first drawn from is the whole buffer, so that nothing depends on how long that takes to fill.
        return detshuffle(shuffle.buffer, shuffle.buffer, seed).run(samples)

    def _read(self, addresses: Sequence[str]) -> Iterator[Encoded]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        endings = {*self.image_keys, self.label_ending}

        def is_wanted(name: str) -> bool:
            return PurePosixPath(name).name.partition(".")[2].lower() in endings

        for address in addresses:
            try:
                with open_address(address) as file:
                    shard = [{"url": address, "stream": file}]
                    for sample in group_by_keys(tar_file_expander(shard, select_files=is_wanted)):
                        yield self._encoded(sample, address)
            except (DataError, MemoryError):
                raise
            except FileNotFoundError:
                raise DataError(f"shard {address} does not exist") from None
            # tarfile, the file systems and what is under them (HTTP, TLS, clouds) raise dozens of types.
            except Exception as error:
                reason = str(error.args[0]) if error.args else one_line(error)  # webdataset adds to what is told
                raise DataError(f"shard {address} cannot be read ({reason}); fetch it again if it is cut") from error

    def _encoded(self, sample: dict, address: str) -> Encoded:
        where = f"'{sample['__key__']}' in shard {address}"
        content = next((sample[key] for key in self.image_keys if key in sample), None)
        if content is None:
            raise DataError(f"{where} has no image with one of the endings {', '.join(self.image_keys)}")
        if self.label_ending not in sample:
            raise DataError(f"image {where} has no label: there is no .{self.label_ending} file beside it")
        return Encoded(content, self._label(sample[self.label_ending], where), where)

    def _label(self, content: bytes, where: str) -> object:
        try:
            if self.label_key is None:
                return content.decode().strip()
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the .{self.label_ending} file of image {where} cannot be read: {one_line(error)}"
            ) from None
        if not isinstance(fields, dict) or self.label_key not in fields:
            known = did_you_mean(self.label_key, map(str, fields)) if isinstance(fields, dict) else ""
            raise DataError(f"the .json file of image {where} has no field '{self.label_key}'{known}")
        return fields[self.label_key]


def find_shards(root: str | Path | None, split: str) -> tuple[list[str], int | None]:
    """Addresses of the shards of a split, and how many images they hold if that is written anywhere.

    Args:
        root: folder or address that those of the shards are relative to.
        split: as timm writes it: names with braces, `train-{0000..0007}.tar`, and where it is known the number of
            images after a bar, `train-{0000..0007}.tar|50000`; or a name under "splits" in `_info.json` in the root. A
            local name may have the `*` of a shell in it.

    Raises:
        DataError: there is no such split, or nothing it names; or it names a command (`pipe:`).
    """
    from webdataset.shardlists import expand_urls

    names, _, number = split.partition("|")
    if ".tar" not in names and ".." not in names:
        return _of_info(root, split)
    if number and not number.strip().isdecimal():
        raise DataError(f"split '{split}': after the bar stands the number of images, such as |50000")
    try:
        expanded = expand_urls(names)
    except (AssertionError, ValueError) as error:
        raise DataError(f"split '{split}' cannot be read: {one_line(error)}") from None
    addresses = []
    for name in expanded:
        if name.startswith("pipe:"):
            raise DataError(f"shard '{name}' is a command, which is not run; give the address of the file")
        address = _address(root, name)
        found = [address]
        if "*" in name and not is_remote(address):
            found = sorted(map(str, Path(root or ".").glob(name)))
            if not found:
                raise DataError(f"no shard in {root or 'the working directory'} matches {name}")
        addresses += found
    return addresses, int(number) if number else None


def _of_info(root: str | Path | None, split: str) -> tuple[list[str], int | None]:
    """As `find_shards`, of a split that is described in the root."""
    if root is None:
        raise ConfigurationError(f"split '{split}' is a name, not shards; set --data.root to where _info.json lies")
    for name in ("_info.json", "info.json"):
        address = _address(root, name)
        try:
            with open_address(address) as file:
                splits = json.load(file)["splits"]
        except FileNotFoundError:
            continue
        except (KeyError, TypeError, ValueError, RecursionError):
            raise DataError(f"{address} does not describe splits; name the shards, {EXAMPLE}") from None
        except Exception as error:  # file systems, and what is under them (HTTP, TLS, clouds), raise dozens of types
            raise DataError(f"{address} cannot be read: {one_line(error)}") from error
        if split not in splits:
            raise DataError(f"{address} describes no split '{split}'{did_you_mean(split, splits)}")
        try:
            names = [str(name) for name in splits[split]["filenames"]]
            number = int(splits[split].get("num_samples") or 0)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{address} does not say which files split '{split}' has") from None
        if not names:
            raise DataError(f"{address} names no file of split '{split}'")
        for shard in names:
            # It may have been downloaded from anywhere.
            path = PurePosixPath(shard)
            if ":" in shard or path.is_absolute() or ".." in path.parts:
                raise DataError(f"{address}: the shard '{shard}' does not lie beside it; name the shards themselves")
        return [_address(root, shard) for shard in names], number or None
    raise DataError(
        f"there is no split '{split}': {root} has no _info.json that describes it; name the shards, {EXAMPLE}"
    )


def _address(root: str | Path | None, name: str) -> str:
    if root is None or is_remote(name):
        return name
    return f"{str(root).rstrip('/')}/{name}" if is_remote(str(root)) else str(Path(root) / name)


def is_remote(address: str) -> bool:
    """Whether an address is one of a file system that fsspec knows."""
    return "://" in address


def open_address(address: str) -> BinaryIO:
    """A file to read from; no command is run for it, as webdataset's own opener would."""
    if not is_remote(address):
        return open(address, "rb")
    import fsspec

    return fsspec.open(address, "rb").open()


def check_whole(path: Path) -> None:
    """Check that a shard exists, and that an uncompressed one ends as a tar file does.

    Raises:
        DataError: so it is not.
    """
    if not path.is_file():
        raise DataError(f"shard {path} does not exist")
    if path.suffix != ".tar":
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END))
        if size % 512 or size < END or file.read().strip(b"\0"):
            raise DataError(f"shard {path} is cut or no tar file: it does not end as one does; fetch it again")
