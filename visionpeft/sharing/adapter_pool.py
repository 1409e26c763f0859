"""Many saved adapters on one backbone, of which as many are in memory as a bound allows."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import nn

from visionpeft.adapters.access import alone_with, uncompiled
from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import detach, register
from visionpeft.adapters.storage import made_adapter, read_saved
from visionpeft.adapters.switch import activate
from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.sharing.hub import download
from visionpeft.sharing.own_heads import give_own_heads
from visionpeft.sharing.pooled_adapter import PooledAdapter, inserted
from visionpeft.sharing.shared_batches import SharedBatches

# A name is one part of a path, and begins with no dot: "..", "a/b" and "/etc" are none.
NAME = re.compile(r"\w[\w.+-]*")


class PoolFull(ConfigurationError):
    """Adapters that are in use leave no room for another one."""


@dataclass
class _Entry:
    """An adapter that is in memory or on its way, and how many use it."""

    ready: Future = field(default_factory=Future)
    users: int = 0


class AdapterPool:
    """Adapters that are loaded when they are first asked for; the least recently used makes room.

    All methods may be called by several threads. Adapters that several ask for at once are loaded once, and one whose
    files are damaged or foreign fails for those who ask for it alone. Nothing else may attach to the model or detach
    from it meanwhile, and `hold` comes before `visionpeft.route` and not within it, because loading waits for it.

        pool = vp.AdapterPool(model, "adapters", capacity=2**30)
        logits = pool.logits(images, ["pets", "cars", "pets"])  # a tensor (classes of that adapter,) for each image

    Args:
        model: the backbone, with a head of any number of classes or none; put into evaluation mode.
        source: a folder, whose subfolders are the adapters (what `visionpeft.save` wrote, or run directories; also
            those which are added later); or folders and Hub names `user/name`, by name or in a list, where each is
            called what its path ends with.
        capacity: most bytes of parameters and buffers of the attached adapters; one that is being read comes on top.
        batch_size: most rows of a batch that `logits` computes. A row's logits are then the same, bit for bit, whatever
            the other rows are and however many: when adapters of a kind are first used, it is measured in which sizes
            the rows of a batch agree with those of a full one, and to the next of these a batch is filled up; and
            adapters of two kinds, or two of one kind, share batches if their rows there agree with those of each alone.
            None for batches of the rows that are given, whose last bits may differ from one to another.
        check_fingerprint: refuse adapters that were trained on other weights than those of the model.

    Raises:
        ConfigurationError: no such folder, two adapters of one name, or a size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        source: str | Path | Mapping[str, str | Path] | Sequence[str | Path],
        *,
        capacity: int = 2**30,
        batch_size: int | None = None,
        check_fingerprint: bool = True,
    ):
        if capacity < 1 or (batch_size is not None and batch_size < 1):
            raise ConfigurationError(f"capacity and batch_size must be at least 1, not {capacity:,} and {batch_size}")
        self.root, self._sources = _places(source)
        self.model = model.eval()
        self.capacity = capacity
        self.batch_size = batch_size
        self.check_fingerprint = check_fingerprint
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used one first
        self._bytes = 0
        self._table = Lock()  # of what is above; held for moments
        self._attaching = Lock()  # held while room is made and filled, or two would fill the same
        self._numbers = itertools.count()
        self._batches = SharedBatches(self.model, batch_size)

    # What there is

    def names(self) -> list[str]:
        """The adapters that can be asked for."""
        if self.root is None:
            return [*self._sources]
        return sorted(path.name for path in self.root.iterdir() if is_name(path.name) and _saved_in(path) is not None)

    def loaded(self) -> dict[str, PooledAdapter]:
        """The adapters in memory by name, the least recently used first."""
        with self._table:
            return {name: entry.ready.result() for name, entry in self._entries.items() if _is_there(entry)}

    @property
    def bytes(self) -> int:
        """Of the parameters and buffers of the adapters in memory; never more than `capacity`."""
        with self._table:
            return self._bytes

    # What is in memory

    @contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[list[PooledAdapter]]:
        """Within the context these adapters are in memory and stay there; loads those that are not.

        Raises:
            ConfigurationError: no adapter has this name.
            StorageError: its files are damaged, or belong to another backbone.
            PoolFull: what is in use leaves no room for it.
        """
        with ExitStack() as stack:
            held = []
            for name in names:
                held.append(self._take(name))
                stack.callback(self._release, name)
            yield held

    def unload(self, name: str) -> None:
        """Forget an adapter that nobody uses; it is read anew when it is next asked for.

        Raises:
            ConfigurationError: it is not in memory, or in use.
        """
        with self._table:
            entry = self._entries.get(name)
            if entry is None:
                raise ConfigurationError(f"adapter {name!r} is not in memory")
            if entry.users or not _is_there(entry):
                raise ConfigurationError(f"adapter {name!r} is in use; unload it later")
            del self._entries[name]
        self._drop(entry.ready.result())

    def _take(self, name: str) -> PooledAdapter:
        with self._table:
            entry = self._entries.get(name)
            if first := entry is None:
                entry = self._entries[name] = _Entry()
            entry.users += 1
            self._entries.move_to_end(name)
        if first:
            try:
                entry.ready.set_result(self._load(name))
            except BaseException as error:  # whatever it was, those who wait for it must learn of it
                with self._table:
                    del self._entries[name]
                entry.ready.set_exception(error)
        # An error is the same for all who asked while it was being loaded; who asks later makes a new attempt.
        return entry.ready.result()

    def _release(self, name: str) -> None:
        with self._table:
            self._entries[name].users -= 1

    def _load(self, name: str) -> PooledAdapter:
        description, tensors = read_saved(self._folder(name))
        what, model = f"the adapter {name!r}", uncompiled(self.model)
        with alone_with(model):
            adapter, backbone = made_adapter(model, description, tensors, what, self.check_fingerprint)
        classes = give_own_heads(adapter)
        size = sum(tensor.nbytes for tensor in (*adapter.parameters(), *adapter.buffers()))
        attached = f"pooled_{next(self._numbers)}"
        with self._attaching:
            self._make_room(name, size)
            with alone_with(model):
                active = model.peft.active if has_adapters(model) else ()
                register(model, attached, adapter, backbone, alone=True)
                activate(model, active)
            with self._table:
                self._bytes += size
        alone = bool(adapter.trained_names) or any(placed.tower == "text" for _, placed in adapter.placements)
        return PooledAdapter(name, attached, description, size, classes, alone, inserted(adapter))

    def _make_room(self, name: str, size: int) -> None:
        """Let the least recently used adapters go that nobody uses, until this many bytes are free."""
        if size > self.capacity:
            raise PoolFull(f"adapter {name!r} has {size:,} bytes, and the pool holds {self.capacity:,} in all")
        going: list[PooledAdapter] = []
        with self._table:
            idle = [each for each, entry in self._entries.items() if not entry.users and _is_there(entry)]
            missing = self._bytes + size - self.capacity
            for each in idle:
                if missing <= 0:
                    break
                going.append(self._entries[each].ready.result())
                missing -= going[-1].bytes
            if missing > 0:
                raise PoolFull(
                    f"adapter {name!r} has {size:,} bytes, and of {self.capacity:,} those in use leave too few; ask "
                    "again later, or give the pool more"
                )
            for each in going:
                del self._entries[each.name]
        for each in going:
            self._drop(each)

    def _drop(self, adapter: PooledAdapter) -> None:
        """Detach an adapter that is no more in the table, so that nobody can have begun to use it."""
        detach(uncompiled(self.model), adapter.attached)
        with self._table:
            self._bytes -= adapter.bytes

    def _folder(self, name: str) -> Path:
        if self.root is None:
            if name not in self._sources:
                raise ConfigurationError(f"there is no adapter {name!r}{did_you_mean(name, self._sources)}")
            place = Path(self._sources[name])
            place = place if place.is_dir() else download(str(self._sources[name]))
        else:
            place = self.root / name if is_name(name) else None
            # A link may lead anywhere; what it leads to must lie below the folder, too.
            if place is None or not place.resolve().is_relative_to(self.root) or not place.is_dir():
                raise ConfigurationError(f"there is no adapter {name!r}{did_you_mean(name, self.names())}")
        return _saved_in(place) or place

    # What they compute

    def logits(self, images: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Logits (classes,) of each image by its adapter, whose number of classes may differ from that of others.

        Images of adapters that can share a batch do: of those that add equally many tokens, and train no parameters of
        the backbone itself. An adapter without head gives what the model gives.

        Args:
            images: (batch, 3, height, width).
            names: of the adapters, (batch,).

        Raises:
            ConfigurationError, StorageError, PoolFull: as `hold`.
        """
        if len(images) != len(names):
            raise ConfigurationError(f"{len(images)} images need as many names of adapters, not {len(names)}")
        with self.hold(dict.fromkeys(names)) as held, torch.inference_mode():
            by_name = {adapter.name: adapter for adapter in held}
            return self._batches.logits(images, [by_name[name] for name in names])


def _places(source) -> tuple[Path | None, Mapping[str, str | Path]]:
    """The folder in which adapters lie, or each by its name."""
    if isinstance(source, str | Path):
        root = Path(source)
        if not root.is_dir():
            raise ConfigurationError(f"there is no folder {source}; a Hub name alone goes into a list")
        return root.resolve(), {}
    if isinstance(source, Mapping):
        return None, source  # as it is, so that it may change
    named: dict[str, str | Path] = {}
    for each in source:
        name = Path(each).name
        if name in named:
            raise ConfigurationError(
                f"{each} and {named[name]} would both be called {name!r}; give a dictionary with a name for each"
            )
        named[name] = each
    return None, named


def is_name(name: str) -> bool:
    """Whether this can name an adapter below a folder: one part of a path, which leads nowhere else."""
    return NAME.fullmatch(name) is not None


def _saved_in(place: Path) -> Path | None:
    """Where the files of an adapter are: in a folder itself, or in that of a run."""
    folders = (place, place / "adapter")
    return next((folder for folder in folders if (folder / "adapter.safetensors").is_file()), None)


def _is_there(entry: _Entry) -> bool:
    return entry.ready.done() and entry.ready.exception() is None
